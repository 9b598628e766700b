"""The delta rule (beta) on a GPU: the kernels of flash-linear-attention, where they are installed.

Unit vectors and the divisor are computed here, since theirs differ: their norm has an eps of 1e-6 inside its root. They
know no padding, so a padded token becomes one that changes nothing: k, v and beta 0, and no decay. Packed sequences,
states and first derivatives are theirs; derivatives of another kind come from `plain_gated`.

    o, state = attend_erasing(q, k, v, norm_const, causal=True, log_decay=log_decay, beta=beta)      # q on a GPU
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from cottention.ops.autocast import without_autocast
from cottention.ops.derivatives import is_transformed, plain_gradients
from cottention.ops.gated import plain_gated
from cottention.ops.layouts import CHUNK_SIZE, divided, finished, layout_of, unit
from cottention.ops.state import CosineState
from cottention.ops.triton.config import arithmetic

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_KEY_DIM = 256
# exp of it is nothing in float32. Theirs takes differences of sums of decays, which stronger ones leave no digits.
_LEAST_LOG_DECAY = -100.0
# Up to so many tokens, their models take the kernel that goes token by token; it has no backward.
_RECURRENT_UP_TO = 64

# chunk_gated_delta_rule and fused_recurrent_gated_delta_rule, or what is called as they are.
Rules = tuple[Callable[..., Any], Callable[..., Any]]


@cache
def _rules() -> Rules | str:
    """flash-linear-attention's two functions, or why there are none. Their import takes seconds."""
    if importlib.util.find_spec("fla") is None:
        return "it needs flash-linear-attention: pip install 'cottention[gpu]'"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without a GPU it tells everybody so
            from fla.ops import gated_delta_rule  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # it asks for the GPU's driver while it is imported
        return f"flash-linear-attention cannot be imported ({error}): pip install --upgrade 'cottention[gpu]'"
    return gated_delta_rule.chunk_gated_delta_rule, gated_delta_rule.fused_recurrent_gated_delta_rule


def why_not(device: torch.device, dtype: torch.dtype, K: int) -> str | None:
    """Why their kernels cannot run on such tensors, with the remedy; None when they can."""
    if device.type != "cuda":
        return f"with beta it needs tensors on a CUDA or HIP device, these are on {device.type}: move them there"
    if torch.compiler.is_compiling():
        return 'flash-linear-attention is not traced by torch.compile: use implementation="chunk"'
    if dtype not in _DTYPES:
        return f'flash-linear-attention takes no {str(dtype).removeprefix("torch.")}: use implementation="chunk"'
    if dtype == torch.float32 and arithmetic(dtype) == "ieee":
        return (
            "flash-linear-attention multiplies float32 as TF32: allow that by "
            "torch.set_float32_matmul_precision('high'), or use implementation=\"chunk\""
        )
    if K > _MAX_KEY_DIM:
        return f'flash-linear-attention takes K up to {_MAX_KEY_DIM}, not {K}: use implementation="chunk"'
    rules = _rules()
    return rules if isinstance(rules, str) else None


def attend_erasing(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,
    v: Tensor,  # [B, T, H, V]
    norm_const: Tensor | None,  # [H]
    *,
    causal: bool,
    attention_mask: Tensor | None = None,  # [B, T] bool
    cu_seqlens: Tensor | None = None,  # [N+1]
    initial_state: CosineState | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    log_decay: Tensor | None = None,  # [B, T, H]
    beta: Tensor | None = None,  # [B, T, H]
    rules: Rules | None = None,
) -> tuple[Tensor, CosineState | None]:
    """A call with beta, for the checked arguments of `cosine_attention`; `chunk_size` is theirs to choose.

    `rules` stand for flash-linear-attention's two functions, where there is no GPU to run them.
    """
    assert causal and beta is not None  # noqa: PT018
    kv, seen = initial_state or (None, None)
    given = (q, k, v, norm_const, attention_mask, cu_seqlens, kv, seen, log_decay, beta)
    if q.shape[1] == 0 or is_transformed(*given):
        o, kv, seen = plain_gated(*given, causal=True, chunk_size=chunk_size or CHUNK_SIZE)
    else:
        found = rules or _rules()
        assert not isinstance(found, str), found
        o, kv, seen = _Erasing.apply(found, *given)
    return o, CosineState(kv, seen) if output_final_state else None


def step_erasing(
    q: Tensor,  # [B, H, K] or [B, 1, H, K]
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,  # [H]
    state: CosineState | None,
    attention_mask: Tensor | None,  # [B] or [B, 1]
    log_decay: Tensor | None,  # [B, H] or [B, 1, H]
    beta: Tensor,
    rules: Rules | None = None,
) -> tuple[Tensor, CosineState]:
    """The step with beta, as a text of one token, for the checked arguments of `cosine_attention_step`."""
    B, H = q.shape[0], q.shape[-2]
    q1, k1, v1 = (x.reshape(B, 1, H, x.shape[-1]) for x in (q, k, v))
    o, new = attend_erasing(
        q1,
        k1,
        v1,
        norm_const,
        causal=True,
        attention_mask=None if attention_mask is None else attention_mask.reshape(B, 1).to(torch.bool),
        initial_state=state,
        output_final_state=True,
        log_decay=None if log_decay is None else log_decay.reshape(B, 1, H),
        beta=beta.reshape(B, 1, H),
        rules=rules,
    )
    assert new is not None
    return o.reshape(*q.shape[:-1], v.shape[-1]), new


@without_autocast
def _erasing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kv: Tensor | None,
    seen: Tensor | None,
    log_decay: Tensor | None,
    beta: Tensor,
    *,
    rule: Callable[..., Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """o, and the kv and seen that are reached, by one of their functions and operators of PyTorch."""
    count, total = layout_of(q, cu_seqlens).counts(mask, seen)
    # rounded to q's dtype, in which their kernels multiply
    q_hat, k_hat, value = (x.to(q.dtype) for x in (unit(q, mask), unit(k, mask), divided(v, norm_const, count, mask)))
    strength = beta.float()
    decay = torch.zeros_like(strength) if log_decay is None else log_decay.float().clamp(min=_LEAST_LOG_DECAY)
    if mask is not None:
        decay, strength = (x.masked_fill(~mask[..., None], 0) for x in (decay, strength))
    o, reached = rule(
        q=q_hat,
        k=k_hat,
        v=value,
        g=decay.contiguous(),
        beta=strength,
        scale=1.0,
        initial_state=kv,
        output_final_state=True,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.to(torch.int64),
    )
    return finished(o, q, mask), reached.float(), total


class _Erasing(torch.autograd.Function):
    """Their graph, kept inside of one node of ours: its derivative is theirs, and that of its derivative is ours."""

    @staticmethod
    def forward(ctx: Any, rules: Rules, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
        chunk, recurrent = rules
        wanted = ctx.needs_input_grad[1:]
        if not any(wanted):
            return _erasing(*tensors, rule=recurrent if tensors[0].shape[1] <= _RECURRENT_UP_TO else chunk)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        with torch.enable_grad():
            leaves = [
                x if x is None else x.detach().requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)
            ]
            o, kv, seen = _erasing(*leaves, rule=chunk)
        ctx.inner = [x for x, want in zip(leaves, wanted, strict=True) if want], (o, kv)
        ctx.mark_non_differentiable(seen)
        return o.detach(), kv.detach(), seen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, wanted, grads = ctx.saved_tensors, ctx.needs_input_grad[1:], grads[:2]
        if torch.is_grad_enabled() or is_transformed(*grads, *tensors):
            plain = partial(plain_gated, causal=True, chunk_size=CHUNK_SIZE)
            return None, *plain_gradients(plain, tensors, grads, wanted)
        leaves, outputs = ctx.inner
        reached = [(x, grad) for x, grad in zip(outputs, grads, strict=True) if grad is not None and x.requires_grad]
        if not reached:
            return (None,) * (1 + len(tensors))
        # a second backward comes where the graph around this node is kept for it, and there alone
        is_kept = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
        ends, flows = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(ends, leaves, flows, retain_graph=is_kept, allow_unused=True))
        if not is_kept:
            ctx.inner = None
        return None, *(next(found) if want else None for want in wanted)
