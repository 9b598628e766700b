"""GPT-J's rotary position embedding: interleaved pairs of dims turned by position * 10000^(-2i / rotary_dim).

The angles are computed from the positions themselves, so any position works and nothing is stored. They are computed in
float32 whatever the model's dtype, because the published models saw exactly those rounded angles: a float64 table would
move their logits by 2e-7.

    table = rotary_table(position_ids, rotary_dim=64)      # once per forward
    q, k = apply_rotary(q, table), apply_rotary(k, table)  # in every layer
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# The base of RoFormer (arXiv 2104.09864), which GPT-J and the published models share.
_BASE = 10000.0


class RotaryTable(NamedTuple):
    """Sines and cosines of every token's angles, float32.

    Attributes:
        sin: `[B, T, rotary_dim / 2]`; B may be 1, for positions that all rows share.
        cos: likewise.
    """

    sin: Float[Tensor, "B T R"]
    cos: Float[Tensor, "B T R"]


def rotary_table(position_ids: Int[Tensor, "B T"], rotary_dim: int) -> RotaryTable:
    """Sines and cosines for these positions.

    Args:
        position_ids: `[B, T]`, any non-negative integers; B may be 1.
        rotary_dim: number of dims that turn, even.

    Returns:
        The table that `apply_rotary` takes.
    Source: GPT-J's sinusoidal table, evaluated at the given positions instead of looked up.
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=position_ids.device) / rotary_dim
    frequency = 1.0 / (_BASE**exponent)  # [R]
    angle = position_ids.to(torch.float32)[..., None] * frequency  # [B, T, R]
    return RotaryTable(torch.sin(angle), torch.cos(angle))


def apply_rotary(x: Float[Tensor, "B T H K"], table: RotaryTable) -> Float[Tensor, "B T H K"]:
    """Turn the first 2 R dims of every head; the rest pass through.

    Args:
        x: queries or keys.
        table: from `rotary_table`.

    Returns:
        A new tensor in x's dtype. Half precision is turned in float32, so only the result is rounded.
    """
    sin, cos = (part[:, :, None, :] for part in table)  # [B, T, 1, R]
    rotary_dim = 2 * sin.shape[-1]
    even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]  # [B, T, H, R]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
    if rotary_dim == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def packed_positions(cu_seqlens: Int[Tensor, " N_plus_1"], num_tokens: int) -> Int[Tensor, "1 T"]:
    """Positions that restart at 0 where a packed sequence begins.

    Args:
        cu_seqlens: `[N+1]` boundaries.
        num_tokens: T, length of the packed row.

    Returns:
        `[1, T]` int64.
    """
    boundaries = cu_seqlens.to(torch.int64)
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    return (token - boundaries[sequence_of_each_token(cu_seqlens, num_tokens)])[None]


def sequence_of_each_token(cu_seqlens: Int[Tensor, " N_plus_1"], num_tokens: int) -> Int[Tensor, " T"]:
    """Index of the packed sequence that each token lies in, `[T]` int64."""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.bucketize(token, cu_seqlens[1:].to(torch.int64), right=True)
