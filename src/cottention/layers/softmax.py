"""Softmax attention with the arguments of `cosine_attention`, on torch's scaled_dot_product_attention.

It is the other half of every comparison: same layout, same masks, same packing. Packed sequences are attended one after
the other, so no mask over the whole pack exists; a T x T mask is built only where padding and causality meet, where
queries continue a cache, or for a pack in a compiled graph, which cannot have as many parts as there are sequences.
With a window the work and the memory are those of a band (`layers/sliding.py`).

    o = softmax_attention(q, k, v, causal=True, attention_mask=mask)      # q: [B, T, H, K], k, v: [B, S, H, K]
    o = softmax_attention(q, k, v, causal=True, sliding_window=256)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cottention.layers.rotary import sequence_of_each_token
from cottention.layers.sliding import banded_attention, is_narrow, within_window


def softmax_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S H K"],
    v: Float[Tensor, "B S H V"],
    *,
    causal: bool,
    attention_mask: Int[Tensor, "B S"] | None = None,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
    dropout_p: float = 0.0,
    sliding_window: int | None = None,
    process_group: Any = None,
) -> Float[Tensor, "B T H V"]:
    """softmax(q k^T / sqrt(K)) v.

    Args:
        q: queries; with causal=True they are the last T of the S positions.
        k: keys.
        v: values.
        causal: whether a query sees only keys at or before its own position.
        attention_mask: `[B, S]`, 1 = real key. Queries at padded positions give finite numbers that mean nothing.
        cu_seqlens: `[N+1]` boundaries of packed sequences; needs B == 1, T == S and no attention_mask.
        dropout_p: chance of dropping an attention weight.
        sliding_window: real tokens that a query sees at the most, its own among them; None: all. Needs causal=True.
        process_group: ranks that share the sequence, as in `cosine_attention`; each receives the keys and values of
            all, whose bytes grow with the sequence.

    Returns:
        `[B, T, H, V]` in q's dtype.

    Raises:
        ValueError: shapes or arguments contradict each other.
    """
    if process_group is not None:
        from cottention.layers.slices import softmax_over_slices  # torch.distributed, for those who ask for it

        return softmax_over_slices(
            softmax_attention,
            q,
            k,
            v,
            causal=causal,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            process_group=process_group,
            dropout_p=dropout_p,
            sliding_window=sliding_window,
        )
    T, S = q.shape[1], k.shape[1]
    if causal and T > S:
        raise ValueError(f"causal=True needs at least as many keys as queries; got {T} queries and {S} keys")
    if sliding_window is not None and (not causal or sliding_window < 1):
        raise ValueError(
            f"sliding_window must be at least 1 token, of causal=True; got {sliding_window} and causal={causal}"
        )
    if cu_seqlens is not None:
        _check_packing(q, k, attention_mask)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return _attend_masked(q, k, v, _same_sequence(cu_seqlens, T, causal, sliding_window), dropout_p)
        lengths = [length for length in cu_seqlens.diff().tolist() if length]
        if sum(lengths) != T:
            raise ValueError(f"cu_seqlens must run from 0 to T={T}; got {sum(lengths)} tokens between its bounds")
        # Split, not sliced: the gradient of a slice is as long as the whole pack, one for each sequence.
        q_parts, k_parts, v_parts = (x.split(lengths, dim=1) for x in (q, k, v))
        sequences = zip(q_parts, k_parts, v_parts, strict=True)
        parts = [_attend(*sequence, causal, None, dropout_p, sliding_window) for sequence in sequences]
        return torch.cat(parts, dim=1) if parts else v.new_zeros(1, 0, *v.shape[2:])
    if attention_mask is not None and tuple(attention_mask.shape) != (q.shape[0], S):
        raise ValueError(f"attention_mask must have shape [B, S] = {[q.shape[0], S]}; got {list(attention_mask.shape)}")
    return _attend(q, k, v, causal, attention_mask, dropout_p, sliding_window)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    attention_mask: Tensor | None,
    dropout_p: float,
    sliding_window: int | None,
) -> Tensor:
    T, S = q.shape[1], k.shape[1]
    # An exported or traced program is for any length: it cannot choose by it.
    if sliding_window is not None and not (torch.compiler.is_exporting() or torch.jit.is_tracing()):  # pyright: ignore[reportPrivateImportUsage]
        if sliding_window >= S:
            sliding_window = None  # which hides nothing
        elif is_narrow(T, S, sliding_window):
            return banded_attention(q, k, v, attention_mask, sliding_window, dropout_p)
    needs_triangle = causal and (T > 1 or sliding_window is not None)
    is_causal = needs_triangle and T == S and attention_mask is None and sliding_window is None
    mask = None if is_causal else visible_keys(T, S, attention_mask, needs_triangle, q.device, sliding_window)
    return _attend_masked(q, k, v, mask, dropout_p, is_causal)


def _attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool = False
) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    o = scaled_dot_product_attention(*heads_first, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal)
    return o.transpose(1, 2)  # [B, T, H, V]


def _same_sequence(cu_seqlens: Tensor, T: int, causal: bool, sliding_window: int | None) -> Tensor:
    """Which keys of a pack each query sees, `[T, T]`."""
    sequence = sequence_of_each_token(cu_seqlens, T)
    same = sequence[:, None] == sequence
    if sliding_window is not None:
        same = same.triu(1 - sliding_window)
    return same.tril() if causal else same


def visible_keys(
    T: int,
    S: int,
    attention_mask: Tensor | None,
    needs_triangle: bool,
    device: torch.device,
    sliding_window: int | None = None,
) -> Tensor | None:
    """Which keys each query sees, broadcastable to `[B, H, T, S]`; None for all. A window needs the triangle."""
    visible = None if attention_mask is None else attention_mask.to(torch.bool)[:, None, None, :]
    if needs_triangle:
        triangle = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
        if sliding_window is not None:
            triangle = triangle & within_window(T, S, attention_mask, sliding_window, device)
        if visible is None:
            return triangle
        # Every query also sees itself: without any key it would be 0 / 0, whose NaN reaches real tokens by gradient.
        visible = (visible & triangle) | (triangle & triangle.new_ones(T, S).triu(S - T))
    elif visible is not None:
        # Likewise for a row that is padding throughout.
        visible = visible | ~visible.any(dim=-1, keepdim=True)
    return visible


def _check_packing(q: Tensor, k: Tensor, attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError("attention_mask and cu_seqlens exclude each other: packed sequences hold no padding; got both")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs a batch of one packed row, B=1; got B={q.shape[0]}")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"cu_seqlens needs q and k of the same length; got T={q.shape[1]} and T={k.shape[1]}")
