"""Chunked cosine attention in PyTorch matmuls: linear time and memory, forward and backward, on any device.

Tokens are laid on a grid of chunks of C slots (`ChunkGrid`). Inside a chunk the scores are a C x C matrix; between
chunks everything goes through the K x V state, and without decay the state before a chunk is a plain prefix sum:

    S_n = S_0 + sum_{i < n} k_hat_i^T v'_i          v' = v / max(c ** p, 1)
    o_n = q_hat_n S_n + tril(q_hat_n k_hat_n^T) v'_n

Chunks are worked on a segment at a time. In a segment all chunks run at once, their prefix sum is one product with a
0/1 matrix (which also restarts it where a packed sequence begins), and one state is carried to the next segment.
Backward saves the inputs and that carried state alone and recomputes the rest segment by segment, so the extra memory
beyond inputs and gradients is one segment plus T / segment states.

    o, state = cosine_attention(q, k, v, norm_const, causal=True, implementation="chunk")
"""

from __future__ import annotations

import torch
from torch import Tensor

from cottention.ops.autocast import without_autocast
from cottention.ops.dispatch import num_saved
from cottention.ops.grid import ChunkGrid
from cottention.ops.segments import Divisor, Segments, StateScan, chunks_per_segment
from cottention.ops.state import accumulation_dtype


def cut(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    cu_seqlens: Tensor | None,
    has_states: bool,
    chunk_size: int | None,
) -> tuple[int, int]:
    """Tokens of a chunk and of a segment of chunks."""
    if chunk_size is None:
        # 64: least arithmetic per token near K = V = 64 and measured fastest from K = 32 to 128. Without the causal
        # tile only the waste of the last chunk counts, so chunks are long unless sequences are packed.
        chunk_size = 64 if causal or cu_seqlens is not None else 512
    B, _, H, K = q.shape
    return chunk_size, chunk_size * chunks_per_segment(B * H, chunk_size, K + v.shape[3], accumulation_dtype(q.dtype))


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
        segment_tokens: int,
    ) -> None:
        H, K = q.shape[2:]
        V = v.shape[3]
        self.dtype = accumulation_dtype(q.dtype)
        self.grid = ChunkGrid(q, chunk_size, cu_seqlens)
        self.segments = Segments(self.grid, self.dtype, segment_tokens // chunk_size, mask)
        count, self.total = self.grid.counts(mask, seen)
        self.divisor = Divisor(norm_const, count, self.segments)
        self.state_shape = (self.grid.num_sequences, H, K, V)
        self.carry_shape = (self.grid.num_rows, H, K, V)

    def states(self) -> Tensor:
        return torch.empty(self.state_shape, dtype=self.dtype, device=self.grid.device)


@without_autocast
def causal(
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
    segment_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o `[B, T, H, V]`, final kv and seen (empty unless asked for), and the state carried into each segment."""
    call = _Causal(q, v, norm_const, mask, cu_seqlens, seen, chunk_size, segment_tokens)
    segments, ranges = call.segments, call.segments.ranges()
    asks_states = kv is not None or output_final_state
    uses_states = asks_states or call.grid.max_chunks > 1
    num_carries = num_saved(q, cu_seqlens, segment_tokens) // max(1, call.grid.num_rows)
    carries = q.new_zeros((num_carries, *call.carry_shape), dtype=call.dtype)  # packed ones may use fewer
    scan = StateScan(call.grid, kv, call.states(), backward=False) if uses_states else None
    o = q.new_empty(*q.shape[:3], v.shape[3])
    for i, (a, b) in enumerate(ranges):
        q_hat, _ = segments.unit(q, a, b)
        k_hat, _ = segments.unit(k, a, b)
        value, _ = call.divisor.values(v, a, b)
        out = (q_hat @ k_hat.mT).tril_() @ value  # [R, H, G, C, V]
        if scan is not None:
            if num_carries:
                carries[i] = scan.carry
            out += q_hat @ scan(k_hat.mT @ value, a, b)
        segments.store(o, out, a, b)
    if scan is None or not output_final_state:
        return o, q.new_empty(0, dtype=call.dtype), call.total.new_empty(0), carries.flatten(0, 1)
    return o, scan.reached.contiguous(), call.total, carries.flatten(0, 1)


@without_autocast
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
    segment_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dm and the gradient of the initial kv (the last two empty where there is none)."""
    call = _Causal(q, v, norm_const, mask, cu_seqlens, seen, chunk_size, segment_tokens)
    segments, ranges = call.segments, call.segments.ranges()
    carries = carries.unflatten(0, (-1, call.grid.num_rows)) if len(carries) else carries
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
            if len(carries):
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
        segment_tokens: int,
    ) -> None:
        H, K = q.shape[2:]
        V = v.shape[3]
        self.dtype = accumulation_dtype(q.dtype)
        is_self_attention = q.shape[1] == k.shape[1]
        self.grid = ChunkGrid(k, chunk_size, cu_seqlens)
        self.query_grid = self.grid if is_self_attention else ChunkGrid(q, chunk_size, None)
        num_chunks = segment_tokens // chunk_size
        self.keys = Segments(self.grid, self.dtype, num_chunks, mask)
        self.queries = Segments(self.query_grid, self.dtype, num_chunks, mask if is_self_attention else None)
        _, total = self.grid.counts(mask, None)
        self.divisor = Divisor(norm_const, self.grid.total_at_each_token(total), self.keys)
        self.state_shape = (self.grid.num_sequences, H, K, V)

    def states(self) -> Tensor:
        return torch.zeros(self.state_shape, dtype=self.dtype, device=self.grid.device)


@without_autocast
def bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    segment_tokens: int,
) -> tuple[Tensor, Tensor]:
    """o `[B, T, H, V]` and each sequence's state over all its keys `[N, H, K, V]`."""
    call = _Bidirectional(q, k, v, norm_const, mask, cu_seqlens, chunk_size, segment_tokens)
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


@without_autocast
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
    segment_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dm (empty without norm_const)."""
    call = _Bidirectional(q, k, v, norm_const, mask, cu_seqlens, chunk_size, segment_tokens)
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
