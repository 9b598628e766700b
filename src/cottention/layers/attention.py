"""CosineAttention: projections, rotary embedding, attention, output projection.

It goes where an nn.MultiheadAttention would: tokens in, tokens of the same width out, plus a state for decoding.

    attn = CosineAttention(hidden_size=512, num_attention_heads=8, causal=True)
    x, _ = attn(x)                                          # x: [B, T, D]
    x, state = attn(x, output_final_state=True)             # and later attn(next_x, initial_state=state, ...)
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from cottention.layers.maps import cosine_map, map_context
from cottention.layers.projected import ProjectedAttention, check_maps, refuse_other_conventions
from cottention.layers.rotary import RotaryTable
from cottention.ops import CosineState, cosine_attention, cosine_attention_step


def new_norm_const(num_attention_heads: int, start: float) -> nn.Parameter:
    """The learned exponents, in float32 where the default type is a shorter one, which would move the divisor."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return nn.Parameter(torch.full((1, num_attention_heads, 1, 1), float(start), dtype=dtype))


class CosineAttention(ProjectedAttention):
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
        *others: Tensor,
        attention_mask: Int[Tensor, "B S"] | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        rotary: RotaryTable | None = None,
        initial_state: CosineState | None = None,
        output_final_state: bool = False,
        maps: list[Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
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
            others: nothing; what nn.MultiheadAttention takes there is refused in a line that says what to give.
            key_padding_mask: nothing, likewise.

        Returns:
            The output, and the state when asked for, else None.

        Raises:
            ValueError: arguments contradict each other or the layer's settings.
            TypeError: the call is one of nn.MultiheadAttention.
        """
        refuse_other_conventions(others, key_padding_mask)
        self._check_cross(key_value_states, cu_seqlens)
        if rotary is None:
            seen = None if initial_state is None else initial_state.seen
            rotary = self._rotary_table(hidden_states, position_ids, attention_mask, cu_seqlens, seen)
        q, k, v = self.project(hidden_states, key_value_states, rotary)
        context = None
        if maps is not None:
            if initial_state is not None:
                raise ValueError("maps need every key, of which a state of cosine attention keeps none; got both")
            check_maps(cu_seqlens)
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

    def empty_state(self, B: int) -> CosineState:
        """The state of B rows before the first token."""
        weight = self.k_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        sizes = (B, self.num_attention_heads, self.head_dim, self.head_dim)
        return CosineState.zeros(*sizes, dtype=dtype, device=weight.device)

    def _is_one_step(self, q: Tensor, initial_state: CosineState | None, cu_seqlens: Tensor | None) -> bool:
        """Whether the recurrent step serves; a form that was asked for by name is never replaced by it."""
        decodes = initial_state is not None and self.causal and q.shape[1] == 1
        return decodes and cu_seqlens is None and self.implementation == "auto"
