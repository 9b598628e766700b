"""The tiles that every kernel works on, and what is fused into loading them: masks, unit vectors, divisors.

A tile holds BT tokens of one head. Tokens are numbered inside their row of the batch; a row is reached by a base
pointer. Rows are addressed in 64 bits, so B * T * H * K may pass 2^31. Everything is computed in float32; operands of
products are in the dtype that the caller names. An argument that is None is known as such when compiling.

    t, inside, real = tokens(t0, end, real_ptr, BT)
    k = load_rows((k_ptr, k_t, k_d), t, real, 0, K, BK, tl.bfloat16)
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (to a type checker the body of a kernel is Python)
from __future__ import annotations

import triton
import triton.language as tl

_MIN_NORM = tl.constexpr(1e-12)  # cottention.ops.state.MIN_NORM: kernels see constants of their own module alone
_SLICE = tl.constexpr(16)  # the longest that left no register spilled at 256 dims
_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST_LOG_DECAY = tl.constexpr(-128.0)  # exp of it is 0 in float32; -inf is taken as any other strong decay
_COARSE = tl.constexpr(1024.0)


@triton.jit
def segment_of(i, table, num_tokens, segment_tokens, segments_each):
    """(row of the batch, sequence, the sequence's first token and end, the segment's first token and end)."""
    if table is not None:  # [slots, 5] int32: packed sequences
        p = table + i * 5
        sequence = tl.load(p)
        return sequence * 0, sequence, tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4)
    sequence = i // segments_each
    start = (i % segments_each) * segment_tokens
    end = tl.minimum(start + segment_tokens, num_tokens)
    return sequence, sequence, sequence * 0, num_tokens, start, end


@triton.jit
def tokens(t0, end, real_ptr, BT: tl.constexpr):
    """Numbers of BT tokens from t0, which of them exist, and which of those are no padding."""
    t = t0 + tl.arange(0, BT)
    inside = t < end
    real = inside
    if real_ptr is not None:
        real = inside & (tl.load(real_ptr + t, mask=inside, other=0) != 0)
    return t, inside, real


@triton.jit
def load_rows(operand, t, keep, d0, D, BD: tl.constexpr, DTYPE: tl.constexpr):
    """[BT, BD] of an operand (pointer, stride of tokens, stride of dimensions) from d0 on; 0 where not kept."""
    d = d0 + tl.arange(0, BD)
    pointers = (operand[0] + t.to(tl.int64) * operand[1])[:, None] + (d.to(tl.int64) * operand[2])[None, :]
    return tl.load(pointers, mask=keep[:, None] & (d < D)[None, :], other=0.0).to(DTYPE)


@triton.jit
def store_rows(ptr, x, t, keep, stride_t, d0, D, BD: tl.constexpr):
    """Write [BT, BD] to memory whose dimensions lie together, in its dtype."""
    d = d0 + tl.arange(0, BD)
    pointers = (ptr + t.to(tl.int64) * stride_t)[:, None] + d[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=keep[:, None] & (d < D)[None, :])


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """x [M, D] times y [D, N], with D long.

    Full float32 runs on the ordinary units, where a thread holds whole rows of x and columns of y: there the parts of
    them go to different threads, and are added. Rows of 256 in TF32 need the same to leave no register spilled.
    """
    M: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    N: tl.constexpr = y.shape[1]
    if x.dtype != tl.float32 or D <= _SLICE or (PRECISION != "ieee" and D < 256):
        out = tl.dot(x, y, input_precision=PRECISION)
    else:
        PARTS: tl.constexpr = D // _SLICE
        x = tl.permute(tl.reshape(x, [M, PARTS, _SLICE]), [1, 0, 2])
        out = tl.sum(tl.dot(x, tl.reshape(y, [PARTS, _SLICE, N]), input_precision=PRECISION), 0)
    return out


@triton.jit
def row_norms(x):
    """L2 norm of each row, in float32."""
    x = x.to(tl.float32)
    return tl.sqrt(tl.sum(x * x, 1))


@triton.jit
def inverse(norm):
    """What makes a row of that norm a unit vector."""
    return 1.0 / tl.maximum(norm, _MIN_NORM)


@triton.jit
def unit_gradient(grad, x):
    """Gradient of x from that of its unit vector: (g - x_hat (x_hat . g)) / ||x||, or g / 1e-12 where clamped."""
    norm = row_norms(x)
    x_hat = x * inverse(norm)[:, None]
    radial = tl.where(norm < _MIN_NORM, 0.0, tl.sum(x_hat * grad, 1))
    return (grad - x_hat * radial[:, None]) * inverse(norm)[:, None]


@triton.jit
def exponent(norm_const, i_h):
    """p = sigmoid(m) of a head; 0, which divides by nothing, without norm_const."""
    if norm_const is not None:
        return tl.sigmoid(tl.load(norm_const + i_h).to(tl.float32))
    return 0.0


@triton.jit
def log2_count(t, inside, where, counts, CAUSAL: tl.constexpr):
    """log2 of the real tokens up to each token (causal) or in its whole sequence; 0 where nothing is real yet."""
    if CAUSAL:
        if counts[0] is not None:  # [B, T], with padding and with what was seen before
            count = tl.load(counts[0] + t, mask=inside, other=1)
        else:
            count = t - where[2] + 1
            if counts[2] is not None:
                count = count + tl.load(counts[2] + where[1])
    else:
        if counts[1] is not None:
            count = tl.load(counts[1] + where[1]) + t * 0
        else:
            count = where[3] - where[2] + t * 0
    return tl.log2(tl.maximum(count, 1).to(tl.float32))


@triton.jit
def decay_sums(operand, t, real):
    """Sums of log_decay up to each of a tile's tokens, a coarse part and the fine rest of it; and the two of all.

    Coarse parts are multiples of 2^-10 above -128, so that sums and differences of 128 of them are exact in float32. Of
    whole sums, differences behind a strong decay would be what is left of two large numbers.
    """
    log_decay = tl.load(operand[0] + t.to(tl.int64) * operand[1], mask=real, other=0.0).to(tl.float32)
    log_decay = tl.where(log_decay < _LEAST_LOG_DECAY, _LEAST_LOG_DECAY, log_decay)
    coarse = tl.floor(log_decay * _COARSE + 0.5) / _COARSE
    fine = log_decay - coarse
    return tl.cumsum(coarse, 0), tl.cumsum(fine, 0), tl.sum(coarse, 0), tl.sum(fine, 0)


@triton.jit
def decay_factors(sums, REVERSE: tl.constexpr):
    """What is left at each token of the state that the walk brings, of each token's part in the next, of it in all."""
    met, written = tl.exp(sums[0] + sums[1]), tl.exp((sums[2] - sums[0]) + (sums[3] - sums[1]))
    if REVERSE:
        met, written = written, met
    return met, written, tl.exp(sums[2] + sums[3])


@triton.jit
def decay_between(sums, in_half, REVERSE: tl.constexpr):
    """exp(-|G_i - G_j|) for each two tokens of a tile, in the half where one comes before the other; else 0."""
    between = (sums[0][:, None] - sums[0][None, :]) + (sums[1][:, None] - sums[1][None, :])
    if REVERSE:
        between = -between
    return tl.exp(tl.where(in_half, between, float("-inf")))  # masked before exp: no overflow, no NaN


@triton.jit
def divisor_gradient(value, grad, log_count):
    """- sum_j log(c_j) (v'_j . dv'_j), the part of dp that these tokens give."""
    return -tl.sum(tl.sum(value * grad, 1) * log_count) * _LN_2
