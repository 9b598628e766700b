"""CosineAttention and SoftmaxAttention: projections, rotary embedding, attention, output projection.

Both go where an nn.MultiheadAttention would: tokens in, tokens of the same width out, plus a state for decoding.

    attn = CosineAttention(hidden_size=512, num_attention_heads=8, causal=True)
    x, _ = attn(x)                                          # x: [B, T, D]
    x, state = attn(x, output_final_state=True)             # and later attn(next_x, initial_state=state, ...)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import dropout, pad

from cottention.layers.maps import cosine_map, map_context, softmax_map
from cottention.layers.rotary import RotaryTable, apply_rotary, packed_positions, rotary_table, sequence_of_each_token
from cottention.layers.softmax import softmax_attention
from cottention.ops import CosineState, cosine_attention, cosine_attention_step


class KeyValueState(NamedTuple):
    """What softmax attention remembers: every key and value.

    Attributes:
        k: `[B, S, H, K]`, rotary applied.
        v: `[B, S, H, K]`.
        real: `[B, S]`, which of them are no padding.
    """

    k: Float[Tensor, "B S H K"]
    v: Float[Tensor, "B S H K"]
    real: Bool[Tensor, "B S"]

    @property
    def seen(self) -> Int[Tensor, " B"]:
        """Number of real tokens per row."""
        return self.real.sum(-1)


class _ProjectedAttention(nn.Module):
    """What both layers share: sizes, projections, rotary."""

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

    def project(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, rotary: RotaryTable | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, T or S, H, K]` of these tokens, rotary applied to q and k when a table is given."""
        source = hidden_states if key_value_states is None else key_value_states
        q, k, v = (
            projection(x).unflatten(-1, (self.num_attention_heads, self.head_dim))
            for projection, x in ((self.q_proj, hidden_states), (self.k_proj, source), (self.v_proj, source))
        )
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        return q, k, v

    def merge(self, o: Tensor) -> Tensor:
        """Heads back to tokens: `[B, T, H, K]` to `[B, T, D]`."""
        return self.out_proj(o.flatten(-2))

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
            position_ids = _default_positions(x, attention_mask, cu_seqlens, seen)
        return rotary_table(position_ids, self.rotary_dim)

    def _check_cross(self, key_value_states: Tensor | None, cu_seqlens: Tensor | None) -> None:
        if key_value_states is None:
            return
        if self.causal:
            raise ValueError("key_value_states (cross-attention) needs a layer with causal=False; got causal=True")
        if cu_seqlens is not None:
            raise ValueError("key_value_states and cu_seqlens exclude each other; got both")
        if self.rotary_dim is not None:
            raise ValueError(
                f"key_value_states needs a layer without rotary: positions of two texts do not compare; "
                f"got rotary_dim={self.rotary_dim}"
            )

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_attention_heads={self.num_attention_heads}, "
            f"head_dim={self.head_dim}, causal={self.causal}, rotary_dim={self.rotary_dim}"
        )


def new_norm_const(num_attention_heads: int, start: float) -> nn.Parameter:
    """The learned exponents, in float32 where the default type is a shorter one, which would move the divisor."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return nn.Parameter(torch.full((1, num_attention_heads, 1, 1), float(start), dtype=dtype))


class CosineAttention(_ProjectedAttention):
    """Multi-head cosine attention in O(T) time and memory.

    Args:
        hidden_size: D, width of the tokens.
        num_attention_heads: H.
        causal: whether a token sees only itself and what came before it.
        head_dim: K; None: hidden_size / num_attention_heads.
        rotary_dim: dims of each head that get GPT-J's rotary embedding; None: none.
        bias: whether the four projections have one.
        norm_const_init: start of every head's learned exponent, before its sigmoid.
        implementation: which form of the operation runs, "auto" or a name in `cottention.ops.IMPLEMENTATIONS`.

    Raises:
        ValueError: sizes do not fit together.
    """

    norm_const: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        *,
        causal: bool,
        head_dim: int | None = None,
        rotary_dim: int | None = None,
        bias: bool = True,
        norm_const_init: float = 0.5,
        implementation: str = "auto",
    ) -> None:
        super().__init__(
            hidden_size, num_attention_heads, causal=causal, head_dim=head_dim, rotary_dim=rotary_dim, bias=bias
        )
        self.implementation = implementation
        self.norm_const = new_norm_const(num_attention_heads, norm_const_init)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        key_value_states: Float[Tensor, "B S D"] | None = None,
        *,
        attention_mask: Int[Tensor, "B S"] | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        rotary: RotaryTable | None = None,
        initial_state: CosineState | None = None,
        output_final_state: bool = False,
        maps: list[Tensor] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], CosineState | None]:
        """Attend.

        Args:
            hidden_states: tokens that ask.
            key_value_states: tokens that answer, for cross-attention; None: the same tokens.
            attention_mask: 1 = real, one per answering token; padding may be anywhere.
            cu_seqlens: boundaries of packed sequences; needs B == 1 and no attention_mask.
            position_ids: for rotary; None: the number of real tokens before each one, counting those in the state.
            rotary: the finished table instead of position_ids, when several layers share it.
            initial_state: what came before (causal only).
            output_final_state: whether to return the state after the last token.
            maps: a list that takes up the attention map `[B, H, T, S]`; costs T x S memory.

        Returns:
            The output, and the state when asked for, else None.

        Raises:
            ValueError: arguments contradict each other or the layer's settings.
        """
        self._check_cross(key_value_states, cu_seqlens)
        if rotary is None:
            seen = None if initial_state is None else initial_state.seen
            rotary = self._rotary_table(hidden_states, position_ids, attention_mask, cu_seqlens, seen)
        q, k, v = self.project(hidden_states, key_value_states, rotary)
        context = None
        if maps is not None:
            if initial_state is not None:
                raise ValueError("maps need every key, of which a state of cosine attention keeps none; got both")
            _check_maps(cu_seqlens)
            of_itself = key_value_states is None
            maps.append(
                cosine_map(
                    q, k, self.norm_const, causal=self.causal, attention_mask=attention_mask, masks_queries=of_itself
                )
            )
            context = map_context(maps[-1], v, attention_mask)
            if not output_final_state:
                return self.merge(context), None
        if self._is_one_step(q, initial_state, cu_seqlens):
            o, state = cosine_attention_step(q, k, v, self.norm_const, initial_state, attention_mask=attention_mask)
            return self.merge(o), state if output_final_state else None
        if key_value_states is not None and attention_mask is not None and q.shape[1] == k.shape[1]:
            # The operation reads a mask over T == S as masking queries too; one more padded key says that it is not.
            k, v = (pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
            attention_mask = pad(attention_mask, (0, 1))
        o, state = cosine_attention(
            q,
            k,
            v,
            self.norm_const,
            causal=self.causal,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            output_final_state=output_final_state,
            implementation=self.implementation,
        )
        return self.merge(o if context is None else context), state

    def _is_one_step(self, q: Tensor, initial_state: CosineState | None, cu_seqlens: Tensor | None) -> bool:
        """Whether the recurrent step serves; a form that was asked for by name is never replaced by it."""
        decodes = initial_state is not None and self.causal and q.shape[1] == 1
        return decodes and cu_seqlens is None and self.implementation == "auto"


class SoftmaxAttention(_ProjectedAttention):
    """The softmax twin of `CosineAttention`, on scaled_dot_product_attention; its weights lack norm_const only.

    Args:
        hidden_size: D, width of the tokens.
        num_attention_heads: H.
        causal: whether a token sees only itself and what came before it.
        head_dim: K; None: hidden_size / num_attention_heads.
        rotary_dim: dims of each head that get GPT-J's rotary embedding; None: none.
        bias: whether the four projections have one.
        dropout: chance of dropping an attention weight while training.

    Raises:
        ValueError: sizes do not fit together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        *,
        causal: bool,
        head_dim: int | None = None,
        rotary_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            hidden_size, num_attention_heads, causal=causal, head_dim=head_dim, rotary_dim=rotary_dim, bias=bias
        )
        self.dropout = dropout

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        key_value_states: Float[Tensor, "B S D"] | None = None,
        *,
        attention_mask: Int[Tensor, "B S"] | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        rotary: RotaryTable | None = None,
        initial_state: KeyValueState | None = None,
        output_final_state: bool = False,
        maps: list[Tensor] | None = None,
        extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValueState | None]:
        """Attend; the arguments are those of `CosineAttention.forward`, the state holds every key and value.

        `extend` is for caches of another kind than the state: it takes these tokens' keys and values and returns all.

        Raises:
            ValueError: arguments contradict each other or the layer's settings.
        """
        self._check_cross(key_value_states, cu_seqlens)
        wants_state = initial_state is not None or output_final_state
        if wants_state and not self.causal:
            raise ValueError("initial_state and output_final_state need a layer with causal=True; got causal=False")
        if wants_state and cu_seqlens is not None:
            raise ValueError("a state and cu_seqlens exclude each other in SoftmaxAttention; got both")
        if rotary is None:
            seen = None if initial_state is None else initial_state.seen
            rotary = self._rotary_table(hidden_states, position_ids, attention_mask, cu_seqlens, seen)
        q, k, v = self.project(hidden_states, key_value_states, rotary)
        state = None
        if wants_state:
            state = _extended(initial_state, k, v, attention_mask)
            k, v, attention_mask = state
        if extend is not None:
            k, v = extend(k, v)
        o = self.attend(q, k, v, attention_mask=attention_mask, cu_seqlens=cu_seqlens, maps=maps)
        return self.merge(o), state if output_final_state else None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Attention between projected tokens `[B, T or S, H, K]`; S may exceed T, when keys come from a cache."""
        if maps is not None:
            _check_maps(cu_seqlens)
            weights = softmax_map(q, k, causal=self.causal, attention_mask=attention_mask)
            maps.append(dropout(weights, self.dropout, self.training))  # what is dropped is missing from the map too
            return torch.einsum("bhts,bshv->bthv", maps[-1], v)
        return softmax_attention(
            q,
            k,
            v,
            causal=self.causal,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            dropout_p=self.dropout if self.training else 0.0,
        )


def _check_maps(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise ValueError("maps and cu_seqlens exclude each other: a map across packed texts is empty; got both")


def _extended(state: KeyValueState | None, k: Tensor, v: Tensor, attention_mask: Tensor | None) -> KeyValueState:
    real = k.new_ones(k.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask.to(torch.bool)
    if state is None:
        return KeyValueState(k, v, real)
    pairs = zip(state, (k, v, real), strict=True)
    return KeyValueState(*(torch.cat(pair, dim=1) for pair in pairs))


def _default_positions(
    x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, seen: Tensor | None
) -> Int[Tensor, "B T"]:
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
