"""What both attention layers share: sizes, projections, rotary, and the checks of what they are called with.

class CosineAttention(ProjectedAttention): ...
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cottention.layers.maps import PackedTexts
from cottention.layers.options import WithOptions
from cottention.layers.rotary import RotaryTable, apply_rotary, packed_positions, rotary_table, sequence_of_each_token


class ProjectedAttention(WithOptions):
    """What both layers share: sizes, projections, rotary, options."""

    k_proj: nn.Linear
    v_proj: nn.Linear
    q_proj: nn.Linear
    out_proj: nn.Linear

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        *,
        causal: bool,
        head_dim: int | None = None,
        rotary_dim: int | None = None,
        bias: bool = True,
        short_conv: int | None = None,
        output_norm: bool = False,
        output_gate: str | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, num_attention_heads, head_dim, rotary_dim)
        if not isinstance(causal, bool):
            raise TypeError(f"causal must be True or False; got {causal!r}")
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.causal = causal
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.rotary_dim = rotary_dim
        inner = num_attention_heads * self.head_dim
        # The order of the published checkpoints' optimizer state.
        self.k_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.v_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.q_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.out_proj = nn.Linear(inner, hidden_size, bias=bias)
        self.add_options(
            hidden_size,
            num_attention_heads,
            self.head_dim,
            causal=causal,
            short_conv=short_conv,
            output_norm=output_norm,
            output_gate=output_gate,
        )

    def project(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        rotary: RotaryTable | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inputs: Tensor | None = None,
        keep_inputs: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v `[B, T or S, H, K]` of these tokens, convolved where the layer does so, then turned by rotary.

        The last of the four is what the convolutions of later tokens read, where it is asked for.
        """
        source = hidden_states if key_value_states is None else key_value_states
        *projected, inputs = self.convolve(
            self.q_proj(hidden_states),
            self.k_proj(source),
            self.v_proj(source),
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            inputs=inputs,
            keep_inputs=keep_inputs,
        )
        q, k, v = (x.unflatten(-1, (self.num_attention_heads, self.head_dim)) for x in projected)
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        return q, k, v, inputs

    def merge(self, o: Tensor, hidden_states: Tensor) -> Tensor:
        """Heads back to tokens: `[B, T, H, K]` to `[B, T, D]`, normed and gated where the layer does so."""
        return self.out_proj(self.finish(o, hidden_states))

    def _rotary_table(
        self,
        x: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        seen: Any,
    ) -> RotaryTable | None:
        """The table for these tokens; positions that are not given count the real tokens before each one."""
        if self.rotary_dim is None:
            if position_ids is not None:
                raise ValueError("position_ids needs a layer with rotary_dim; got a layer without")
            return None
        if position_ids is None:
            position_ids = default_positions(x, attention_mask, cu_seqlens, seen, self.process_group)
        return rotary_table(position_ids, self.rotary_dim)

    def _check_cross(self, key_value_states: Tensor | None, cu_seqlens: Tensor | None) -> None:
        if key_value_states is None:
            return
        if self.causal:
            raise ValueError("key_value_states (cross-attention) needs a layer with causal=False; got causal=True")
        if cu_seqlens is not None:
            raise ValueError("key_value_states and cu_seqlens exclude each other; got both")
        if self.short_conv is not None or self.decay is not None:
            found = f"short_conv={self.short_conv} and {'no' if self.decay is None else self.decay.kind} decay"
            raise ValueError(
                "key_value_states needs a layer without short_conv and decay, which tell how far tokens of one text "
                f"are apart; got {found}"
            )
        if self.rotary_dim is not None:
            raise ValueError(
                f"key_value_states needs a layer without rotary: positions of two texts do not compare; "
                f"got rotary_dim={self.rotary_dim}"
            )

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}, "
            f"head_dim={self.head_dim}, causal={self.causal}, rotary_dim={self.rotary_dim}{self.options_repr()}"
        )


def refuse_other_conventions(others: tuple[Tensor, ...], key_padding_mask: Tensor | None) -> None:
    """Refuse a call in nn.MultiheadAttention's manner, which would mean something else here.

    Raises:
        TypeError: it has a third tensor or a key_padding_mask; one line says what to give instead.
    """
    if others:
        raise TypeError(
            f"the layer projects q, k and v itself: give attn(x), or attn(x, key_value_states) for cross-attention, "
            f"and masks by name; got {2 + len(others)} tensors as nn.MultiheadAttention takes them"
        )
    if key_padding_mask is not None:
        raise TypeError("key_padding_mask is of the opposite sense: give attention_mask=~key_padding_mask, 1 = real")


def packed_texts(cu_seqlens: Tensor | None, map_rows: int | None, num_tokens: int) -> PackedTexts | None:
    """The texts that a map is of; None where each row is one.

    Raises:
        ValueError: texts are packed, and nothing says that a map of many is meant, or in how many rows.
    """
    if cu_seqlens is None:
        return None
    if map_rows is None:
        raise ValueError(
            "maps and cu_seqlens exclude each other without map_rows, the rows of a map that is zero between texts; "
            "got both"
        )
    if map_rows < 1 or num_tokens % map_rows:
        raise ValueError(f"map_rows must divide the number of tokens, {num_tokens}; got {map_rows}")
    return PackedTexts.of(cu_seqlens, map_rows, num_tokens)


def default_positions(
    x: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seen: Tensor | None,
    process_group: Any = None,
) -> Int[Tensor, "B T"]:
    """The number of real tokens before each one, with those that a state has seen."""
    if process_group is not None:
        from cottention.layers.slices import counts_before  # torch.distributed, for those who ask for it

        return counts_before(x, attention_mask, cu_seqlens, seen, process_group)
    T = x.shape[1]
    if cu_seqlens is not None:
        positions = packed_positions(cu_seqlens, T)
        return positions if seen is None else positions + seen[sequence_of_each_token(cu_seqlens, T)]
    if attention_mask is None:
        positions = torch.arange(T, device=x.device)[None]
    else:
        positions = (attention_mask.to(torch.int64).cumsum(-1) - 1).clamp(min=0)
    return positions if seen is None else positions + seen[:, None]


def _check_sizes(hidden_size: int, num_attention_heads: int, head_dim: int | None, rotary_dim: int | None) -> None:
    sizes = (("hidden_size", hidden_size), ("num_attention_heads", num_attention_heads), ("head_dim", head_dim))
    for name, value in sizes:
        if value is None and name == "head_dim":
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int; got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if head_dim is None:
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size; got {num_attention_heads} and {hidden_size}"
            )
        head_dim = hidden_size // num_attention_heads
    if rotary_dim is None:
        return
    if not isinstance(rotary_dim, int) or isinstance(rotary_dim, bool):
        raise TypeError(f"rotary_dim must be an int or None; got {rotary_dim!r}")
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(f"rotary_dim must be even, from 2 to the head dim {head_dim}; got {rotary_dim}")
