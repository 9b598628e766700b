"""The Triton form as operators of torch.library: shapes for tracing, gradients for autograd, a clear refusal of vmap.

Importing this module registers them and needs no Triton; running them does.

    o, kv, seen, states = torch.ops.cottention.triton_causal(q, k, v, m, mask, cu_seqlens, kv0, seen0, True, 512, None)
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cottention.ops.autocast import without_autocast

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? norm_const, Tensor? mask, Tensor? cu_seqlens"
_CUTS = "SymInt segment_tokens, SymInt? chunk_size"


def num_states(B: int, T: int, cu_seqlens: Tensor | None, segment_tokens: int) -> int:
    """States of segments that a causal call keeps for backward: from shapes alone, for packed ones an upper bound."""
    if segment_tokens == 0 or segment_tokens >= T:
        return 0
    if cu_seqlens is None:
        return B * -(-T // segment_tokens)
    return T // segment_tokens + cu_seqlens.shape[0] - 1


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _define(name: str, schema: str) -> Any:
    @without_autocast
    def run(first: Tensor, *others: Any) -> Any:
        from cottention.ops.triton import passes  # Triton is needed from here on

        with on_device(first):
            return getattr(passes, name)(first, *others)

    operator = torch.library.custom_op(f"cottention::triton_{name}", run, mutates_args=(), schema=schema)
    operator.register_vmap(_refuse_vmap)
    return operator


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    raise NotImplementedError(
        "the triton implementation of cosine attention has no vmap: fold the mapped dimension into the batch, "
        'or ask for implementation="naive"'
    )


_causal = _define(
    "causal",
    f"({_INPUTS}, Tensor? kv, Tensor? seen, bool output_final_state, {_CUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
_causal_backward = _define(
    "causal_backward",
    f"(Tensor grad, Tensor? grad_final, {_INPUTS}, Tensor? kv, Tensor? seen, Tensor states, {_CUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_bidirectional = _define("bidirectional", f"({_INPUTS}, {_CUTS}) -> (Tensor, Tensor)")
_bidirectional_backward = _define(
    "bidirectional_backward", f"(Tensor grad, {_INPUTS}, Tensor kv, {_CUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


@_causal.register_fake
def _(q, k, v, norm_const, mask, cu_seqlens, kv, seen, output_final_state, segment_tokens, chunk_size):
    B, T, H, K = q.shape
    V = v.shape[3]
    states = _new_states(q, (num_states(B, T, cu_seqlens, segment_tokens), H, K, V))
    o = q.new_empty((B, T, H, V))
    if not output_final_state:
        return o, _new_states(q, (0,)), q.new_empty(0, dtype=torch.int64), states
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return o, _new_states(q, (N, H, K, V)), q.new_empty(N, dtype=torch.int64), states


@_causal_backward.register_fake
def _(grad, grad_final, q, k, v, norm_const, mask, cu_seqlens, kv, seen, states, segment_tokens, chunk_size):
    return *_fake_gradients(q, k, v, norm_const), _new_states(q, (0,) if kv is None else kv.shape)


@_bidirectional.register_fake
def _(q, k, v, norm_const, mask, cu_seqlens, segment_tokens, chunk_size):
    B, T, H, K = q.shape
    V = v.shape[3]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty((B, T, H, V)), _new_states(q, (N if segment_tokens else 0, H, K, V))


@_bidirectional_backward.register_fake
def _(grad, q, k, v, norm_const, mask, cu_seqlens, kv, segment_tokens, chunk_size):
    return _fake_gradients(q, k, v, norm_const)


def _new_states(q: Tensor, shape: tuple[int, ...]) -> Tensor:
    return q.new_empty(shape, dtype=torch.float32)


def _fake_gradients(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor | None) -> tuple[Tensor, ...]:
    dm = _new_states(q, (0,)) if norm_const is None else norm_const.new_empty(norm_const.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dm


def _save_causal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.output_final_state, ctx.segment_tokens, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, output[3])


def _causal_gradient(ctx: Any, grad: Tensor, grad_kv: Tensor, grad_seen: Any, grad_states: Any) -> tuple[Any, ...]:
    *tensors, states = ctx.saved_tensors
    norm_const, kv = tensors[3], tensors[6]
    dq, dk, dv, dm, dkv = torch.ops.cottention.triton_causal_backward(
        grad, grad_kv if ctx.output_final_state else None, *tensors, states, ctx.segment_tokens, ctx.chunk_size
    )
    dm = None if norm_const is None else dm
    return dq, dk, dv, dm, None, None, None if kv is None else dkv, None, None, None, None


def _save_bidirectional(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.segment_tokens, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, output[1])


def _bidirectional_gradient(ctx: Any, grad: Tensor, grad_kv: Any) -> tuple[Any, ...]:
    *tensors, kv = ctx.saved_tensors
    dq, dk, dv, dm = torch.ops.cottention.triton_bidirectional_backward(
        grad, *tensors, kv, ctx.segment_tokens, ctx.chunk_size
    )
    return dq, dk, dv, None if tensors[3] is None else dm, None, None, None, None


_causal.register_autograd(_causal_gradient, setup_context=_save_causal)
_bidirectional.register_autograd(_bidirectional_gradient, setup_context=_save_bidirectional)
