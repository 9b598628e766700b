"""The chunked form as operators of torch.library: shapes for tracing, gradients for autograd, no autocast inside.

Importing this module registers them, so torch.compile keeps each call as one node (`fullgraph=True` works).

    o, kv, seen, carries = torch.ops.cottention.chunk_causal(q, k, v, m, mask, cu_seqlens, kv0, seen0, True, 64)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cottention.ops.autocast import without_autocast
from cottention.ops.chunk import (
    bidirectional_backward,
    bidirectional_forward,
    causal_backward,
    causal_forward,
    num_carries,
)
from cottention.ops.state import accumulation_dtype

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? norm_const, Tensor? mask, Tensor? cu_seqlens"


def _define(name: str, function: Callable[..., Any], schema: str) -> Any:
    return torch.library.custom_op(f"cottention::{name}", without_autocast(function), mutates_args=(), schema=schema)


_chunk_causal = _define(
    "chunk_causal",
    causal_forward,
    f"({_INPUTS}, Tensor? kv, Tensor? seen, bool output_final_state, int chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
_chunk_causal_backward = _define(
    "chunk_causal_backward",
    causal_backward,
    f"(Tensor grad, Tensor? grad_final, {_INPUTS}, Tensor? kv, Tensor? seen, Tensor carries, int chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_chunk_bidirectional = _define(
    "chunk_bidirectional", bidirectional_forward, f"({_INPUTS}, int chunk_size) -> (Tensor, Tensor)"
)
_chunk_bidirectional_backward = _define(
    "chunk_bidirectional_backward",
    bidirectional_backward,
    f"(Tensor grad, {_INPUTS}, Tensor kv, int chunk_size) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_chunk_causal.register_fake
def _(q, k, v, norm_const, mask, cu_seqlens, kv, seen, output_final_state, chunk_size):
    B, T, H, K = q.shape
    V = v.shape[3]
    dtype = accumulation_dtype(q.dtype)
    asks_states = kv is not None or output_final_state
    carries = q.new_empty((num_carries(q, v, cu_seqlens, asks_states, chunk_size), B, H, K, V), dtype=dtype)
    o = q.new_empty((B, T, H, V))
    if not output_final_state:
        return o, q.new_empty(0, dtype=dtype), q.new_empty(0, dtype=torch.int64), carries
    num_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return o, q.new_empty((num_sequences, H, K, V), dtype=dtype), q.new_empty(num_sequences, dtype=torch.int64), carries


@_chunk_causal_backward.register_fake
def _(grad, grad_final, q, k, v, norm_const, mask, cu_seqlens, kv, seen, carries, chunk_size):
    dtype = accumulation_dtype(q.dtype)
    dkv = q.new_empty(0, dtype=dtype) if kv is None else q.new_empty(kv.shape, dtype=dtype)
    return *_fake_input_gradients(q, k, v, norm_const), dkv


@_chunk_bidirectional.register_fake
def _(q, k, v, norm_const, mask, cu_seqlens, chunk_size):
    B, T, H, K = q.shape
    V = v.shape[3]
    num_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kv = q.new_empty((num_sequences, H, K, V), dtype=accumulation_dtype(q.dtype))
    return q.new_empty((B, T, H, V)), kv


@_chunk_bidirectional_backward.register_fake
def _(grad, q, k, v, norm_const, mask, cu_seqlens, kv, chunk_size):
    return _fake_input_gradients(q, k, v, norm_const)


def _fake_input_gradients(
    q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dm = (
        q.new_empty(0, dtype=accumulation_dtype(q.dtype))
        if norm_const is None
        else norm_const.new_empty(norm_const.shape)
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dm


def _save_causal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.output_final_state, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, output[3])


def _causal_gradient(ctx: Any, grad: Tensor, grad_kv: Tensor, grad_seen: Any, grad_carries: Any) -> tuple[Any, ...]:
    *tensors, carries = ctx.saved_tensors
    norm_const, kv = tensors[3], tensors[6]
    dq, dk, dv, dm, dkv = torch.ops.cottention.chunk_causal_backward(
        grad, grad_kv if ctx.output_final_state else None, *tensors, carries, ctx.chunk_size
    )
    dm = None if norm_const is None else dm
    return dq, dk, dv, dm, None, None, None if kv is None else dkv, None, None, None


def _save_bidirectional(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, output[1])


def _bidirectional_gradient(ctx: Any, grad: Tensor, grad_kv: Any) -> tuple[Any, ...]:
    *tensors, kv = ctx.saved_tensors
    dq, dk, dv, dm = torch.ops.cottention.chunk_bidirectional_backward(grad, *tensors, kv, ctx.chunk_size)
    return dq, dk, dv, None if tensors[3] is None else dm, None, None, None


_chunk_causal.register_autograd(_causal_gradient, setup_context=_save_causal)
_chunk_bidirectional.register_autograd(_bidirectional_gradient, setup_context=_save_bidirectional)
