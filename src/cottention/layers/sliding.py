"""Softmax attention over a window: a query sees its own token and the sliding_window - 1 real ones before it.

Padding fills no place in a window, so that it may stand anywhere: rows are first closed up, which is one gather. A long
row is then cut in blocks of a window's length, each of which sees itself and the block before it: T x 2 windows of
scores instead of T x T.

    o = banded_attention(q, k, v, attention_mask, 256, dropout_p=0.0)      # q: [B, T, H, K], k, v: [B, S, H, K]
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

# Shorter windows than this share a block: SDPA's time is then that of its calls.
_SMALLEST_BLOCK = 64


def within_window(
    T: int, S: int, attention_mask: Tensor | None, sliding_window: int, device: torch.device
) -> Bool[Tensor, ...]:
    """Which keys are no further behind a query than its window, `[T, S]` or, with a mask, `[B, 1, T, S]`.

    The queries are the last T of the S tokens; keys behind a query are within too.
    """
    if attention_mask is None:
        return torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T + 1 - sliding_window)
    count = attention_mask.to(torch.bool).cumsum(-1)  # [B, S]
    return (count[:, None, S - T :, None] - count[:, None, None, :]) < sliding_window


def is_narrow(T: int, S: int, sliding_window: int) -> bool:
    """Whether a band costs less than a mask over all T x S pairs."""
    block = max(sliding_window, _SMALLEST_BLOCK)
    return T > 1 and 2 * block < S


def banded_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S H K"],
    v: Float[Tensor, "B S H V"],
    attention_mask: Int[Tensor, "B S"] | None,
    sliding_window: int,
    dropout_p: float,
) -> Float[Tensor, "B T H V"]:
    """Attention within a window in O(S * sliding_window) time and memory; queries are the last T of the S tokens."""
    T, S = q.shape[1], k.shape[1]
    q = pad(q, (0, 0, 0, 0, S - T, 0))
    if attention_mask is None:
        return _band(q, k, v, sliding_window, dropout_p)[:, S - T :]
    # Real tokens first, in their order: those behind them are seen by none of them.
    order = (attention_mask == 0).to(torch.uint8).argsort(dim=-1, stable=True)
    q, k, v = (take_tokens(x, order) for x in (q, k, v))
    o = _band(q, k, v, sliding_window, dropout_p)
    return take_tokens(o, order.argsort(dim=-1))[:, S - T :]


def take_tokens(x: Tensor, order: Int[Tensor, "B S"]) -> Tensor:
    """Tokens of every row, `[B, S, ...]`, in this order."""
    index = order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def _band(q: Tensor, k: Tensor, v: Tensor, sliding_window: int, dropout_p: float) -> Tensor:
    B, S, H = q.shape[:3]
    block = max(sliding_window, _SMALLEST_BLOCK)
    num_blocks = -(-S // block)
    # [B, blocks, block, H, K]; what fills up the last block stands behind every token
    q, k, v = (pad(x, (0, 0, 0, 0, 0, num_blocks * block - S)).unflatten(1, (num_blocks, block)) for x in (q, k, v))
    k_before, v_before = (torch.cat([x[:, :-1], x[:, 1:]], dim=2) for x in (k, v))
    mask = torch.ones(block, 2 * block, dtype=torch.bool, device=q.device).tril(block).triu(block + 1 - sliding_window)
    first = _attend_blocks(q[:, :1], k[:, :1], v[:, :1], mask[:, block:], dropout_p)
    others = _attend_blocks(q[:, 1:], k_before, v_before, mask, dropout_p)
    return torch.cat([first, others], dim=1).reshape(B, num_blocks * block, H, -1)[:, :S]


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout_p: float) -> Tensor:
    """Each block by itself, `[B, blocks, tokens, H, K]`."""
    heads_first = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    o = scaled_dot_product_attention(*heads_first, attn_mask=mask, dropout_p=dropout_p)
    return o.transpose(1, 2).unflatten(0, q.shape[:2])
