"""Chunked cosine attention in PyTorch matmuls: linear time and memory, forward and backward, on any device.

Tokens are laid on a grid of chunks of C slots (`ChunkGrid`). Inside a chunk the scores are a C x C matrix; between
chunks everything goes through the K x V state, and without decay the state before a chunk is a plain prefix sum:

    S_n = S_0 + sum_{i < n} k_hat_i^T v'_i          v' = v / max(c ** p, 1)
    o_n = q_hat_n S_n + tril(q_hat_n k_hat_n^T) v'_n

Chunks are worked on a segment at a time, of as many rows of a batch as fill it; what a row gives does not depend on the
others. In a segment all chunks run at once, their prefix sum is one product with a
0/1 matrix (which also restarts it where a packed sequence begins), and one state is carried to the next segment.
Backward saves the inputs and that carried state alone and recomputes the rest segment by segment, so the extra memory
beyond inputs and gradients is one segment plus T / segment states.

    o, state = cosine_attention(q, k, v, norm_const, causal=True, implementation="chunk")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cottention.ops.autocast import without_autocast
from cottention.ops.dispatch import num_saved
from cottention.ops.gated import gated as gated
from cottention.ops.gated import gated_backward as gated_backward
from cottention.ops.grid import ChunkGrid
from cottention.ops.segments import (
    Divisor,
    Segments,
    StateScan,
    chunks_per_segment,
    norm_const_gradient,
    rows_per_segment,
)
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
    forgets: bool,
    erases: bool,
    has_backward: bool,
) -> tuple[int, int]:
    """Tokens of a chunk and of a segment of chunks; with gates a chunk (0: `gated` chooses) is all."""
    if forgets or erases:
        return chunk_size or 0, 0
    if chunk_size is None:
        # 64: least arithmetic per token near K = V = 64 and measured fastest from K = 32 to 128. Without the causal
        # tile only the waste of the last chunk counts, so chunks are long unless sequences are packed.
        chunk_size = 64 if causal or cu_seqlens is not None else 512
    # Of one row's sizes alone: how sums are cut is how they are rounded, and a row's numbers are to be its own.
    return chunk_size, chunk_size * chunks_per_segment(_chunk_bytes(q, v, chunk_size))


def _chunk_bytes(q: Tensor, v: Tensor, chunk_size: int) -> int:
    """What a chunk of one row holds at once."""
    return q.shape[2] * chunk_size * (q.shape[3] + v.shape[3]) * accumulation_dtype(q.dtype).itemsize


def _groups(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_size: int, segment_tokens: int
) -> list[slice]:
    """Rows that are worked together: as many as have a segment's bytes. All in one where sequences are packed."""
    if cu_seqlens is not None:
        return [slice(None)]
    num_chunks = min(segment_tokens // chunk_size, -(-max(q.shape[1], k.shape[1]) // chunk_size))
    step = rows_per_segment(num_chunks * _chunk_bytes(q, v, chunk_size))
    return [slice(a, a + step) for a in range(0, q.shape[0], step)]


def _of(rows: slice, *tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if x is None else x[rows] for x in tensors)


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

    def scan(self, boundary: Tensor | None, *, needed: bool, backward: bool) -> StateScan | None:
        """The states between chunks; None for sequences of one chunk, unless asked for."""
        if not needed and self.grid.max_chunks <= 1:
            return None
        states = torch.empty(self.state_shape, dtype=self.dtype, device=self.grid.device)
        return StateScan(self.grid, boundary, states, backward=backward)


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
    """o `[B, T, H, V]`, final kv and seen (empty unless asked for), and the state carried into each row's segments."""
    (B, T, H, K), V, dtype = q.shape, v.shape[3], accumulation_dtype(q.dtype)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    num_carries = num_saved(q, cu_seqlens, segment_tokens) // max(1, B)
    o = q.new_empty(B, T, H, V)
    carries = q.new_zeros((B, num_carries, H, K, V), dtype=dtype)  # packed sequences may use fewer
    final_kv = q.new_empty((N, H, K, V) if output_final_state else 0, dtype=dtype)
    final_seen = q.new_empty(N if output_final_state else 0, dtype=torch.int64)
    for rows in _groups(q, k, v, cu_seqlens, chunk_size, segment_tokens):
        own_q, own_k, own_v, own_mask, own_kv, own_seen, own_o = _of(rows, q, k, v, mask, kv, seen, o)
        call = _Causal(own_q, own_v, norm_const, own_mask, cu_seqlens, own_seen, chunk_size, segment_tokens)
        scan = call.scan(own_kv, needed=kv is not None or output_final_state, backward=False)
        segments = call.segments
        for i, (a, b) in enumerate(segments.ranges()):
            q_hat, _ = segments.unit(own_q, a, b)
            k_hat, _ = segments.unit(own_k, a, b)
            value, _ = call.divisor.values(own_v, a, b)
            out = (q_hat @ k_hat.mT).tril_() @ value  # [R, H, G, C, V]
            if scan is not None:
                carries[rows, i] = scan.carry
                out += q_hat @ scan(k_hat.mT @ value, a, b)
            segments.store(own_o, out, a, b)
        if scan is not None and output_final_state:
            final_kv[rows], final_seen[rows] = scan.reached, call.total
    return o, final_kv, final_seen, carries.flatten(0, 1)


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
    B, dtype = q.shape[0], accumulation_dtype(q.dtype)
    carries = carries.view(B, -1, *carries.shape[1:]) if len(carries) else carries
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dkv = q.new_empty(0 if kv is None else kv.shape, dtype=dtype)
    dps: list[Tensor | None] = []
    for rows in _groups(q, k, v, cu_seqlens, chunk_size, segment_tokens):
        own_q, own_k, own_v, own_mask, own_kv, own_seen = _of(rows, q, k, v, mask, kv, seen)
        own_do, own_dfinal, own_dq, own_dk, own_dv = _of(rows, do, dfinal, dq, dk, dv)
        call = _Causal(own_q, own_v, norm_const, own_mask, cu_seqlens, own_seen, chunk_size, segment_tokens)
        segments = call.segments
        needed = kv is not None or dfinal is not None
        scan = call.scan(own_kv, needed=needed, backward=False)
        dscan = call.scan(own_dfinal, needed=needed, backward=True)
        for i, (a, b) in reversed(list(enumerate(segments.ranges()))):
            q_hat, q_norm = segments.unit(own_q, a, b)
            k_hat, k_norm = segments.unit(own_k, a, b)
            value, weight = call.divisor.values(own_v, a, b)
            grad = segments.load(own_do, a, b)
            dscores = (grad @ value.mT).tril_()  # [R, H, G, C, C]
            dq_hat, dk_hat = dscores @ k_hat, dscores.mT @ q_hat
            dvalue = (q_hat @ k_hat.mT).tril_().mT @ grad
            if scan is not None and dscan is not None:
                scan.carry = carries[rows, i]
                before = scan(k_hat.mT @ value, a, b)  # [R, H, G, K, V]
                after = dscan(q_hat.mT @ grad, a, b)
                dq_hat += grad @ before.mT
                dk_hat += value @ after.mT
                dvalue += k_hat @ after
            segments.store_unit_gradient(own_dq, dq_hat, q_hat, q_norm, a, b)
            segments.store_unit_gradient(own_dk, dk_hat, k_hat, k_norm, a, b)
            call.divisor.store_value_gradient(own_dv, dvalue, value, weight, a, b)
        dps.append(call.divisor.dp)
        if dscan is not None and kv is not None:
            dkv[rows] = dscan.reached
    return dq, dk, dv, norm_const_gradient(norm_const, dps, q), dkv


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
        dtype = accumulation_dtype(q.dtype)
        is_self_attention = q.shape[1] == k.shape[1]
        self.grid = ChunkGrid(k, chunk_size, cu_seqlens)
        self.query_grid = self.grid if is_self_attention else ChunkGrid(q, chunk_size, None)
        num_chunks = segment_tokens // chunk_size
        self.keys = Segments(self.grid, dtype, num_chunks, mask)
        self.queries = Segments(self.query_grid, dtype, num_chunks, mask if is_self_attention else None)
        _, total = self.grid.counts(mask, None)
        self.divisor = Divisor(norm_const, self.grid.total_at_each_token(total), self.keys)


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
    (B, T, H, K), V = q.shape, v.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = q.new_empty(B, T, H, V)
    kv = q.new_zeros((N, H, K, V), dtype=accumulation_dtype(q.dtype))
    for rows in _groups(q, k, v, cu_seqlens, chunk_size, segment_tokens):
        own_q, own_k, own_v, own_mask, own_o, own_kv = _of(rows, q, k, v, mask, o, kv)
        call = _Bidirectional(own_q, own_k, own_v, norm_const, own_mask, cu_seqlens, chunk_size, segment_tokens)
        for a, b in call.keys.ranges():
            k_hat, _ = call.keys.unit(own_k, a, b)
            value, _ = call.divisor.values(own_v, a, b)
            call.grid.gather(own_kv, k_hat.mT @ value, a, b)
        for a, b in call.queries.ranges():
            q_hat, _ = call.queries.unit(own_q, a, b)
            call.queries.store(own_o, q_hat @ call.query_grid.spread(own_kv, a, b), a, b)
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
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dps: list[Tensor | None] = []
    for rows in _groups(q, k, v, cu_seqlens, chunk_size, segment_tokens):
        own_q, own_k, own_v, own_mask, own_kv, own_do = _of(rows, q, k, v, mask, kv, do)
        own_dq, own_dk, own_dv = _of(rows, dq, dk, dv)
        call = _Bidirectional(own_q, own_k, own_v, norm_const, own_mask, cu_seqlens, chunk_size, segment_tokens)
        dkv = torch.zeros_like(own_kv)
        for a, b in call.queries.ranges():
            q_hat, q_norm = call.queries.unit(own_q, a, b)
            grad = call.queries.load(own_do, a, b)
            call.query_grid.gather(dkv, q_hat.mT @ grad, a, b)
            # contiguous: a product with a transposed view of one matrix is rounded unlike that of several
            dq_hat = grad @ call.query_grid.spread(own_kv, a, b).mT.contiguous()
            call.queries.store_unit_gradient(own_dq, dq_hat, q_hat, q_norm, a, b)
        for a, b in call.keys.ranges():
            k_hat, k_norm = call.keys.unit(own_k, a, b)
            value, weight = call.divisor.values(own_v, a, b)
            after = call.grid.spread(dkv, a, b)
            call.keys.store_unit_gradient(own_dk, value @ after.mT.contiguous(), k_hat, k_norm, a, b)
            call.divisor.store_value_gradient(own_dv, k_hat @ after, value, weight, a, b)
        dps.append(call.divisor.dp)
    return dq, dk, dv, norm_const_gradient(norm_const, dps, q)
