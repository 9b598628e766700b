"""Cosine attention in differentiable PyTorch operators and linear memory: the form that any transform can go through.

The fused forms have a forward and a backward of their own. What else is asked of them is computed here, by autograd:
derivatives of derivatives, forward-mode tangents, torch.func. Chunks of C tokens as in `chunk.py`, all at once:

    S_n = S_0 + sum_{i < n} k_hat_i^T v'_i          v' = v / max(c ** p, 1)
    o_n = q_hat_n S_n + tril(q_hat_n k_hat_n^T) v'_n

No shape depends on a value and no value is read, so these forms can be mapped, traced and exported for any length.

    o, kv, seen = plain_causal(q, k, v, m, mask, cu_seqlens, kv0, seen0, True)
"""

from __future__ import annotations

import torch
from torch import Tensor

from cottention.ops.autocast import without_autocast
from cottention.ops.layouts import CHUNK_SIZE, Packed, divided, finished, layout_of, unit
from cottention.ops.state import CosineState, accumulation_dtype, norm_of


def plain_cosine_attention(
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
) -> tuple[Tensor, CosineState | None]:
    """Same numbers as `naive_cosine_attention`; `chunk_size` is not asked. For the arguments see `cosine_attention`."""
    inputs = (q, k, v, norm_const, attention_mask, cu_seqlens)
    if not causal:
        return plain_bidirectional(*inputs)[0], None
    o, kv, seen = plain_causal(*inputs, *(initial_state or (None, None)))
    return o, CosineState(kv, seen) if output_final_state else None


@without_autocast
def plain_causal(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,
    v: Tensor,  # [B, T, H, V]
    norm_const: Tensor | None,  # [H]
    mask: Tensor | None,  # [B, T] bool
    cu_seqlens: Tensor | None,  # [N+1]
    kv: Tensor | None,  # [N, H, K, V]
    seen: Tensor | None,  # [N]
) -> tuple[Tensor, Tensor, Tensor]:
    """o `[B, T, H, V]`, and the kv and seen that are reached."""
    layout = layout_of(q, cu_seqlens)
    q_hat, k_hat = (layout.chunks(unit(x, mask)) for x in (q, k))  # [R, M, C, H, K]
    count, total = layout.counts(mask, seen)
    value = layout.chunks(divided(v, norm_const, count, mask))  # [R, M, C, H, V]
    states = torch.einsum("rmchk,rmchv->rmhkv", k_hat, value)
    before, reached = layout.scan(states, kv)
    scores = torch.einsum("rmchk,rmdhk->rmhcd", q_hat, k_hat).tril()
    o = torch.einsum("rmhcd,rmdhv->rmchv", scores, value) + torch.einsum("rmchk,rmhkv->rmchv", q_hat, before)
    return finished(layout.tokens(o), q, mask), reached, total


@without_autocast
def plain_bidirectional(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, S, H, K]
    v: Tensor,  # [B, S, H, V]
    norm_const: Tensor | None,  # [H]
    mask: Tensor | None,  # [B, S] bool
    cu_seqlens: Tensor | None,  # [N+1]
) -> tuple[Tensor, Tensor]:
    """o `[B, T, H, V]`, and each sequence's state over all its keys `[N, H, K, V]`."""
    query_mask = mask if q.shape[1] == k.shape[1] else None  # in cross-attention the mask speaks of the keys alone
    q_hat, k_hat = unit(q, query_mask), unit(k, mask)
    if cu_seqlens is None:
        B, S = k.shape[:2]
        total = torch.full((B, 1), S, device=k.device) if mask is None else mask.sum(-1, keepdim=True)  # [B, 1]
        kv = torch.einsum("bshk,bshv->bhkv", k_hat, divided(v, norm_const, total, mask))
        return finished(torch.einsum("bthk,bhkv->bthv", q_hat, kv), q, query_mask), kv
    layout = Packed(q, cu_seqlens, CHUNK_SIZE)
    _, total = layout.counts(mask, None)
    value = layout.chunks(divided(v, norm_const, total[layout.sequence][None], mask))
    kv = layout.sums(torch.einsum("rmchk,rmchv->rmhkv", layout.chunks(k_hat), value))
    o = torch.einsum("rmchk,rmhkv->rmchv", layout.chunks(q_hat), layout.of_chunks(kv))
    return finished(layout.tokens(o), q, query_mask), kv


@without_autocast
def plain_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    state: CosineState | None,
    attention_mask: Tensor | None,
    log_decay: Tensor | None = None,  # [B, H] or [B, 1, H]
    beta: Tensor | None = None,
) -> tuple[Tensor, CosineState]:
    """One token, for the checked arguments of `cosine_attention_step`."""
    q1, k1, v1 = (x.squeeze(1) if x.dim() == 4 else x for x in (q, k, v))  # [B, H, K or V]
    B, H, K = q1.shape
    dtype = accumulation_dtype(q.dtype)
    if state is None:
        state = CosineState.zeros(B, H, K, v1.shape[-1], dtype=dtype, device=q.device)
    real = None
    if attention_mask is not None:
        real = attention_mask.reshape(B).to(torch.bool)
        q1, k1, v1 = (x.masked_fill(~real[:, None, None], 0) for x in (q1, k1, v1))
    q_hat, k_hat = (x / norm_of(x) for x in (q1.to(dtype), k1.to(dtype)))
    seen = state.seen + (1 if real is None else real.to(torch.int64))  # [B]
    value = v1.to(dtype)
    if norm_const is not None:
        p = torch.sigmoid(norm_const.to(dtype))  # [H]
        value = value / (seen.clamp(min=1).to(dtype)[:, None] ** p)[..., None]
    kv = state.kv
    if log_decay is not None:
        decay = log_decay.reshape(B, H).to(dtype)
        decay = decay if real is None else decay.masked_fill(~real[:, None], 0)
        kv = decay.exp()[..., None, None] * kv
    if beta is not None:
        strength = beta.reshape(B, H).to(dtype)
        strength = strength if real is None else strength.masked_fill(~real[:, None], 0)
        value = strength[..., None] * (value - torch.einsum("bhk,bhkv->bhv", k_hat, kv))
    kv = kv + k_hat[..., None] * value[..., None, :]  # [B, H, K, V]
    o = torch.einsum("bhk,bhkv->bhv", q_hat, kv)
    if real is not None:  # zero already; this is for what flows back
        o = o.masked_fill(~real[:, None, None], 0)
    return o.to(q.dtype).reshape(*q.shape[:-1], v.shape[-1]), CosineState(kv, seen)
