"""What a program computes: the output or one of the three gradients, and which operands that takes.

All four have one shape, a row x against rows y and z over a half plane (causal) or the whole plane:

    out_t = sum_j (x_t . y_j) z_j

    O:  x = q_hat, y = k_hat, z = v'      j <= t        DV: x = k_hat, y = q_hat, z = do      j >= t
    DQ: x = do,    y = v',    z = k_hat   j <= t        DK: x = v',    y = do,    z = q_hat   j >= t

with v' = v / max(c ** p, 1). O and DV are tiles of V, DQ and DK tiles of K, where they give the gradient of the unit
vector that `finish` turns into that of q or k. Where K is split over programs (`q_norm` is there) that is left to
`unit_gradient_kernel`, and the norms come from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cottention.ops.triton.tiles import divisor_gradient, load_rows, unit_gradient, unit_rows

O = tl.constexpr(0)  # noqa: E741
DQ = tl.constexpr(1)
DK = tl.constexpr(2)
DV = tl.constexpr(3)


@triton.jit
def left_rows(q, k, v, do, t, real, weight, K, V, BK: tl.constexpr, BV: tl.constexpr, ROLE: tl.constexpr):
    """x; `weight` is 1 / max(c ** p, 1) of its tokens."""
    if ROLE == O:
        x = unit_rows(q, t, real, 0, K, BK, None, 0)
    elif ROLE == DV:
        x = unit_rows(k, t, real, 0, K, BK, None, 0)
    elif ROLE == DQ:
        x = load_rows(do, t, real, 0, V, BV)
    else:
        x = load_rows(v, t, real, 0, V, BV) * weight[:, None]
    return x


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
):
    """y, and dimensions z0 on of z; `weight` is 1 / max(c ** p, 1) of their tokens."""
    if ROLE == O:
        y = unit_rows(k, t, real, 0, K, BK, None, 0)
        z = load_rows(v, t, real, z0, V, BZ) * weight[:, None]
    elif ROLE == DV:
        y = unit_rows(q, t, real, 0, K, BK, None, 0)
        z = load_rows(do, t, real, z0, V, BZ)
    elif ROLE == DQ:
        y = load_rows(v, t, real, 0, V, BV) * weight[:, None]
        z = unit_rows(k, t, real, z0, K, BZ, k_norm, norm_stride)
    else:
        y = load_rows(do, t, real, 0, V, BV)
        z = unit_rows(q, t, real, z0, K, BZ, q_norm, norm_stride)
    return y, z


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
            value = load_rows(v, t, real, z0, V, BZ) * weight[:, None]
            dp += divisor_gradient(value, acc, log_count)
            acc = acc * weight[:, None]
    elif ROLE == DQ:
        if q_norm is None:
            acc = unit_gradient(acc, load_rows(q, t, real, z0, K, BZ))
    elif ROLE == DK:
        if q_norm is None:
            acc = unit_gradient(acc, load_rows(k, t, real, z0, K, BZ))
    return acc, dp
