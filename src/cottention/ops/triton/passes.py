"""Forward and backward as sequences of launches: which kernels run, in which order, on which buffers.

o, final_kv, final_seen, states = causal(q, k, v, m, mask, cu_seqlens, kv, seen, True, 0, 512)
"""

from __future__ import annotations

import torch
from torch import Tensor

from cottention.ops.dispatch import num_saved
from cottention.ops.triton.config import on_device
from cottention.ops.triton.decayed import run_gated, run_gated_backward
from cottention.ops.triton.gradients import Gradients
from cottention.ops.triton.launch import Call, Segments
from cottention.ops.triton.step import run_step, run_step_in_place

# `dispatch` looks for all kernels here.
step, step_ = run_step, run_step_in_place
gated, gated_backward = run_gated, run_gated_backward

_OUTPUT, _GRADIENTS, _OF_QUERIES, _OF_KEYS = (0, 1), (1, 3), (1, 1), (2, 2)  # roles: the first, and how many


def _quadratic_backward(call: Call, do: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles = call.config.short_backward
    gradients = Gradients(call, call.blocks(call.shapes(tiles)["BT"], backward=True).count, tiles)
    call.quadratic(_GRADIENTS, do=do, outputs=gradients.outputs(), norms=gradients.norms)
    return gradients.finished()


def _sum_over_sequences(call: Call, segments: Segments, do: Tensor | None) -> Tensor:
    """The state of each whole sequence, or with do its gradient."""
    states = call.new_states(segments.count)
    call.sum_states(states, segments, do)
    if segments.is_single:
        return states
    total = call.new_states(call.num_sequences)
    call.scan(states, segments, None, total)
    return total


def _nothing(call: Call, dkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a call without tokens, or without a query or key to meet them: zero."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (call.q, call.k, call.v))
    m = call.norm_const
    return dq, dk, dv, call.q.new_empty(0, dtype=torch.float32) if m is None else torch.zeros_like(m), dkv


@on_device
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
    """o `[B, T, H, V]`, final kv and seen (empty unless asked for), and the states before segments (if there are)."""
    call = Call(q, k, v, norm_const, mask, cu_seqlens, seen, chunk_size, segment_tokens, causal=True)
    o = q.new_empty((*q.shape[:3], call.V))
    final = call.new_states(call.num_sequences if output_final_state else 0)
    states = q.new_empty(0, dtype=torch.float32)
    if segment_tokens > 0:
        states = call.new_states(num_saved(q, cu_seqlens, segment_tokens))
    if o.numel() == 0:
        final.zero_() if kv is None or not output_final_state else final.copy_(kv)
    elif segment_tokens == 0:
        call.quadratic(_OUTPUT, outputs=(o, None, None, None, None))
    else:
        kv = None if kv is None else kv.contiguous()
        reached = final if output_final_state else None
        segments = call.cut(call.T)
        if segments.is_single:
            call.linear(_OUTPUT, segments, outputs=(o, None, None, None, None), states=kv, reached=reached)
        else:
            call.sum_states(states, segments, None)
            call.scan(states, segments, kv, reached)
            call.linear(_OUTPUT, segments, outputs=(o, None, None, None, None), states=states)
    final_seen = call.reached_seen() if output_final_state else q.new_empty(0, dtype=torch.int64)
    return o, final if output_final_state else q.new_empty(0, dtype=torch.float32), final_seen, states


@on_device
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
    states: Tensor,
    chunk_size: int,
    segment_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dm and the gradient of the initial kv (the last two empty where there is none)."""
    call = Call(q, k, v, norm_const, mask, cu_seqlens, seen, chunk_size, segment_tokens, causal=True)
    dkv = q.new_empty(0, dtype=torch.float32) if kv is None else call.new_states(call.num_sequences)
    if q.numel() == 0:
        if kv is not None:
            dkv.zero_() if dfinal is None else dkv.copy_(dfinal)
        return _nothing(call, dkv)
    if segment_tokens == 0:
        return *_quadratic_backward(call, do), dkv
    segments = call.cut(call.T)
    gradients = Gradients(call, segments.count, call.config.backward)
    dfinal = None if dfinal is None else dfinal.contiguous()
    before, after, reached = kv, dfinal, None if kv is None else dkv
    if segments.is_single:
        before = None if before is None else before.contiguous()
    else:
        before, after = states, torch.empty_like(states)
        call.sum_states(after, segments, do)
        call.scan(after, segments, dfinal, reached, reverse=True)
        reached = None
    call.linear(
        _GRADIENTS, segments, do=do, outputs=gradients.outputs(), states=before, dstates=after, reached=reached,
        norms=gradients.norms,
    )  # fmt: skip
    return *gradients.finished(), dkv


@on_device
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
    """o `[B, T, H, V]` and each sequence's state over all its keys `[N, H, K, V]` (empty in the quadratic form)."""
    call = Call(q, k, v, norm_const, mask, cu_seqlens, None, chunk_size, segment_tokens, causal=False)
    o = q.new_empty((*q.shape[:3], call.V))
    if o.numel() == 0 or k.numel() == 0 or segment_tokens == 0:
        if k.numel() == 0:
            o.zero_()
        elif o.numel():
            call.quadratic(_OUTPUT, outputs=(o, None, None, None, None))
        nothing = q.new_empty(0, dtype=torch.float32)
        return o, nothing if segment_tokens == 0 else call.new_states(call.num_sequences).zero_()
    kv = _sum_over_sequences(call, call.cut(call.S), None)
    call.linear(_OUTPUT, call.cut(call.T), outputs=(o, None, None, None, None), states=kv)
    return o, kv


@on_device
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
    call = Call(q, k, v, norm_const, mask, cu_seqlens, None, chunk_size, segment_tokens, causal=False)
    if q.numel() == 0 or k.numel() == 0:
        return _nothing(call, kv)[:4]
    if segment_tokens == 0:
        return _quadratic_backward(call, do)
    queries, keys = call.cut(call.T), call.cut(call.S)
    gradients = Gradients(call, keys.count, call.config.backward)
    dkv = _sum_over_sequences(call, queries, do)
    call.linear(_OF_QUERIES, queries, do=do, outputs=gradients.outputs(), states=kv, norms=gradients.norms)
    call.linear(_OF_KEYS, keys, do=do, outputs=gradients.outputs(), dstates=dkv, norms=gradients.norms)
    return gradients.finished()
