"""The one-token step as one kernel: read the state, add k_hat v'^T, write it, read it out. Under `step`.

One program has a sequence, a head and a tile of the value dims. All of a step's bytes are the state, read and written
once.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (to a type checker the body of a kernel is Python)
from __future__ import annotations

import triton
import triton.language as tl

from cottention.ops.triton.tiles import exponent, inverse


@triton.jit
def _load_vector(ptr, i_b, i_h, stride_b, stride_h, stride_d, keep, d0, D, BD: tl.constexpr):
    d = d0 + tl.arange(0, BD)
    ptr += i_b * stride_b + i_h * stride_h
    return tl.load(ptr + d.to(tl.int64) * stride_d, mask=keep & (d < D), other=0.0).to(tl.float32)


@triton.jit
def _unit(x):
    return x * inverse(tl.sqrt(tl.sum(x * x, 0)))


@triton.jit
def step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    norm_const,  # [H] or None
    real_ptr,  # [B] uint8 or None
    log_decay_ptr,  # [B, H] or None
    beta_ptr,  # [B, H] or None
    rows_ptr,  # [B] int32 or int64, the row of each sequence in kv, seen and new_kv; None: its own
    kv_ptr,  # [N, H, K, V] float32
    seen_ptr,  # [N] int64, before this token
    o_ptr,  # [B, H, V]
    new_kv_ptr,  # [N, H, K, V]; may be kv_ptr
    q_b,
    q_h,
    q_d,
    k_b,
    k_h,
    k_d,
    v_b,
    v_h,
    v_d,
    decay_b,
    decay_h,
    beta_b,
    beta_h,
    num_states,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BZ: tl.constexpr,
):
    """Output and new state of one sequence and head, BZ value dims of it; a row that does not exist is padding."""
    num_tiles: tl.constexpr = (V + BZ - 1) // BZ
    pid = tl.program_id(0)
    z0 = pid % num_tiles * BZ
    i_h = (pid // num_tiles % H).to(tl.int64)
    i_b = (pid // num_tiles // H).to(tl.int64)
    row, exists, keep = i_b, True, True
    if rows_ptr is not None:
        row = tl.load(rows_ptr + i_b).to(tl.int64)
        exists = (row >= 0) & (row < num_states)
        keep = exists
    count = tl.load(seen_ptr + row, mask=exists, other=0)
    if real_ptr is not None:
        keep = exists & (tl.load(real_ptr + i_b) != 0)
        count += keep.to(tl.int64)
    else:
        count += 1
    q = _unit(_load_vector(q_ptr, i_b, i_h, q_b, q_h, q_d, keep, 0, K, BK))
    k = _unit(_load_vector(k_ptr, i_b, i_h, k_b, k_h, k_d, keep, 0, K, BK))
    value = _load_vector(v_ptr, i_b, i_h, v_b, v_h, v_d, keep, z0, V, BZ)
    value *= tl.exp2(-exponent(norm_const, i_h) * tl.log2(tl.maximum(count, 1).to(tl.float32)))
    at_k, at_z = tl.arange(0, BK), z0 + tl.arange(0, BZ)
    at = (row * H + i_h) * (K * V) + at_k[:, None] * V + at_z[None, :]
    inside = (at_k < K)[:, None] & (at_z < V)[None, :] & exists
    state = tl.load(kv_ptr + at, mask=inside, other=0.0)
    if log_decay_ptr is not None:
        log_decay = tl.load(log_decay_ptr + i_b * decay_b + i_h * decay_h, mask=keep, other=0.0)
        state *= tl.exp(log_decay.to(tl.float32))
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + i_b * beta_b + i_h * beta_h, mask=keep, other=0.0).to(tl.float32)
        value = beta * (value - tl.sum(k[:, None] * state, 0))
    state += k[:, None] * value[None, :]
    tl.store(new_kv_ptr + at, state, mask=inside)
    o = tl.sum(q[:, None] * state, 0)
    tl.store(o_ptr + (i_b * H + i_h) * V + at_z, o.to(o_ptr.dtype.element_ty), mask=at_z < V)
