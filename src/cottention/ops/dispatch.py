"""The operation as operators, `cottention::causal`, `bidirectional` and `gated` (decay, erase), beside the step.

Each takes the name of the implementation whose kernels run: one schema, one description of shapes for tracing and one
rule for gradients serve chunk, native and triton alike. An implementation is a function `cut`, which says how a call is
cut or raises, and a module with functions of the operators' names; none of them knows that there are operators.

    o, kv, seen, saved = torch.ops.cottention.causal("chunk", q, k, v, m, mask, cu_seqlens, kv0, seen0, True, 64, 1024)

A fused forward has a fused backward and no other derivative. So a call under a function transform or with forward-mode
tangents, and a backward whose result is to be differentiated again (create_graph=True), go through `plain.py` instead.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from cottention.ops.derivatives import is_transformed, plain_gradients, wants_gradient
from cottention.ops.gated import plain_gated
from cottention.ops.plain import plain_bidirectional, plain_causal, plain_step
from cottention.ops.state import CosineState, accumulation_dtype

_HOMES = {
    "chunk": "cottention.ops.chunk",
    "native": "cottention.ops.native.kernels",
    "triton": "cottention.ops.triton.passes",  # imports Triton
}

# Defined by hand: at short lengths the checks around a custom_op would take longer than the arithmetic.
_operators = torch.library.Library("cottention", "FRAGMENT")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? norm_const, Tensor? mask, Tensor? cu_seqlens"
_STATE = "Tensor? kv, Tensor? seen"
_GATES = "Tensor? log_decay, Tensor? beta"
# segment_tokens: backward keeps the states between segments of so many tokens; -1: sequences are whole, 0: no states
_CUTS = "SymInt chunk_size, SymInt segment_tokens"
_TOKEN = "Tensor q, Tensor k, Tensor v, Tensor? norm_const, Tensor? real"
_STEP_GATES = "Tensor? log_decay=None, Tensor? beta=None"  # not given to a kernel where they are None
_SCHEMAS = {
    "causal": f"({_INPUTS}, {_STATE}, bool output_final_state, {_CUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "causal_backward": f"(Tensor grad, Tensor? grad_kv, {_INPUTS}, {_STATE}, Tensor saved, {_CUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "bidirectional": f"({_INPUTS}, {_CUTS}) -> (Tensor, Tensor)",
    "bidirectional_backward": f"(Tensor grad, {_INPUTS}, Tensor saved, {_CUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "gated": f"({_INPUTS}, {_STATE}, {_GATES}, bool causal, {_CUTS}, bool output_final_state=True)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "gated_backward": f"(Tensor grad, Tensor? grad_kv, {_INPUTS}, {_STATE}, {_GATES}, Tensor saved, bool causal,"
    f" {_CUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "step": f"({_TOKEN}, {_STATE}, {_STEP_GATES}) -> (Tensor, Tensor, Tensor)",
    "step_": f"({_TOKEN}, Tensor(a!) kv, Tensor(b!) seen, {_STEP_GATES}, Tensor? state_indices=None) -> Tensor",
}


def attend(
    implementation: str,
    cut: Callable[..., tuple[int, int]],  # the call -> tokens of a chunk and of a segment
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
    log_decay: Tensor | None = None,  # [B, T, H]
    beta: Tensor | None = None,  # [B, T, H]
) -> tuple[Tensor, CosineState | None]:
    """A call of an implementation: the numbers of `naive`. For the arguments see `cosine_attention`."""
    kv, seen = (None, None) if initial_state is None else initial_state
    inputs = (q, k, v, norm_const, attention_mask, cu_seqlens)
    forgets, erases = log_decay is not None, beta is not None
    cuts = cut(
        q,
        k,
        v,
        causal=causal,
        cu_seqlens=cu_seqlens,
        has_states=initial_state is not None or output_final_state,
        chunk_size=chunk_size,
        forgets=forgets,
        erases=erases,
        has_backward=erases and wants_gradient(*inputs, kv, log_decay, beta),
    )
    if forgets or erases:
        inputs = (*inputs, kv, seen, log_decay, beta, causal, *cuts)
        o, kv, seen, _ = torch.ops.cottention.gated.default(implementation, *inputs, output_final_state)
    elif causal:
        inputs = (*inputs, kv, seen, output_final_state, *cuts)
        o, kv, seen, _ = torch.ops.cottention.causal.default(implementation, *inputs)
    else:
        return torch.ops.cottention.bidirectional.default(implementation, *inputs, *cuts)[0], None
    return o, CosineState(kv, seen) if output_final_state else None


def below_autograd(operator: Callable[..., Any], *inputs: Any) -> Any:
    """Run the kernel alone: what torch.library's own register_autograd does, at a third of its cost."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*inputs)


@cache
def _kernel(name: str, implementation: str) -> Callable[..., Any]:
    """The function that computes an operator."""
    return getattr(import_module(_HOMES[implementation]), name)


def _define(name: str, schema: str) -> None:
    _operators.define(f"{name}(str implementation, {schema[1:]}")

    def run(implementation: str, *inputs: Any) -> Any:
        return _kernel(name, implementation)(*inputs)

    _operators.impl(name, run, "CompositeExplicitAutograd")


for _name, _schema in _SCHEMAS.items():
    _define(_name, _schema)


# Shapes, for tracing.


def _shapes_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"cottention::{name}")


def num_saved(q: Tensor, cu_seqlens: Tensor | None, segment_tokens: int) -> int:
    """States between segments that a causal call keeps for backward: from shapes alone, for packed ones a bound."""
    B, T = q.shape[:2]
    return B * -(-T // segment_tokens) if cu_seqlens is None else T // segment_tokens + cu_seqlens.shape[0] - 1


def _states_like(q: Tensor, v: Tensor, num: int) -> Tensor:
    return q.new_empty((num, *q.shape[-2:], v.shape[-1]), dtype=accumulation_dtype(q.dtype))


def _nothing_like(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=accumulation_dtype(q.dtype))


def _num_sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@_shapes_of("causal")
def _(_, q, k, v, norm_const, mask, cu_seqlens, kv, seen, output_final_state, chunk_size, segment_tokens):
    o = q.new_empty((*q.shape[:3], v.shape[3]))
    saved = _nothing_like(q)
    if segment_tokens > 0:
        saved = _states_like(q, v, num_saved(q, cu_seqlens, segment_tokens))
    return o, *_final_state_like(q, v, cu_seqlens, output_final_state), saved


def _final_state_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, output_final_state: bool) -> tuple[Tensor, ...]:
    """kv and seen, empty unless asked for."""
    if not output_final_state:
        return _nothing_like(q), q.new_empty(0, dtype=torch.int64)
    N = _num_sequences(q, cu_seqlens)
    return _states_like(q, v, N), q.new_empty(N, dtype=torch.int64)


@_shapes_of("causal_backward")
def _(_, grad, grad_kv, q, k, v, norm_const, mask, cu_seqlens, kv, *others):
    return *_gradients_like(q, k, v, norm_const), _nothing_like(q) if kv is None else kv.new_empty(kv.shape)


@_shapes_of("bidirectional")
def _(_, q, k, v, norm_const, mask, cu_seqlens, chunk_size, segment_tokens):
    saved = _states_like(q, v, _num_sequences(q, cu_seqlens)) if segment_tokens else _nothing_like(q)
    return q.new_empty((*q.shape[:3], v.shape[3])), saved


@_shapes_of("bidirectional_backward")
def _(_, grad, q, k, v, norm_const, *others):
    return _gradients_like(q, k, v, norm_const)


def _gradients_like(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor | None) -> tuple[Tensor, ...]:
    dm = _nothing_like(q) if norm_const is None else norm_const.new_empty(norm_const.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dm


@_shapes_of("gated")
def _(
    _, q, k, v, norm_const, mask, cu_seqlens, kv, seen, log_decay, beta, causal, chunk_size, segment_tokens, final=True
):
    saved = _nothing_like(q)
    if segment_tokens > 0:
        saved = _states_like(q, v, num_saved(q, cu_seqlens, segment_tokens))
    return q.new_empty((*q.shape[:3], v.shape[3])), *_final_state_like(q, v, cu_seqlens, final), saved


@_shapes_of("gated_backward")
def _(_, grad, grad_kv, q, k, v, norm_const, mask, cu_seqlens, kv, seen, log_decay, beta, *others):
    rest = (_nothing_like(q) if x is None else x.new_empty(x.shape) for x in (kv, log_decay, beta))
    return *_gradients_like(q, k, v, norm_const), *rest


@_shapes_of("step")
def _(_, q, k, v, norm_const, real, kv, seen, log_decay=None, beta=None):
    B = q.shape[0]
    return v.new_empty(v.shape), _states_like(q, v, B), q.new_empty(B, dtype=torch.int64)


@_shapes_of("step_")
def _(_, q, k, v, norm_const, real, kv, seen, log_decay=None, beta=None, state_indices=None):
    return v.new_empty(v.shape)


# Derivatives.


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.implementation, *tensors, ctx.output_final_state, chunk_size, segment_tokens = inputs
        ctx.cuts = chunk_size, segment_tokens
        outputs = below_autograd(torch.ops.cottention.causal.default, *inputs)
        ctx.save_for_backward(*tensors, outputs[3])
        ctx.mark_non_differentiable(*outputs[2:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_kv: Tensor | None, *_: Any) -> tuple[Any, ...]:
        *tensors, saved = ctx.saved_tensors
        q, v, norm_const, kv = tensors[0], tensors[2], tensors[3], tensors[6]
        grad_kv = grad_kv if ctx.output_final_state else None
        if grad is None and grad_kv is None:
            return (None,) * 12
        if torch.is_grad_enabled() or is_transformed(grad, grad_kv, *tensors):
            found = plain_gradients(plain_causal, tensors, (grad, grad_kv), ctx.needs_input_grad[1:])
        else:
            if grad is None:
                grad = q.new_zeros((*q.shape[:3], v.shape[3]))
            dq, dk, dv, dm, dkv = torch.ops.cottention.causal_backward.default(
                ctx.implementation, grad, grad_kv, *tensors, saved, *ctx.cuts
            )
            dm, dkv = None if norm_const is None else dm, None if kv is None else dkv
            found = (dq, dk, dv, dm, None, None, dkv, None)
        return None, *found, None, None, None


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.implementation, *tensors, chunk_size, segment_tokens = inputs
        ctx.cuts = chunk_size, segment_tokens
        o, saved = below_autograd(torch.ops.cottention.bidirectional.default, *inputs)
        ctx.save_for_backward(*tensors, saved)
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        return o, saved

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 9
        *tensors, saved = ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed(grad, *tensors):
            found = plain_gradients(plain_bidirectional, tensors, (grad,), ctx.needs_input_grad[1:])
        else:
            dq, dk, dv, dm = torch.ops.cottention.bidirectional_backward.default(
                ctx.implementation, grad, *tensors, saved, *ctx.cuts
            )
            found = dq, dk, dv, None if tensors[3] is None else dm, None, None
        return None, *found, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.implementation, tensors, (ctx.causal, *ctx.cuts) = inputs[0], inputs[1:11], inputs[11:14]
        ctx.num_inputs = len(inputs)  # the last is left out where it is the default
        outputs = below_autograd(torch.ops.cottention.gated.default, *inputs)
        ctx.save_for_backward(*tensors, outputs[3])
        has_state = ctx.causal and all(inputs[14:])
        ctx.mark_non_differentiable(*outputs[2 if has_state else 1 :])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_kv: Tensor | None, *_: Any) -> tuple[Any, ...]:
        *tensors, saved = ctx.saved_tensors
        if grad is None and grad_kv is None:
            return (None,) * ctx.num_inputs
        if torch.is_grad_enabled() or is_transformed(grad, grad_kv, *tensors):
            plain = partial(plain_gated, causal=ctx.causal, chunk_size=ctx.cuts[0])
            found = plain_gradients(plain, tensors, (grad, grad_kv), ctx.needs_input_grad[1:])
        else:
            q, v = tensors[0], tensors[2]
            if grad is None:
                grad = q.new_zeros((*q.shape[:3], v.shape[3]))
            gradients = torch.ops.cottention.gated_backward.default(
                ctx.implementation, grad, grad_kv, *tensors, saved, ctx.causal, *ctx.cuts
            )
            dq, dk, dv, *others = gradients
            dm, dkv, dlog_decay, dbeta = (
                None if tensors[i] is None else x for i, x in zip((3, 6, 8, 9), others, strict=True)
            )
            found = (dq, dk, dv, dm, None, None, dkv, None, dlog_decay, dbeta)
        return None, *found, *(None,) * (ctx.num_inputs - 11)


def _through_plain_gated(_: str, *inputs: Any) -> tuple[Tensor, ...]:
    tensors, (causal, chunk_size, _, *asked) = inputs[:10], inputs[10:]
    o, kv, seen = plain_gated(*tensors, causal=causal, chunk_size=chunk_size, reaches=all(asked))
    nothing = _nothing_like(o)
    return (o, kv, seen, nothing) if all(asked) else (o, nothing, torch.empty_like(nothing, dtype=torch.int64), nothing)


def _through_plain_causal(_: str, *inputs: Any) -> tuple[Tensor, ...]:
    o, kv, seen = plain_causal(*inputs[:8])
    nothing = _nothing_like(o)
    return (o, kv, seen, nothing) if inputs[8] else (o, nothing, torch.empty_like(nothing, dtype=torch.int64), nothing)


def _through_plain_bidirectional(_: str, *inputs: Any) -> tuple[Tensor, ...]:
    return plain_bidirectional(*inputs[:6])


def _through_plain_step(_: str, q, k, v, norm_const, real, kv, seen, log_decay=None, beta=None) -> tuple[Tensor, ...]:
    state = None if kv is None else CosineState(kv, seen)
    o, state = plain_step(q, k, v, norm_const, state, real, log_decay, beta)
    return o, *state


def _differentiate(name: str, plain: Callable[..., Any], function: type[torch.autograd.Function] | None) -> None:
    """Let an operator have the gradients of a function whose forward calls it, and all others of its plain form."""
    operator = getattr(torch.ops.cottention, name).default

    def call(*inputs: Any) -> Any:
        if is_transformed(*inputs):
            return plain(*inputs)
        if wants_gradient(*inputs):
            return plain(*inputs) if function is None else function.apply(*inputs)
        return below_autograd(operator, *inputs)

    _operators.impl(name, call, "Autograd")
    _operators.impl(name, plain, "FuncTorchBatched")


_differentiate("causal", _through_plain_causal, _Causal)
_differentiate("bidirectional", _through_plain_bidirectional, _Bidirectional)
_differentiate("gated", _through_plain_gated, _Gated)
_differentiate("step", _through_plain_step, None)
