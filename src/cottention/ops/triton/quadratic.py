"""The quadratic form for short sequences: a block of rows against all others, without a state, in one launch.

Below some hundred tokens this is less arithmetic than states are, and more blocks run at once. The sums are those of
`roles`; a program has one block of BT rows x, one head and a tile of z's dimensions, and walks over the rows y and z.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (to a type checker the body of a kernel is Python)
from __future__ import annotations

import triton
import triton.language as tl

from cottention.ops.triton.roles import DK, DQ, DV, O, finish, left_rows, right_rows
from cottention.ops.triton.tiles import exponent, log2_count, product, segment_of, store_rows, tokens


@triton.jit
def _attend(
    q,  # operands: (pointer to the row and head, stride of tokens, stride of dimensions)
    k,
    v,
    do,
    out_ptr,
    dp_ptr,
    p,
    counts,
    real_left,
    real_right,
    q_norm,
    k_norm,
    where,
    whole,  # first token and end of the sequence of the rows y and z
    i_tile,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BZ: tl.constexpr,
    BT: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_M: tl.constexpr,
    ROLE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    OF_KEYS: tl.constexpr = ROLE == DK or ROLE == DV
    Z: tl.constexpr = V if ROLE == O or ROLE == DV else K
    z0 = i_tile * BZ
    t, inside, real = tokens(where[4], where[5], real_left, BT)
    log_count = tl.zeros([BT], tl.float32)
    if HAS_M and OF_KEYS:
        log_count = log2_count(t, inside, where, counts, CAUSAL)
    weight = tl.exp2(-p * log_count)
    x, left = left_rows(q, k, v, do, t, real, weight, K, V, BK, BV, ROLE, DOT)
    begin, end = whole[0], whole[1]
    if CAUSAL:
        if OF_KEYS:
            begin = where[4]
        else:
            end = where[5]
    acc = tl.zeros([BT, BZ], tl.float32)
    for j in range(tl.cdiv(end - begin, BT)):
        t_right, inside_right, real_right_rows = tokens(begin + j * BT, end, real_right, BT)
        log_right = tl.zeros([BT], tl.float32)
        if HAS_M and not OF_KEYS:
            log_right = log2_count(t_right, inside_right, (0, where[1], whole[0], whole[1]), counts, CAUSAL)
        y, z, right = right_rows(
            q, k, v, do, t_right, real_right_rows, tl.exp2(-p * log_right), q_norm, k_norm, H, z0, K, V, BK, BV, BZ,
            ROLE, DOT,
        )  # fmt: skip
        scores = product(x, tl.trans(y), PRECISION) * right[None, :]
        if CAUSAL:
            if OF_KEYS:
                scores = tl.where(t[:, None] <= t_right[None, :], scores, 0.0)
            else:
                scores = tl.where(t[:, None] >= t_right[None, :], scores, 0.0)
        acc = tl.dot(scores.to(DOT), z, acc, input_precision=PRECISION)
    acc, dp = finish(acc * left[:, None], q, k, v, t, real, weight, log_count, q_norm, z0, K, V, BZ, HAS_M, ROLE)
    store_rows(out_ptr, acc, t, inside, H * Z, z0, Z, BZ)
    if ROLE == DV and dp_ptr is not None:
        tl.store(dp_ptr, dp)


@triton.jit
def quadratic_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    o_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dp_ptr,  # [blocks, tiles, H] float32 or None
    norm_const,  # [H] or None
    real_q,  # [B, T] uint8 or None
    real_k,  # [B, S] uint8 or None
    count_ptr,  # [B, S] int32 or None
    total_ptr,  # [N] int64 or None
    table,
    q_norm,  # [B, T, H] float32, or None where a program has all of K
    k_norm,
    q_b,
    q_t,
    q_h,
    q_d,
    k_b,
    k_t,
    k_h,
    k_d,
    v_b,
    v_t,
    v_h,
    v_d,
    do_b,
    do_t,
    do_h,
    do_d,
    num_queries,
    num_keys,
    blocks_each,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BZ: tl.constexpr,
    BT: tl.constexpr,
    CAUSAL: tl.constexpr,
    FIRST_ROLE: tl.constexpr,
    NUM_ROLES: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block, head and tile of the output (FIRST_ROLE O) or of the gradients (DQ)."""
    HAS_M: tl.constexpr = norm_const is not None
    LONGEST: tl.constexpr = V if FIRST_ROLE == O else (K if K > V else V)
    num_tiles: tl.constexpr = (LONGEST + BZ - 1) // BZ
    v_tiles: tl.constexpr = (V + BZ - 1) // BZ
    pid = tl.program_id(0)
    role = FIRST_ROLE + pid % NUM_ROLES
    i_tile = pid // NUM_ROLES % num_tiles
    i_h = pid // (NUM_ROLES * num_tiles) % H
    i_block = pid // (NUM_ROLES * num_tiles) // H
    # blocks_each is enough for the longer of queries and keys; a block beyond the end of the shorter is empty
    of_q = segment_of(i_block, table, num_queries, BT, blocks_each)
    of_k = segment_of(i_block, table, num_keys, BT, blocks_each)
    i_b, head = of_q[0].to(tl.int64), i_h.to(tl.int64)
    q = (q_ptr + i_b * q_b + head * q_h, q_t, q_d)
    k = (k_ptr + i_b * k_b + head * k_h, k_t, k_d)
    v = (v_ptr + i_b * v_b + head * v_h, v_t, v_d)
    do = q
    if do_ptr is not None:
        do = (do_ptr + i_b * do_b + head * do_h, do_t, do_d)
    row_q, row_k = i_b * num_queries, i_b * num_keys
    if real_q is not None:
        real_q += row_q
    if real_k is not None:
        real_k += row_k
    if count_ptr is not None:
        count_ptr += row_k
    counts = (count_ptr, total_ptr, None)
    p = exponent(norm_const, i_h)
    row_q, row_k = row_q * H + i_h, row_k * H + i_h
    if q_norm is not None:
        q_norm += row_q
        k_norm += row_k
    whole_q, whole_k = (of_q[2], of_q[3]), (of_k[2], of_k[3])
    if FIRST_ROLE == O:
        _attend(
            q, k, v, do, o_ptr + row_q * V, dp_ptr, p, counts, real_q, real_k, q_norm, k_norm, of_q, whole_k, i_tile,
            H, K, V, BK, BV, BZ, BT, CAUSAL, HAS_M, O, DOT, PRECISION,
        )  # fmt: skip
    else:
        if (role == DQ) & (i_tile * BZ < K):
            _attend(
                q, k, v, do, dq_ptr + row_q * K, dp_ptr, p, counts, real_q, real_k, q_norm, k_norm, of_q, whole_k,
                i_tile, H, K, V, BK, BV, BZ, BT, CAUSAL, HAS_M, DQ, DOT, PRECISION,
            )  # fmt: skip
        if (role == DK) & (i_tile * BZ < K):
            _attend(
                q, k, v, do, dk_ptr + row_k * K, dp_ptr, p, counts, real_k, real_q, q_norm, k_norm, of_k, whole_q,
                i_tile, H, K, V, BK, BV, BZ, BT, CAUSAL, HAS_M, DK, DOT, PRECISION,
            )  # fmt: skip
        if (role == DV) & (i_tile * BZ < V):
            if dp_ptr is not None:
                dp_ptr += (i_block.to(tl.int64) * v_tiles + i_tile) * H + i_h
            _attend(
                q, k, v, do, dv_ptr + row_k * V, dp_ptr, p, counts, real_k, real_q, q_norm, k_norm, of_k, whole_q,
                i_tile, H, K, V, BK, BV, BZ, BT, CAUSAL, HAS_M, DV, DOT, PRECISION,
            )  # fmt: skip
