"""What a program computes: the output or one of the three gradients, and which operands that takes.

All four have one shape, a row x against rows y and z over a half plane (causal) or the whole plane:

    out_t = l_t sum_j (x_t . y_j) r_j z_j

    O:  x = q,  y = k,  z = v    j <= t    l = 1 / |q|                r = 1 / (|k| max(c ** p, 1))
    DQ: x = do, y = v,  z = k    j <= t    l = 1                      r = 1 / (|k| max(c ** p, 1))
    DK: x = v,  y = do, z = q    j >= t    l = 1 / max(c ** p, 1)     r = 1 / |q|
    DV: x = k,  y = q,  z = do   j >= t    l = 1 / |k|                r = 1 / |q|

so rows go from memory to the products as they are, and what makes them unit vectors and divides values are two factors
a token. O and DV are tiles of V, DQ and DK tiles of K, where the sum is the gradient of the unit vector: `finish` turns
it into that of q or k. Where K is split over programs (`q_norm` is there), that is left to `unit_gradient_kernel`, and
norms come from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cottention.ops.triton.tiles import divisor_gradient, inverse, load_rows, row_norms, unit_gradient

O = tl.constexpr(0)  # noqa: E741
DQ = tl.constexpr(1)
DK = tl.constexpr(2)
DV = tl.constexpr(3)


@triton.jit
def left_rows(
    q, k, v, do, t, real, weight, K, V, BK: tl.constexpr, BV: tl.constexpr, ROLE: tl.constexpr, DOT: tl.constexpr
):
    """x and l; `weight` is 1 / max(c ** p, 1) of these tokens."""
    if ROLE == O:
        x = load_rows(q, t, real, 0, K, BK, DOT)
        factor = inverse(row_norms(x))
    elif ROLE == DV:
        x = load_rows(k, t, real, 0, K, BK, DOT)
        factor = inverse(row_norms(x))
    elif ROLE == DQ:
        x = load_rows(do, t, real, 0, V, BV, DOT)
        factor = weight * 0.0 + 1.0
    else:
        x = load_rows(v, t, real, 0, V, BV, DOT)
        factor = weight
    return x, factor


@triton.jit
def right_rows(
    q,
    k,
    v,
    do,
    t,
    real,
    weight,
    q_norm,
    k_norm,
    norm_stride,
    z0,
    K,
    V,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BZ: tl.constexpr,
    ROLE: tl.constexpr,
    DOT: tl.constexpr,
):
    """y, dimensions z0 on of z, and r; `weight` is 1 / max(c ** p, 1) of these tokens."""
    if ROLE == O:
        y = load_rows(k, t, real, 0, K, BK, DOT)
        z = load_rows(v, t, real, z0, V, BZ, DOT)
        norm = row_norms(y)
    elif ROLE == DV:
        y = load_rows(q, t, real, 0, K, BK, DOT)
        z = load_rows(do, t, real, z0, V, BZ, DOT)
        norm = row_norms(y)
    elif ROLE == DQ:
        y = load_rows(v, t, real, 0, V, BV, DOT)
        z = load_rows(k, t, real, z0, K, BZ, DOT)
        norm = stored_or_own(k_norm, t, real, norm_stride, z)
    else:
        y = load_rows(do, t, real, 0, V, BV, DOT)
        z = load_rows(q, t, real, z0, K, BZ, DOT)
        norm = stored_or_own(q_norm, t, real, norm_stride, z)
    factor = inverse(norm)
    if ROLE == O or ROLE == DQ:
        factor = factor * weight
    return y, z, factor


@triton.jit
def stored_or_own(norm_ptr, t, real, stride, x):
    """Norms of rows whose dimensions are all in x, else from memory."""
    if norm_ptr is None:
        norm = row_norms(x)
    else:
        norm = tl.load(norm_ptr + t.to(tl.int64) * stride, mask=real, other=1.0)
    return norm


@triton.jit
def finish(
    acc,
    q,
    k,
    v,
    t,
    real,
    weight,
    log_count,
    q_norm,
    z0,
    K,
    V,
    BZ: tl.constexpr,
    HAS_M: tl.constexpr,
    ROLE: tl.constexpr,
):
    """The output or gradient itself from the sum, and what its tokens add to dp."""
    dp = 0.0
    if ROLE == DV:
        if HAS_M:
            acc = acc * weight[:, None]
            value = load_rows(v, t, real, z0, V, BZ, tl.float32)
            dp += divisor_gradient(value, acc, log_count)
    elif ROLE == DQ:
        if q_norm is None:
            acc = unit_gradient(acc, load_rows(q, t, real, z0, K, BZ, tl.float32))
    elif ROLE == DK:
        if q_norm is None:
            acc = unit_gradient(acc, load_rows(k, t, real, z0, K, BZ, tl.float32))
    return acc, dp
