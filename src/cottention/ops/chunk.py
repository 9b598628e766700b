"""Chunked cosine attention in PyTorch matmuls: linear time and memory, forward and backward, on any device.

Tokens are laid on a grid of chunks of C slots (`ChunkGrid`). Inside a chunk the scores are a C x C matrix; between
chunks everything goes through the K x V state, and without decay the state before a chunk is a plain prefix sum:

    S_n = S_0 + sum_{i < n} k_hat_i^T v'_i          v' = v / max(c ** p, 1)
    o_n = q_hat_n S_n + tril(q_hat_n k_hat_n^T) v'_n

Chunks are worked on a segment at a time. In a segment all chunks run at once, their prefix sum is one product with a
0/1 matrix (which also restarts it where a packed sequence begins), and one state is carried to the next segment.
Backward saves the inputs and that carried state alone and recomputes the rest segment by segment, so the extra memory
beyond inputs and gradients is one segment plus T / segment states.

    o, state = chunk_cosine_attention(q, k, v, norm_const, causal=True)
"""

from __future__ import annotations

import torch
from torch import Tensor

from cottention.ops.grid import ChunkGrid
from cottention.ops.segments import Divisor, Segments, StateScan, chunks_per_segment
from cottention.ops.state import CosineState, accumulation_dtype


def chunk_cosine_attention(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, S, H, K]
    v: Tensor,  # [B, S, H, V]
    norm_const: Tensor | None,  # [H]
    *,
    causal: bool,
    attention_mask: Tensor | None = None,  # [B, S] bool
    cu_seqlens: Tensor | None = None,  # [N+1]
    initial_state: CosineState | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, CosineState | None]:
    """Same numbers as `naive_cosine_attention`, in linear time and memory. See `cosine_attention` for the arguments."""
    if chunk_size is None:
        # 64: least arithmetic per token near K = V = 64 and measured fastest from K = 32 to 128. Without the causal
        # tile only the waste of the last chunk counts, so chunks are long unless sequences are packed.
        chunk_size = 64 if causal or cu_seqlens is not None else 512
    if not causal:
        o, _ = torch.ops.cottention.chunk_bidirectional(q, k, v, norm_const, attention_mask, cu_seqlens, chunk_size)
        return o, None
    kv, seen = (None, None) if initial_state is None else initial_state
    o, final_kv, final_seen, _ = torch.ops.cottention.chunk_causal(
        q, k, v, norm_const, attention_mask, cu_seqlens, kv, seen, output_final_state, chunk_size
    )
    return o, CosineState(final_kv, final_seen) if output_final_state else None


class _Causal:
    """What forward and backward of one causal call both need."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        norm_const: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        seen: Tensor | None,
        chunk_size: int,
    ) -> None:
        H, K = q.shape[2:]
        V = v.shape[3]
        self.dtype = accumulation_dtype(q.dtype)
        self.grid = ChunkGrid(q, chunk_size, cu_seqlens)
        self.segments = Segments(self.grid, self.dtype, H, K + V, mask)
        count, self.total = self.grid.counts(mask, seen)
        self.divisor = Divisor(norm_const, count, self.segments)
        self.state_shape = (self.grid.num_sequences, H, K, V)
        self.carry_shape = (self.grid.num_rows, H, K, V)

    def states(self) -> Tensor:
        return torch.empty(self.state_shape, dtype=self.dtype, device=self.grid.device)


def num_carries(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, uses_states: bool, chunk_size: int) -> int:
    """Carried states that `causal_forward` returns, one a segment at most: from shapes alone, for tracing."""
    B, T, H, K = q.shape
    num_chunks = -(-T // chunk_size)
    if cu_seqlens is not None:
        num_chunks += cu_seqlens.shape[0] - 1  # each sequence may end in a chunk that is not full
    elif not uses_states and num_chunks <= 1:
        return 0
    step = chunks_per_segment(B * H, chunk_size, K + v.shape[3], accumulation_dtype(q.dtype))
    return -(-num_chunks // step)


def causal_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kv: Tensor | None,
    seen: Tensor | None,
    output_final_state: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o `[B, T, H, V]`, final kv and seen (empty unless asked for), and the state carried into each segment."""
    call = _Causal(q, v, norm_const, mask, cu_seqlens, seen, chunk_size)
    segments, ranges = call.segments, call.segments.ranges()
    asks_states = kv is not None or output_final_state
    uses_states = asks_states or call.grid.max_chunks > 1
    carries_shape = (num_carries(q, v, cu_seqlens, asks_states, chunk_size), *call.carry_shape)
    carries = q.new_empty(carries_shape, dtype=call.dtype)
    scan = StateScan(call.grid, kv, call.states(), backward=False) if uses_states else None
    o = q.new_empty(*q.shape[:3], v.shape[3])
    for i, (a, b) in enumerate(ranges):
        q_hat, _ = segments.unit(q, a, b)
        k_hat, _ = segments.unit(k, a, b)
        value, _ = call.divisor.values(v, a, b)
        out = (q_hat @ k_hat.mT).tril_() @ value  # [R, H, G, C, V]
        if scan is not None:
            carries[i] = scan.carry
            out += q_hat @ scan(k_hat.mT @ value, a, b)
        segments.store(o, out, a, b)
    if scan is None or not output_final_state:
        return o, q.new_empty(0, dtype=call.dtype), call.total.new_empty(0), carries
    return o, scan.reached.contiguous(), call.total, carries


def causal_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kv: Tensor | None,
    seen: Tensor | None,
    carries: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dm and the gradient of the initial kv (the last two empty where there is none)."""
    call = _Causal(q, v, norm_const, mask, cu_seqlens, seen, chunk_size)
    segments, ranges = call.segments, call.segments.ranges()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    uses_states = kv is not None or dfinal is not None or call.grid.max_chunks > 1
    scan = StateScan(call.grid, kv, call.states(), backward=False) if uses_states else None
    dscan = StateScan(call.grid, dfinal, call.states(), backward=True) if uses_states else None
    for i, (a, b) in reversed(list(enumerate(ranges))):
        q_hat, q_norm = segments.unit(q, a, b)
        k_hat, k_norm = segments.unit(k, a, b)
        value, weight = call.divisor.values(v, a, b)
        grad = segments.load(do, a, b)
        dscores = (grad @ value.mT).tril_()  # [R, H, G, C, C]
        dq_hat, dk_hat = dscores @ k_hat, dscores.mT @ q_hat
        dvalue = (q_hat @ k_hat.mT).tril_().mT @ grad
        if scan is not None and dscan is not None:
            scan.carry = carries[i]
            before = scan(k_hat.mT @ value, a, b)  # [R, H, G, K, V]
            after = dscan(q_hat.mT @ grad, a, b)
            dq_hat += grad @ before.mT
            dk_hat += value @ after.mT
            dvalue += k_hat @ after
        segments.store_unit_gradient(dq, dq_hat, q_hat, q_norm, a, b)
        segments.store_unit_gradient(dk, dk_hat, k_hat, k_norm, a, b)
        call.divisor.store_value_gradient(dv, dvalue, value, weight, a, b)
    dkv = dscan.reached.contiguous() if dscan is not None and kv is not None else q.new_empty(0, dtype=call.dtype)
    return dq, dk, dv, call.divisor.gradient(), dkv


class _Bidirectional:
    """What forward and backward of one bidirectional call both need. Queries and keys may differ in number."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norm_const: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_size: int,
    ) -> None:
        H, K = q.shape[2:]
        V = v.shape[3]
        self.dtype = accumulation_dtype(q.dtype)
        is_self_attention = q.shape[1] == k.shape[1]
        self.grid = ChunkGrid(k, chunk_size, cu_seqlens)
        self.query_grid = self.grid if is_self_attention else ChunkGrid(q, chunk_size, None)
        self.keys = Segments(self.grid, self.dtype, H, K + V, mask)
        self.queries = Segments(self.query_grid, self.dtype, H, K + V, mask if is_self_attention else None)
        _, total = self.grid.counts(mask, None)
        self.divisor = Divisor(norm_const, self.grid.total_at_each_token(total), self.keys)
        self.state_shape = (self.grid.num_sequences, H, K, V)

    def states(self) -> Tensor:
        return torch.zeros(self.state_shape, dtype=self.dtype, device=self.grid.device)


def bidirectional_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """o `[B, T, H, V]` and each sequence's state over all its keys `[N, H, K, V]`."""
    call = _Bidirectional(q, k, v, norm_const, mask, cu_seqlens, chunk_size)
    kv = call.states()
    for a, b in call.keys.ranges():
        k_hat, _ = call.keys.unit(k, a, b)
        value, _ = call.divisor.values(v, a, b)
        call.grid.gather(kv, k_hat.mT @ value, a, b)
    o = q.new_empty(*q.shape[:3], v.shape[3])
    for a, b in call.queries.ranges():
        q_hat, _ = call.queries.unit(q, a, b)
        call.queries.store(o, q_hat @ call.query_grid.spread(kv, a, b), a, b)
    return o, kv


def bidirectional_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kv: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dm (empty without norm_const)."""
    call = _Bidirectional(q, k, v, norm_const, mask, cu_seqlens, chunk_size)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dkv = call.states()
    for a, b in call.queries.ranges():
        q_hat, q_norm = call.queries.unit(q, a, b)
        grad = call.queries.load(do, a, b)
        call.query_grid.gather(dkv, q_hat.mT @ grad, a, b)
        dq_hat = grad @ call.query_grid.spread(kv, a, b).mT
        call.queries.store_unit_gradient(dq, dq_hat, q_hat, q_norm, a, b)
    for a, b in call.keys.ranges():
        k_hat, k_norm = call.keys.unit(k, a, b)
        value, weight = call.divisor.values(v, a, b)
        after = call.grid.spread(dkv, a, b)
        call.keys.store_unit_gradient(dk, value @ after.mT, k_hat, k_norm, a, b)
        call.divisor.store_value_gradient(dv, k_hat @ after, value, weight, a, b)
    return dq, dk, dv, call.divisor.gradient()
