"""Kernels of the linear form: segment states, their prefix sum, and one pass that carries the state in registers.

The sums of `roles` are cut at chunks of BT tokens; what lies before the chunk (for DK and DV: after it) is a state,

    out_t = l_t (x_t W + sum_{j in t's chunk} (x_t . y_j) r_j z_j)      W = W_0 + sum_{j in chunks before} y_j^T r_j z_j

and W_0, the state at the rim of a segment of many chunks, is a prefix sum over segments. A program has one segment, one
head and a tile of BZ of z's dimensions. The programs of a backward segment that differ in role are neighbours in the
grid: they read the same rows at about the same time, from the cache. Bidirectional attention is the first term alone,
with W the sum over the whole sequence.

With log_decay each term has a weight exp(-|G_t - G_j|), G its running sum: inside a chunk as it is, else as factors of
what a chunk reads of W, of what it leaves there and of what it writes; segments give pairs (decay, state) to the scan.
Bidirectional attention is then two walks, the second one OPPOSITE, without the diagonal, which adds to what is written.
"""

# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (to a type checker the body of a kernel is Python)
from __future__ import annotations

import triton
import triton.language as tl

from cottention.ops.triton.roles import DK, DQ, DV, O, finish, left_rows, right_rows, stored_or_own
from cottention.ops.triton.tiles import (
    decay_between,
    decay_factors,
    decay_sums,
    exponent,
    inverse,
    load_rows,
    log2_count,
    product,
    row_norms,
    segment_of,
    store_rows,
    tokens,
    unit_gradient,
)


@triton.jit
def state_kernel(
    y_ptr,
    z_ptr,
    states,  # [segments, H, K, V] float32
    norm_const,
    real_ptr,
    count_ptr,
    total_ptr,
    seen_ptr,
    table,
    log_decay,  # [B, T, H] or None
    decays,  # [segments, H] float32 or None: what each segment leaves of a state
    y_b,
    y_t,
    y_h,
    y_d,
    z_b,
    z_t,
    z_h,
    z_d,
    decay_b,
    decay_t,
    decay_h,
    num_tokens,
    segment_tokens,
    segments_each,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BZ: tl.constexpr,
    BT: tl.constexpr,
    CAUSAL: tl.constexpr,
    OF_GRADIENT: tl.constexpr,
    REVERSE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state of one segment and head: sum of k_hat^T v', or of q_hat^T do for the gradient of the states.

    With log_decay as it is left at the segment's end, or REVERSE at its start.
    """
    HAS_DECAY: tl.constexpr = log_decay is not None
    num_tiles: tl.constexpr = (V + BZ - 1) // BZ
    pid = tl.program_id(0)
    z0 = (pid % num_tiles) * BZ
    i_h = pid // num_tiles % H
    i_segment = pid // num_tiles // H
    where = segment_of(i_segment, table, num_tokens, segment_tokens, segments_each)
    start, end, row = where[4], where[5], where[0].to(tl.int64)
    y_rows = (y_ptr + row * y_b + i_h.to(tl.int64) * y_h, y_t, y_d)
    z_rows = (z_ptr + row * z_b + i_h.to(tl.int64) * z_h, z_t, z_d)
    if real_ptr is not None:
        real_ptr += row * num_tokens
    if count_ptr is not None:
        count_ptr += row * num_tokens
    p = exponent(norm_const, i_h)
    if HAS_DECAY:
        decay = (log_decay + row * decay_b + i_h.to(tl.int64) * decay_h, decay_t)
        left = 1.0
    state = tl.zeros([BK, BZ], tl.float32)
    num_chunks = tl.cdiv(end - start, BT)
    for i in range(num_chunks):
        t0 = start + i * BT
        if REVERSE:
            t0 = start + (num_chunks - 1 - i) * BT
        t, inside, real = tokens(t0, end, real_ptr, BT)
        y = load_rows(y_rows, t, real, 0, K, BK, DOT)
        z = load_rows(z_rows, t, real, z0, V, BZ, DOT)
        factor = inverse(row_norms(y))
        if not OF_GRADIENT and norm_const is not None:
            log_count = log2_count(t, inside, where, (count_ptr, total_ptr, seen_ptr), CAUSAL)
            factor = factor * tl.exp2(-p * log_count)
        if HAS_DECAY:
            _, written, whole = decay_factors(decay_sums(decay, t, real), REVERSE)
            factor = factor * written
            state = state * whole
            left = left * whole
        state = tl.dot(tl.trans(y), (z * factor[:, None]).to(DOT), state, input_precision=PRECISION)
    at_k, at_z = tl.arange(0, BK), z0 + tl.arange(0, BZ)
    if HAS_DECAY:
        tl.store(decays + i_segment.to(tl.int64) * H + i_h, left)
    states += (i_segment.to(tl.int64) * H + i_h) * (K * V)
    tl.store(states + at_k[:, None] * V + at_z[None, :], state, mask=(at_k < K)[:, None] & (at_z < V)[None, :])


@triton.jit
def scan_kernel(
    states,  # [segments, H, size] float32
    decays,  # [segments, H] float32 or None: nothing is forgotten
    initial,  # [N, H, size] float32 or None
    total,  # [N, H, size] float32 or None
    first_segment,  # [N+1] int32 or None
    segments_each,
    H,
    size,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
):
    """Replace the states of a sequence's segments by the sum before each (REVERSE: after), and give the whole sum.

    With decays, what came before a segment is left in that part in the sum after it.
    """
    pid = tl.program_id(0)
    num_blocks = tl.cdiv(size, BLOCK)
    i_h = pid // num_blocks % H
    sequence = pid // num_blocks // H
    at = pid % num_blocks * BLOCK + tl.arange(0, BLOCK)
    if first_segment is not None:
        begin, end = tl.load(first_segment + sequence), tl.load(first_segment + sequence + 1)
    else:
        begin, end = sequence * segments_each, (sequence + 1) * segments_each
    own = (sequence.to(tl.int64) * H + i_h) * size
    running = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        running = tl.load(initial + own + at, mask=at < size, other=0.0)
    for i in range(end - begin):
        i_segment = begin + i
        if REVERSE:
            i_segment = end - 1 - i
        p = states + (i_segment.to(tl.int64) * H + i_h) * size + at
        state = tl.load(p, mask=at < size, other=0.0)
        if EXCLUSIVE:
            tl.store(p, running, mask=at < size)
        if decays is not None:
            running *= tl.load(decays + i_segment.to(tl.int64) * H + i_h)
        running += state
    if total is not None:
        tl.store(total + own + at, running, mask=at < size)


@triton.jit
def _flow_of_queries(acc, weights, z, q, q_norm, t, real, H, z0, K, BZ: tl.constexpr, PRECISION: tl.constexpr):
    """q_hat . dq_hat of each token, less the same products as they fall to the keys of the chunk.

    weights: [BT, BT] those of the keys z in acc, as they were multiplied: rounded alike, they cancel.
    """
    x = load_rows(q, t, real, z0, K, BZ, z.dtype)
    unit = inverse(stored_or_own(q_norm, t, real, H, x))
    pairs = weights.to(tl.float32) * product(x, tl.trans(z), PRECISION) * unit[:, None]
    return tl.sum(acc * x, 1) * unit - tl.sum(pairs, 0)


@triton.jit
def _attend(
    q,  # operands: (pointer to the row and head, stride of tokens, stride of dimensions)
    k,
    v,
    do,
    out_ptr,
    dp_ptr,
    flow_ptr,
    states,
    reached,
    p,
    decay,  # operand of log_decay
    counts,
    real_ptr,
    q_norm,
    k_norm,
    where,
    i_segment,
    i_h,
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
    HAS_DECAY: tl.constexpr,
    OPPOSITE: tl.constexpr,
    ROLE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    OF_VALUES: tl.constexpr = ROLE == O or ROLE == DV
    OF_KEYS: tl.constexpr = ROLE == DK or ROLE == DV
    REVERSE: tl.constexpr = OF_KEYS != OPPOSITE
    WALKS: tl.constexpr = CAUSAL or HAS_DECAY
    Z: tl.constexpr = V if OF_VALUES else K
    X: tl.constexpr = K if OF_VALUES else V
    BX: tl.constexpr = BK if OF_VALUES else BV
    start, end = where[4], where[5]
    z0 = i_tile * BZ
    at_x, at_z = tl.arange(0, BX), z0 + tl.arange(0, BZ)
    in_state = (at_x < X)[:, None] & (at_z < Z)[None, :]
    if OF_VALUES:
        at_state = at_x[:, None] * V + at_z[None, :]
    else:
        at_state = at_z[None, :] * V + at_x[:, None]
    if states is not None:
        i_state = i_segment if WALKS else where[1]
        states += (i_state.to(tl.int64) * H + i_h) * (K * V)
        w = tl.load(states + at_state, mask=in_state, other=0.0)
    else:
        w = tl.zeros([BX, BZ], tl.float32)
    at_t = tl.arange(0, BT)
    if REVERSE:
        in_half = at_t[:, None] <= at_t[None, :]
    else:
        in_half = at_t[:, None] >= at_t[None, :]
    if OPPOSITE:
        in_half = in_half & (at_t[:, None] != at_t[None, :])
    dp = 0.0
    num_chunks = tl.cdiv(end - start, BT)
    for i in range(num_chunks):
        t0 = start + i * BT
        if REVERSE:
            t0 = start + (num_chunks - 1 - i) * BT
        t, inside, real = tokens(t0, end, real_ptr, BT)
        log_count = tl.zeros([BT], tl.float32)
        if HAS_M and (WALKS or OF_KEYS):
            log_count = log2_count(t, inside, where, counts, CAUSAL)
        weight = tl.exp2(-p * log_count)
        x, left = left_rows(q, k, v, do, t, real, weight, K, V, BK, BV, ROLE, DOT)
        if not WALKS:
            acc = product(x, w.to(DOT), PRECISION)
        else:
            y, z, right = right_rows(q, k, v, do, t, real, weight, q_norm, k_norm, H, z0, K, V, BK, BV, BZ, ROLE, DOT)
            scores = product(x, tl.trans(y), PRECISION) * right[None, :]
            if HAS_DECAY:
                sums = decay_sums(decay, t, real)
                scores = scores * decay_between(sums, in_half, REVERSE)
            scores = tl.where(in_half, scores, 0.0)
            acc = tl.dot(scores.to(DOT), z, input_precision=PRECISION)
            if HAS_DECAY:
                met, written, whole = decay_factors(sums, REVERSE)
                right = right * written
                from_state = product(x, w.to(DOT), PRECISION) * met[:, None]
                acc += from_state
                if ROLE == DQ:
                    flow = _flow_of_queries(acc, scores.to(DOT), z, q, q_norm, t, real, H, z0, K, BZ, PRECISION)
                if ROLE == DV:
                    flow = tl.sum(from_state * load_rows(v, t, real, z0, V, BZ, tl.float32), 1) * left * weight
                if ROLE == DQ or ROLE == DV:
                    tl.store(flow_ptr + t.to(tl.int64) * H, flow, mask=inside)
                w = w * whole
            else:
                acc += product(x, w.to(DOT), PRECISION)
            w = tl.dot(tl.trans(y), (z * right[:, None]).to(DOT), w, input_precision=PRECISION)
        acc = acc * left[:, None]
        acc, dp_here = finish(acc, q, k, v, t, real, weight, log_count, q_norm, z0, K, V, BZ, HAS_M, ROLE)
        dp += dp_here
        if OPPOSITE:
            acc += load_rows((out_ptr, H * Z, 1), t, inside, z0, Z, BZ, tl.float32)
        store_rows(out_ptr, acc, t, inside, H * Z, z0, Z, BZ)
    if CAUSAL and reached is not None:
        reached += (where[1].to(tl.int64) * H + i_h) * (K * V)
        tl.store(reached + at_state, w, mask=in_state)
    if ROLE == DV and dp_ptr is not None:
        tl.store(dp_ptr, dp)


@triton.jit
def linear_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    o_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dp_ptr,  # [segments, tiles, H] float32 or None
    states,  # [segments, H, K, V] float32 (bidirectional: [N, ...]) or None: all zero
    dstates,  # the same, of the gradient
    reached,  # [N, H, K, V] float32 or None
    norm_const,  # [H] or None
    real_ptr,  # [B, T] uint8 or None, of the same tokens as num_tokens
    count_ptr,  # [B, T] int32 or None
    total_ptr,  # [N] int64 or None
    seen_ptr,  # [N] int64 or None
    table,
    q_norm,  # [B, T, H] float32, or None where a program has all of K
    k_norm,
    log_decay,  # [B, T, H] or None
    flow_ptr,  # [tiles of DQ, then of DV, B, T, H] float32, or None: see `decayed`
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
    decay_b,
    decay_t,
    decay_h,
    flow_tile,
    num_tokens,  # of queries for O and DQ, of keys for DK and DV; causal: the same
    segment_tokens,
    segments_each,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BZ: tl.constexpr,
    BT: tl.constexpr,
    CAUSAL: tl.constexpr,
    OPPOSITE: tl.constexpr,
    FIRST_ROLE: tl.constexpr,
    NUM_ROLES: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One segment, head and tile of the output (roles from O) or of gradients (from DQ, from DK)."""
    HAS_M: tl.constexpr = norm_const is not None
    HAS_DECAY: tl.constexpr = log_decay is not None
    LONGEST: tl.constexpr = V if FIRST_ROLE == O else (K if NUM_ROLES == 1 else (K if K > V else V))
    num_tiles: tl.constexpr = (LONGEST + BZ - 1) // BZ
    k_tiles: tl.constexpr = (K + BZ - 1) // BZ
    v_tiles: tl.constexpr = (V + BZ - 1) // BZ
    pid = tl.program_id(0)
    role = FIRST_ROLE + pid % NUM_ROLES
    i_tile = pid // NUM_ROLES % num_tiles
    i_h = pid // (NUM_ROLES * num_tiles) % H
    i_segment = pid // (NUM_ROLES * num_tiles) // H
    where = segment_of(i_segment, table, num_tokens, segment_tokens, segments_each)
    i_b, head = where[0].to(tl.int64), i_h.to(tl.int64)
    q = (q_ptr + i_b * q_b + head * q_h, q_t, q_d)
    k = (k_ptr + i_b * k_b + head * k_h, k_t, k_d)
    v = (v_ptr + i_b * v_b + head * v_h, v_t, v_d)
    do = q
    if do_ptr is not None:
        do = (do_ptr + i_b * do_b + head * do_h, do_t, do_d)
    row = i_b * num_tokens
    if real_ptr is not None:
        real_ptr += row
    if count_ptr is not None:
        count_ptr += row
    counts = (count_ptr, total_ptr, seen_ptr)
    p = exponent(norm_const, i_h)
    row = row * H + i_h
    if q_norm is not None:
        q_norm += row
        k_norm += row
    decay = (0, 0)
    if HAS_DECAY:
        decay = (log_decay + i_b * decay_b + head * decay_h, decay_t)
    flow_q, flow_v = flow_ptr, flow_ptr
    if flow_ptr is not None:
        flow_q += i_tile.to(tl.int64) * flow_tile + row
        flow_v += (k_tiles + i_tile).to(tl.int64) * flow_tile + row
    # One call for each role, so that each is compiled knowing its own.
    if FIRST_ROLE == O:
        _attend(
            q, k, v, do, o_ptr + row * V, dp_ptr, None, states, reached, p, decay, counts, real_ptr, q_norm, k_norm,
            where, i_segment, i_h, i_tile, H, K, V, BK, BV, BZ, BT, CAUSAL, HAS_M, HAS_DECAY, OPPOSITE, O,
            DOT, PRECISION,
        )  # fmt: skip
    if FIRST_ROLE == DQ:
        if (role == DQ) & (i_tile * BZ < K):
            _attend(
                q, k, v, do, dq_ptr + row * K, dp_ptr, flow_q, states, None, p, decay, counts, real_ptr, q_norm, k_norm,
                where, i_segment, i_h, i_tile, H, K, V, BK, BV, BZ, BT, CAUSAL, HAS_M, HAS_DECAY, OPPOSITE, DQ,
                DOT, PRECISION,
            )  # fmt: skip
    if FIRST_ROLE + NUM_ROLES > DV:
        if (role == DK) & (i_tile * BZ < K):
            _attend(
                q, k, v, do, dk_ptr + row * K, dp_ptr, None, dstates, None, p, decay, counts, real_ptr, q_norm, k_norm,
                where, i_segment, i_h, i_tile, H, K, V, BK, BV, BZ, BT, CAUSAL, HAS_M, HAS_DECAY, OPPOSITE, DK,
                DOT, PRECISION,
            )  # fmt: skip
        if (role == DV) & (i_tile * BZ < V):
            if dp_ptr is not None:
                dp_ptr += (i_segment.to(tl.int64) * v_tiles + i_tile) * H + i_h
            _attend(
                q, k, v, do, dv_ptr + row * V, dp_ptr, flow_v, dstates, reached, p, decay, counts, real_ptr, q_norm,
                k_norm, where, i_segment, i_h, i_tile, H, K, V, BK, BV, BZ, BT, CAUSAL, HAS_M, HAS_DECAY, OPPOSITE, DV,
                DOT, PRECISION,
            )  # fmt: skip


@triton.jit
def unit_gradient_kernel(
    x_ptr,
    grad_ptr,  # [B, T, H, K] float32
    out_ptr,  # [B, T, H, K]
    real_ptr,
    x_b,
    x_t,
    x_h,
    x_d,
    num_tokens,
    H,
    K: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    """The gradient of x from that of its unit vectors, where the programs before had part of K each."""
    num_blocks = tl.cdiv(num_tokens, BT)
    pid = tl.program_id(0)
    i_h = pid % H
    i_b = (pid // H // num_blocks).to(tl.int64)
    if real_ptr is not None:
        real_ptr += i_b * num_tokens
    t, inside, real = tokens(pid // H % num_blocks * BT, num_tokens, real_ptr, BT)
    row = (i_b * num_tokens * H + i_h) * K
    grad = load_rows((grad_ptr + row, H * K, 1), t, real, 0, K, BK, tl.float32)
    x = load_rows((x_ptr + i_b * x_b + i_h.to(tl.int64) * x_h, x_t, x_d), t, real, 0, K, BK, tl.float32)
    store_rows(out_ptr + row, unit_gradient(grad, x), t, inside, H * K, 0, K, BK)
