"""One token of causal cosine attention on a GPU: a kernel for the state and its read-out, batched.

`step` returns a new state, as `cosine_attention_step` promises; `step_in_place` writes over the given one, so
a decoding loop holds one state and allocates nothing but its output, and a CUDA graph can capture and replay it.

    o, state = step(q, k, v, norm_const, state, real)        # q: [B, H, K]; real: [B] bool or None
    o = step_in_place(q, k, v, norm_const, state, real)
"""

# pyright: reportCallIssue=false
# (to a type checker a launch is a call of the kernel in Python)
from __future__ import annotations

import torch
from torch import Tensor

from cottention.ops.autocast import without_autocast
from cottention.ops.state import CosineState
from cottention.ops.triton.config import compiler_options, pad
from cottention.ops.triton.library import on_device

# A tile of the state that 4 warps hold in 32 registers a thread, in rows long enough to be read at full width.
_TILE_ELEMENTS = 4096
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? norm_const, Tensor? real"


def step(
    q: Tensor,  # [B, H, K]
    k: Tensor,
    v: Tensor,  # [B, H, V]
    norm_const: Tensor | None,  # [H]
    state: CosineState | None,
    real: Tensor | None = None,  # [B] bool
) -> tuple[Tensor, CosineState]:
    """Output `[B, H, V]` in q's dtype, and the new state. Not differentiable."""
    if state is None:
        B, H, K = q.shape
        state = CosineState.zeros(B, H, K, v.shape[2], device=q.device)
    o, kv, seen = torch.ops.cottention.triton_step(q, k, v, norm_const, real, *state)
    return o, CosineState(kv, seen)


def step_in_place(
    q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor | None, state: CosineState, real: Tensor | None = None
) -> Tensor:
    """Output `[B, H, V]`; the state becomes that after the token, in its own memory."""
    return torch.ops.cottention.triton_step_in_place(q, k, v, norm_const, real, *state)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    real: Tensor | None,
    kv: Tensor,
    seen: Tensor,
    new: Tensor,
) -> Tensor:
    from cottention.ops.triton.step_kernel import step_kernel  # Triton is needed from here on

    B, H, K = q.shape
    V = v.shape[2]
    o = q.new_empty((B, H, V))
    tile = min(pad(V), max(16, _TILE_ELEMENTS // pad(K)))
    real = None if real is None else real.contiguous().view(torch.uint8)
    if o.numel():
        step_kernel[(B * H * -(-V // tile),)](
            q, k, v, norm_const, real, kv, seen, o, new, *q.stride(), *k.stride(), *v.stride(),
            H, K=K, V=V, BK=pad(K), BZ=tile, num_warps=4, **compiler_options(q.device),
        )  # fmt: skip
    return o


@without_autocast
def _step(
    q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor | None, real: Tensor | None, kv: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    new = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    with on_device(q):
        o = _launch(q, k, v, norm_const, real, kv.contiguous(), seen.contiguous(), new)
        return o, new, seen + (1 if real is None else real)


@without_autocast
def _step_in_place(
    q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor | None, real: Tensor | None, kv: Tensor, seen: Tensor
) -> Tensor:
    if not (kv.is_contiguous() and seen.is_contiguous()):
        raise ValueError(f"a state must be contiguous to be written in place; got strides {list(kv.stride())}")
    with on_device(q):
        o = _launch(q, k, v, norm_const, real, kv, seen, kv)
        seen += 1 if real is None else real
        return o


_step_operator = torch.library.custom_op(
    "cottention::triton_step",
    _step,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor kv, Tensor seen) -> (Tensor, Tensor, Tensor)",
)
_in_place_operator = torch.library.custom_op(
    "cottention::triton_step_in_place",
    _step_in_place,
    mutates_args=("kv", "seen"),
    schema=f"({_INPUTS}, Tensor(a!) kv, Tensor(b!) seen) -> Tensor",
)


@_step_operator.register_fake
def _(q, k, v, norm_const, real, kv, seen):
    return q.new_empty((*q.shape[:2], v.shape[2])), kv.new_empty(kv.shape), seen.new_empty(seen.shape)


@_in_place_operator.register_fake
def _(q, k, v, norm_const, real, kv, seen):
    return q.new_empty((*q.shape[:2], v.shape[2]))
