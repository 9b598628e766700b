"""One token of causal cosine attention on a GPU: a kernel for the state and its read-out, batched.

`step` returns a new state, as `cosine_attention_step` promises; `step_in_place` writes over the given one, or over rows
of a pool of them, so a decoding loop holds one state and allocates nothing but its output, and a CUDA graph can capture
and replay it.

    o, state = step(q, k, v, norm_const, state, real)        # q: [B, H, K]; real: [B] bool or None
    o = step_in_place(q, k, v, norm_const, state, real)
"""

# pyright: reportCallIssue=false
# (to a type checker a launch is a call of the kernel in Python)
from __future__ import annotations

import torch
from torch import Tensor

from cottention.ops.state import CosineState
from cottention.ops.triton.config import compiler_options, on_device, pad

# A tile of the state that 4 warps hold in 32 registers a thread, in rows long enough to be read at full width.
_TILE_ELEMENTS = 4096


def step(
    q: Tensor,  # [B, H, K]
    k: Tensor,
    v: Tensor,  # [B, H, V]
    norm_const: Tensor | None,  # [H]
    state: CosineState | None,
    real: Tensor | None = None,  # [B] bool
    log_decay: Tensor | None = None,  # [B, H]
    beta: Tensor | None = None,  # [B, H]
) -> tuple[Tensor, CosineState]:
    """Output `[B, H, V]` in q's dtype, and the new state. Not differentiable."""
    given = (q, k, v, norm_const, real, *(state or (None, None)), log_decay, beta)
    o, *new = torch.ops.cottention.step("triton", *given)
    return o, CosineState(*new)


def step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    state: CosineState,
    real: Tensor | None = None,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    state_indices: Tensor | None = None,  # [B]
) -> Tensor:
    """Output `[B, H, V]`; the state, or its rows `state_indices`, becomes that after the token, in its own memory.

    A row that does not exist is that of no sequence: its output is 0.
    """
    given = (q, k, v, norm_const, real, *state, log_decay, beta, state_indices)
    return torch.ops.cottention.step_("triton", *given)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    real: Tensor | None,
    kv: Tensor,
    seen: Tensor,
    new: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    rows: Tensor | None,
) -> Tensor:
    from cottention.ops.triton.step_kernel import step_kernel  # Triton is needed from here on

    o = v.new_empty(v.shape)
    q, k, v = (x.squeeze(1) if x.dim() == 4 else x for x in (q, k, v))  # [B, H, K or V]
    B, H, K = q.shape
    V = v.shape[2]
    tile = min(pad(V), max(16, _TILE_ELEMENTS // pad(K)))
    real = None if real is None else real.contiguous().view(torch.uint8)
    rows = None if rows is None else rows.contiguous()
    log_decay, beta = (None if x is None else x.reshape(B, H) for x in (log_decay, beta))
    strides = (stride for x in (log_decay, beta) for stride in ((None, None) if x is None else x.stride()))
    if o.numel():
        step_kernel[(B * H * -(-V // tile),)](
            q, k, v, norm_const, real, log_decay, beta, rows, kv, seen, o, new,
            *q.stride(), *k.stride(), *v.stride(), *strides, None if rows is None else kv.shape[0],
            H, K=K, V=V, BK=pad(K), BZ=tile, num_warps=4, **compiler_options(q.device),
        )  # fmt: skip
    return o


@on_device
def run_step(
    q: Tensor,  # [B, H, K] or [B, 1, H, K]
    k: Tensor,  # like q
    v: Tensor,  # [B, H, V] or [B, 1, H, V]
    norm_const: Tensor | None,
    real: Tensor | None,
    kv: Tensor | None,
    seen: Tensor | None,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, kv and seen after one token."""
    if kv is None or seen is None:
        B, (H, K) = q.shape[0], q.shape[-2:]
        kv, seen = CosineState.zeros(B, H, K, v.shape[-1], device=q.device)
    assert kv is not None
    assert seen is not None
    new = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    o = _launch(q, k, v, norm_const, real, kv.contiguous(), seen.contiguous(), new, log_decay, beta, None)
    return o, new, seen + (1 if real is None else real)


@on_device
def run_step_in_place(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    real: Tensor | None,
    kv: Tensor,
    seen: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """o; kv and seen are written over."""
    if not (kv.is_contiguous() and seen.is_contiguous()):
        raise ValueError(f"a state must be contiguous to be written in place; got strides {list(kv.stride())}")
    o = _launch(q, k, v, norm_const, real, kv, seen, kv, log_decay, beta, state_indices)
    if state_indices is None:
        seen += 1 if real is None else real
    elif len(seen):
        last = len(seen) - 1
        exists = (state_indices >= 0) & (state_indices <= last)
        seen.index_add_(0, state_indices.clamp(0, last), (exists if real is None else exists & real).to(seen.dtype))
    return o
