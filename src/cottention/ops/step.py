"""One token of causal cosine attention, the step of a decoding loop.

o, state = cosine_attention_step(q, k, v, norm_const, state)        # q, k: [B, H, K], v: [B, H, V]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cottention.ops.autocast import as_autocast_would
from cottention.ops.derivatives import is_transformed, wants_gradient
from cottention.ops.dispatch import below_autograd
from cottention.ops.native.binding import suits_native
from cottention.ops.plain import plain_step
from cottention.ops.state import CosineState
from cottention.ops.triton import why_not as why_not_triton
from cottention.ops.triton.erase import step_erasing
from cottention.ops.triton.erase import why_not as why_not_erase
from cottention.ops.validation import check_step_arguments


def cosine_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    state: CosineState | None,
    *,
    attention_mask: Tensor | None = None,
    in_place: bool = False,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> tuple[Tensor, CosineState]:
    """One token of causal cosine attention in O(K V) time, whatever came before.

        S_t = S_{t-1} + k_hat_t (v_t / max(c_t ** sigmoid(m), 1))^T;  o_t = S_t^T q_hat_t

    and with log_decay and beta as in `cosine_attention`.

    Each step rounds the state once, and a state has no room for what that loses: in float32 it is off by 1e-6 of its
    largest entry after 1,000 tokens, 1e-5 after 100,000 and 3e-5 after a million. Where that is too much, give
    `cosine_attention` the tokens in blocks, or the step float64 tensors.

    Args:
        q: `[B, H, K]`, or `[B, 1, H, K]` as `cosine_attention` takes it; float64, float32, bfloat16 or float16.
        k: like q.
        v: `[B, H, V]` or `[B, 1, H, V]`.
        norm_const: `[H]` or `[1, H, 1, 1]`, the exponent before the sigmoid; None divides by nothing.
        state: of the B sequences so far; None before the first token. It is left as it was unless `in_place`.
        attention_mask: `[B]` or `[B, 1]`, 1 = real; a padded row gives 0 and keeps its state. None: all real.
        in_place: write the new state over `state`, which is returned; for decoding loops that own it. Not where a
            derivative is wanted.
        log_decay: `[B, H]` or `[B, 1, H]` float32, at most 0.
        beta: like log_decay, from 0 to 2, in any float dtype.
        state_indices: `[B]` int64, all different. `state` is then a pool of any number of states: those rows of it are
            read and written over, as by `in_place`, and the pool is returned.
    Returns:
        Output in q's dtype and shape (V for K), and the new state.
    Raises:
        ValueError: shapes disagree, or in_place without a state, or with one whose derivative is wanted.
        TypeError: dtypes are mixed or not floating point.
    Source: arXiv 2409.18747, section 3 (recurrent form). Differs: the count is kept per sequence and skips padding.
    """
    q, k, v = as_autocast_would(q, k, v)
    norm_const = check_step_arguments(q, k, v, norm_const, state, attention_mask, log_decay, beta, state_indices)
    inputs = (q, k, v, norm_const, *(state or ()), log_decay, beta)
    is_differentiated = wants_gradient(*inputs) or is_transformed(*inputs)
    if (in_place or state_indices is not None) and (state is None or is_differentiated):
        name = "in_place" if in_place else "state_indices"
        found = "state=None" if state is None else "inputs that require a gradient, have a tangent or are transformed"
        raise ValueError(f"{name} needs a state to write over and no gradient; got {found}")
    implementation = None if is_differentiated else _fused_implementation(q, v)
    erases_elsewhere = (
        beta is not None
        and not is_differentiated
        and q.is_cuda
        and why_not_erase(q.device, q.dtype, q.shape[-1]) is None
    )
    can_write = state is not None and state.kv.is_contiguous() and state.seen.is_contiguous()
    is_fused = implementation is not None and not erases_elsewhere
    if state_indices is not None and state is not None and not (can_write and is_fused):
        rows = state.index_select(state_indices)
        o, new = cosine_attention_step(
            q, k, v, norm_const, rows, attention_mask=attention_mask, in_place=True, log_decay=log_decay, beta=beta
        )
        state.kv.index_copy_(0, state_indices.to(torch.int64), new.kv)
        state.seen.index_copy_(0, state_indices.to(torch.int64), new.seen)
        return o, state
    if beta is not None and erases_elsewhere:
        o, new = step_erasing(q, k, v, norm_const, state, attention_mask, log_decay, beta)
    elif implementation is None:
        o, new = plain_step(q, k, v, norm_const, state, attention_mask, log_decay, beta)
    else:
        # No derivative is wanted of what comes here: an eager call spares the way through autograd.
        run = _directly if torch.compiler.is_compiling() else below_autograd
        real = None if attention_mask is None else attention_mask.reshape(-1).to(torch.bool)
        inputs = (implementation, q, k, v, norm_const, real, *(state or (None, None)), log_decay, beta)
        if (in_place or state_indices is not None) and can_write and state is not None:
            return run(torch.ops.cottention.step_.default, *inputs, state_indices), state
        o, *parts = run(torch.ops.cottention.step.default, *inputs)
        new = CosineState(*parts)
    if in_place and state is not None:
        state.kv.copy_(new.kv)
        state.seen.copy_(new.seen)
        new = state
    return o, new


def _fused_implementation(q: Tensor, v: Tensor) -> str | None:
    """Whose kernel makes the step; None where there is none, and in a program that is exported."""
    if torch.compiler.is_exporting():
        return None
    if q.is_cuda:
        return "triton" if why_not_triton(q.device, q.dtype, q.shape[-1], v.shape[-1]) is None else None
    return "native" if suits_native(q) and not torch.compiler.is_compiling() else None


def _directly(operator: Callable[..., Any], *inputs: Any) -> Any:
    return operator(*inputs)
