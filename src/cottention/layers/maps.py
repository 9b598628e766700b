"""Attention maps of both kinds, [B, H, T, S], for looking at: `map @ v` is the attention's output.

The fast forms never build them. A cosine map is no distribution: its entries are from -1 to 1, divided by the length.
Of packed texts a map is zero between them; rows that were laid end to end are given back as rows, so that it costs
[B, H, T, T] rather than [1, H, B * T, B * T].

    weights = cosine_map(q, k, norm_const, causal=True)
    weights = cosine_map(q, k, norm_const, causal=True, texts=PackedTexts.of(cu_seqlens, rows=2, num_tokens=2 * T))
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cottention.layers.rotary import packed_positions, sequence_of_each_token
from cottention.layers.softmax import visible_keys
from cottention.ops.autocast import without_autocast
from cottention.ops.state import accumulation_dtype, norm_of


class PackedTexts(NamedTuple):
    """Which text each token of some rows lies in; no text runs from one row into the next.

    Attributes:
        text: `[B, T]`, the number of the token's text.
        position: `[B, T]`, tokens of the text before it.
        length: `[B, T]`, tokens of the text.
    """

    text: Int[Tensor, "B T"]
    position: Int[Tensor, "B T"]
    length: Int[Tensor, "B T"]

    @classmethod
    def of(cls, cu_seqlens: Int[Tensor, " N_plus_1"], rows: int, num_tokens: int) -> PackedTexts:
        """Those of boundaries that count through the rows laid end to end.

        Raises:
            ValueError: a text runs from one row into the next; a traced graph asserts it when it runs.
        """
        text = sequence_of_each_token(cu_seqlens, num_tokens)
        tokens = (text, packed_positions(cu_seqlens, num_tokens), cu_seqlens.to(torch.int64).diff()[text])
        texts = cls(*(each.reshape(rows, -1) for each in tokens))
        holds = (texts.position[:, :1] == 0).all()
        message = f"a map's rows must hold whole texts; one runs on from row to row of {rows}"
        if torch.compiler.is_compiling():
            torch.ops.aten._assert_async.msg(holds, message)
        elif not bool(holds):
            raise ValueError(message)
        return texts

    def as_rows(self, x: Tensor) -> Tensor:
        """`[1, B * T, ...]` back to `[B, T, ...]`."""
        return x.reshape(*self.text.shape, *x.shape[2:])

    def same(self) -> Bool[Tensor, "B 1 T T"]:
        """Which tokens are of one text."""
        return (self.text[:, :, None] == self.text[:, None, :])[:, None]


@without_autocast
def cosine_map(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S H K"],
    norm_const: Tensor | None,
    *,
    causal: bool,
    attention_mask: Int[Tensor, "B S"] | None = None,
    masks_queries: bool = True,
    texts: PackedTexts | None = None,
) -> Float[Tensor, "B H T S"]:
    """q_hat_t . k_hat_j / max(c_j ** sigmoid(m), 1), 0 where t does not see j. Quadratic.

    Args:
        q: queries.
        k: keys; with causal=True as many as queries.
        norm_const: as in `cosine_attention`.
        causal: divides by the real tokens up to each key, rather than by all of them.
        attention_mask: 1 = real.
        masks_queries: whether the mask speaks of the queries too, which it does not in cross-attention.
        texts: which text each token lies in, where rows hold several; excludes attention_mask.

    Returns:
        The map in q's dtype.
    """
    dtype = accumulation_dtype(q.dtype)
    B, S = k.shape[:2]
    real = torch.ones(B, S, dtype=torch.bool, device=k.device) if attention_mask is None else attention_mask.bool()
    q_hat, k_hat = (x / norm_of(x) for x in (q.to(dtype), k.to(dtype)))
    k_hat = k_hat.masked_fill(~real[..., None, None], 0)  # a product would keep what is NaN there
    if masks_queries:
        q_hat = q_hat.masked_fill(~real[..., None, None], 0)
    weights = torch.einsum("bthk,bshk->bhts", q_hat, k_hat)
    if norm_const is not None:
        if texts is not None:
            count = texts.position + 1 if causal else texts.length  # [B, S]
        else:
            count = real.cumsum(-1) if causal else real.sum(-1, keepdim=True).expand(B, S)
        p = torch.sigmoid(norm_const.to(dtype)).reshape(1, -1, 1, 1)
        weights = weights / count.clamp(min=1).to(dtype)[:, None, None, :] ** p  # [B, H, 1, S]
    if texts is not None:
        weights = weights.masked_fill(~texts.same(), 0)
    return (weights.tril() if causal else weights).to(q.dtype)


@without_autocast
def decayed_map(
    weights: Float[Tensor, "B H T T"],
    log_decay: Float[Tensor, "B T H"],
    attention_mask: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H T T"]:
    """The map times exp(-|G_t - G_j|), what is left at a distance; G is the running sum of log_decay over real tokens.

    Args:
        weights: of `cosine_map`.
        log_decay: as in `cosine_attention`.
        attention_mask: 1 = real.

    Returns:
        The map in its dtype.
    """
    steps = log_decay.double()  # whose differences keep their digits
    if attention_mask is not None:
        steps = steps.masked_fill(~attention_mask.to(torch.bool)[..., None], 0)
    G = steps.cumsum(1).transpose(1, 2)  # [B, H, T]
    left = (G[..., :, None] - G[..., None, :]).abs().neg().exp()
    return (weights * left).to(weights.dtype)


def map_context(
    weights: Float[Tensor, "B H T S"],
    v: Float[Tensor, "B S H V"],
    attention_mask: Int[Tensor, "B S"] | None = None,
    texts: PackedTexts | None = None,
) -> Float[Tensor, "B T H V"]:
    """map @ v: the context that a map stands for, through which the map gets its gradient.

    Args:
        weights: the map.
        v: values; what stands at padding has no part.
        attention_mask: 1 = real.
        texts: of the map, whose rows v holds end to end, `[1, B * S, H, V]`; the context comes likewise.

    Returns:
        The context of every query and head.
    """
    if texts is not None:
        return map_context(weights, texts.as_rows(v)).reshape(v.shape)
    if attention_mask is not None:
        v = v.masked_fill(~attention_mask.to(torch.bool)[..., None, None], 0)
    return torch.einsum("bhts,bshv->bthv", weights, v)


@without_autocast
def softmax_map(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S H K"],
    *,
    causal: bool,
    attention_mask: Int[Tensor, "B S"] | None = None,
    sliding_window: int | None = None,
    texts: PackedTexts | None = None,
) -> Float[Tensor, "B H T S"]:
    """softmax(q k^T / sqrt(K)) over the keys that each query sees.

    Args:
        q: queries; with causal=True they are the last T of the S positions.
        k: keys.
        causal: whether a query sees only keys at or before its own position.
        attention_mask: 1 = real key.
        sliding_window: real tokens that a query sees at the most, its own among them; None: all. Needs causal=True.
        texts: as in `cosine_map`; needs T == S.

    Returns:
        The map in q's dtype.
    """
    T, S, dtype = q.shape[1], k.shape[1], accumulation_dtype(q.dtype)
    scores = torch.einsum("bthk,bshk->bhts", q.to(dtype), k.to(dtype)) / q.shape[-1] ** 0.5
    needs_triangle = causal and (T > 1 or sliding_window is not None)
    visible = visible_keys(T, S, attention_mask, needs_triangle, q.device, sliding_window)
    if texts is not None:
        visible = texts.same() if visible is None else visible & texts.same()
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1).to(q.dtype)
