"""The native kernels as operators of torch.library: shapes for tracing, gradients for autograd.

Importing this module registers them, so torch.compile keeps each call as one node (`fullgraph=True` works).

    o, kv, seen = torch.ops.cottention.native_causal(q, k, v, m, mask, cu_seqlens, kv0, seen0, True, 0)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cottention.ops.native.binding import run, run_step

# Defined by hand: at short lengths the checks around a custom_op would take longer than the arithmetic.
_operators = torch.library.Library("cottention", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? norm_const, Tensor? mask, Tensor? cu_seqlens"


def _define(name: str, schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare an operator; what is decorated computes it."""
    _operators.define(name + schema)
    return torch.library.impl(_operators, name, "CPU")


def _shapes_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What is decorated makes empty results, for tracing."""
    return torch.library.register_fake(f"cottention::{name}")


def _num_sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _state_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return q.new_empty((_num_sequences(q, cu_seqlens), *q.shape[2:], v.shape[3]), dtype=torch.float32)


def _gradients_like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@_define(
    "native_causal",
    f"({_INPUTS}, Tensor? kv, Tensor? seen, bool output_final_state, int chunk_size) -> (Tensor, Tensor, Tensor)",
)
def _causal(q, k, v, norm_const, mask, cu_seqlens, kv, seen, output_final_state, chunk_size):
    """o `[B, T, H, V]`, and the final kv and seen (empty unless asked for)."""
    o, final_kv, final_seen = _causal_like(q, v, cu_seqlens, output_final_state)
    states = {"final_kv": final_kv, "final_seen": final_seen} if output_final_state else {}
    options = {"causal": True, "chunk_size": chunk_size, "mask": mask, "cu_seqlens": cu_seqlens}
    run("forward", q, k, v, norm_const, **options, kv=kv, seen=seen, o=o, **states)
    return o, final_kv, final_seen


def _causal_like(q, v, cu_seqlens, output_final_state):
    o = q.new_empty((*q.shape[:3], v.shape[3]))
    if not output_final_state:
        return o, q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.int64)
    final_seen = q.new_empty(_num_sequences(q, cu_seqlens), dtype=torch.int64)
    return o, _state_like(q, v, cu_seqlens), final_seen


@_shapes_of("native_causal")
def _(q, k, v, norm_const, mask, cu_seqlens, kv, seen, output_final_state, chunk_size):
    return _causal_like(q, v, cu_seqlens, output_final_state)


@_define(
    "native_causal_backward",
    f"(Tensor grad, Tensor? grad_final, {_INPUTS}, Tensor? kv, Tensor? seen, int chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _causal_backward(grad, grad_final, q, k, v, norm_const, mask, cu_seqlens, kv, seen, chunk_size):
    """dq, dk, dv, dm and the gradient of the initial kv (the last two empty where there is none)."""
    dq, dk, dv = _gradients_like(q, k, v)
    dm = q.new_empty(0 if norm_const is None else norm_const.shape, dtype=torch.float32)
    dkv = q.new_empty(0 if kv is None else kv.shape, dtype=torch.float32)
    options = {"causal": True, "chunk_size": chunk_size, "mask": mask, "cu_seqlens": cu_seqlens, "kv": kv, "seen": seen}
    options |= {"grad": grad, "grad_final": grad_final, "dq": dq, "dk": dk, "dv": dv}
    run(
        "backward",
        q,
        k,
        v,
        norm_const,
        **options,
        dm=None if norm_const is None else dm,
        dkv=None if kv is None else dkv,
    )
    return dq, dk, dv, dm if norm_const is None else dm.to(norm_const.dtype), dkv


@_shapes_of("native_causal_backward")
def _(grad, grad_final, q, k, v, norm_const, mask, cu_seqlens, kv, seen, chunk_size):
    dkv = q.new_empty(0 if kv is None else kv.shape, dtype=torch.float32)
    return *_gradients_like(q, k, v), _fake_dm(q, norm_const), dkv


def _fake_dm(q: Tensor, norm_const: Tensor | None) -> Tensor:
    if norm_const is None:
        return q.new_empty(0, dtype=torch.float32)
    return norm_const.new_empty(norm_const.shape)


@_define("native_bidirectional", f"({_INPUTS}, int chunk_size) -> (Tensor, Tensor)")
def _bidirectional(q, k, v, norm_const, mask, cu_seqlens, chunk_size):
    """o `[B, T, H, V]` and each sequence's state over all its keys `[N, H, K, V]`, which backward needs again."""
    o, kv = q.new_empty((*q.shape[:3], v.shape[3])), _state_like(q, v, cu_seqlens)
    options = {"causal": False, "chunk_size": chunk_size, "mask": mask, "cu_seqlens": cu_seqlens}
    run("forward", q, k, v, norm_const, **options, final_kv=kv, o=o)
    return o, kv


@_shapes_of("native_bidirectional")
def _(q, k, v, norm_const, mask, cu_seqlens, chunk_size):
    return q.new_empty((*q.shape[:3], v.shape[3])), _state_like(q, v, cu_seqlens)


@_define(
    "native_bidirectional_backward",
    f"(Tensor grad, {_INPUTS}, Tensor kv, int chunk_size) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _bidirectional_backward(grad, q, k, v, norm_const, mask, cu_seqlens, kv, chunk_size):
    """dq, dk, dv and dm (empty without norm_const)."""
    dq, dk, dv = _gradients_like(q, k, v)
    dm = q.new_empty(0 if norm_const is None else norm_const.shape, dtype=torch.float32)
    options = {"causal": False, "chunk_size": chunk_size, "mask": mask, "cu_seqlens": cu_seqlens, "kv": kv}
    options |= {"grad": grad, "dq": dq, "dk": dk, "dv": dv}
    run("backward", q, k, v, norm_const, **options, dm=None if norm_const is None else dm)
    return dq, dk, dv, dm if norm_const is None else dm.to(norm_const.dtype)


@_shapes_of("native_bidirectional_backward")
def _(grad, q, k, v, norm_const, mask, cu_seqlens, kv, chunk_size):
    return *_gradients_like(q, k, v), _fake_dm(q, norm_const)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, ctx.output_final_state, ctx.chunk_size = inputs
        ctx.save_for_backward(*tensors)
        return _below_autograd(torch.ops.cottention.native_causal.default, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_kv: Tensor, grad_seen: Any) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        norm_const, kv = tensors[3], tensors[6]
        dq, dk, dv, dm, dkv = torch.ops.cottention.native_causal_backward.default(
            grad, grad_kv if ctx.output_final_state else None, *tensors, ctx.chunk_size
        )
        dm = None if norm_const is None else dm
        return dq, dk, dv, dm, None, None, None if kv is None else dkv, None, None, None


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, ctx.chunk_size = inputs
        o, kv = _below_autograd(torch.ops.cottention.native_bidirectional.default, inputs)
        ctx.save_for_backward(*tensors, kv)
        return o, kv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_kv: Any) -> tuple[Any, ...]:
        *tensors, kv = ctx.saved_tensors
        dq, dk, dv, dm = torch.ops.cottention.native_bidirectional_backward.default(grad, *tensors, kv, ctx.chunk_size)
        return dq, dk, dv, None if tensors[3] is None else dm, None, None, None


def _below_autograd(operator: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """What torch.library's own register_autograd does, at a third of its cost."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


def _differentiate(name: str, function: type[torch.autograd.Function]) -> None:
    """Let an operator have the gradients of a function whose forward calls it."""
    operator = getattr(torch.ops.cottention, name).default

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return function.apply(*inputs)
        return _below_autograd(operator, inputs)

    _operators.impl(name, call, "Autograd")


_differentiate("native_causal", _Causal)
_differentiate("native_bidirectional", _Bidirectional)


@_define(
    "native_step",
    "(Tensor q, Tensor k, Tensor v, Tensor? norm_const, Tensor? mask, Tensor? kv, Tensor? seen)"
    " -> (Tensor, Tensor, Tensor)",
)
def _step(q, k, v, norm_const, mask, kv, seen):
    """o, kv and seen after one token, `[B, H, K or V]` or `[B, 1, H, K or V]`."""
    if kv is None or seen is None:
        o, final_kv, final_seen = _step_like(v, q.shape[-1])
    else:
        o, final_kv, final_seen = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, kv, seen))
    run_step(q, k, v, norm_const, mask, kv, seen, final_kv, final_seen, o)
    return o, final_kv, final_seen


def _step_like(v, K):
    B, (H, V) = v.shape[0], v.shape[-2:]
    final_kv = torch.empty((B, H, K, V), dtype=torch.float32, device=v.device)
    final_seen = torch.empty(B, dtype=torch.int64, device=v.device)
    return torch.empty_like(v, memory_format=torch.contiguous_format), final_kv, final_seen


@_shapes_of("native_step")
def _(q, k, v, norm_const, mask, kv, seen):
    return _step_like(v, q.shape[-1])


@_define(
    "native_step_",
    "(Tensor q, Tensor k, Tensor v, Tensor? norm_const, Tensor? mask, Tensor(a!) kv, Tensor(b!) seen) -> Tensor",
)
def _step_in_place(q, k, v, norm_const, mask, kv, seen):
    """o; kv and seen, which must be contiguous, are written over."""
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    run_step(q, k, v, norm_const, mask, kv, seen, kv, seen, o)
    return o


@_shapes_of("native_step_")
def _(q, k, v, norm_const, mask, kv, seen):
    return torch.empty_like(v, memory_format=torch.contiguous_format)
