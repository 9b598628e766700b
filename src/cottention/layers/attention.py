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

from cottention.layers.maps import PackedTexts, cosine_map, decayed_map, map_context
from cottention.layers.options import divide_queries
from cottention.layers.projected import ProjectedAttention, default_positions, packed_texts, refuse_other_conventions
from cottention.layers.rotary import RotaryTable
from cottention.layers.states import AttentionState, split_state
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
        short_conv: tokens that a depthwise convolution and SiLU of queries, keys and values see, up to 64: with
            causal=True the last ones, else the ones around; None or 0: no convolution.
        output_norm: whether each head's output is divided by its root mean square.
        output_gate: "sigmoid" (open at the start) or "silu" of a projection of the tokens, times the output; None: no
            gate.
        decay: "none", or what a head keeps of its state from token to token: "fixed", "learned" or, from a projection
            of each token, "data". With causal=False it weighs keys by their distance.
        longest_half_life: tokens after which the head that forgets least has kept one half, at the start; the others
            are spread from 8 tokens on.
        erase: whether a token overwrites what the state holds at its key (the delta rule); causal only.
        divisor: "key" divides each value by a power of the tokens up to it, as published; "query" the output by that of
            the tokens up to the query; "none" divides by nothing.
        implementation: which form of the operation runs, "auto" or a name in `cottention.ops.IMPLEMENTATIONS`.

    Raises:
        ValueError: sizes do not fit together, or an option has no such value.
    """

    norm_const: nn.Parameter | None

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
        short_conv: int | None = None,
        output_norm: bool = False,
        output_gate: str | None = None,
        decay: str = "none",
        longest_half_life: int = 2048,
        erase: bool = False,
        divisor: str = "key",
        implementation: str = "auto",
    ) -> None:
        super().__init__(
            hidden_size,
            num_attention_heads,
            causal=causal,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            bias=bias,
            short_conv=short_conv,
            output_norm=output_norm,
            output_gate=output_gate,
        )
        self.implementation = implementation
        self.add_memory_options(
            hidden_size,
            num_attention_heads,
            causal=causal,
            decay=decay,
            longest_half_life=longest_half_life,
            erase=erase,
            divisor=divisor,
        )
        self.norm_const = None if divisor == "none" else new_norm_const(num_attention_heads, norm_const_init)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        key_value_states: Float[Tensor, "B S D"] | None = None,
        *others: Tensor,
        attention_mask: Int[Tensor, "B S"] | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        rotary: RotaryTable | None = None,
        initial_state: CosineState | AttentionState | None = None,
        output_final_state: bool = False,
        maps: list[Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        map_rows: int | None = None,
    ) -> tuple[Float[Tensor, "B T D"], CosineState | AttentionState | None]:
        """Attend.

        Args:
            hidden_states: tokens that ask.
            key_value_states: tokens that answer, for cross-attention; None: the same tokens.
            attention_mask: 1 = real, one per answering token; padding may be anywhere.
            cu_seqlens: boundaries of packed sequences; needs B == 1 and no attention_mask.
            position_ids: for rotary; None: the number of real tokens before each one, counting those in the state.
            rotary: the finished table instead of position_ids, when several layers share it.
            initial_state: what came before (causal only), an `AttentionState` for a layer with short_conv.
            output_final_state: whether to return the state after the last token.
            maps: a list that takes up the attention map `[B, H, T, S]`; costs T x S memory; not with erase.
            map_rows: with maps and cu_seqlens: the rows that were laid end to end, of which no text leaves its own;
                the map is `[map_rows, H, T / map_rows, T / map_rows]`, zero between texts.
            others: nothing; what nn.MultiheadAttention takes there is refused in a line that says what to give.
            key_padding_mask: nothing, likewise.

        Returns:
            The output, and the state when asked for, else None.

        Raises:
            ValueError: arguments contradict each other or the layer's settings.
            TypeError: the state is that of a layer of another kind, or the call is one of nn.MultiheadAttention.
        """
        refuse_other_conventions(others, key_padding_mask)
        self._check_cross(key_value_states, cu_seqlens)
        state, inputs = split_state(initial_state, self.short_conv)
        seen = None if state is None else state.seen
        if rotary is None:
            rotary = self._rotary_table(hidden_states, position_ids, attention_mask, cu_seqlens, seen)
        q, k, v, inputs = self.project(
            hidden_states,
            key_value_states,
            rotary,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            inputs=inputs,
            keep_inputs=output_final_state,
        )
        gates = self.gates(hidden_states)
        # Bidirectional queries all see the same keys: there dividing at either gives the same.
        at_query = self.divisor == "query" and self.causal
        divide_at_key = None if at_query else self.norm_const
        counts = default_positions(q, attention_mask, cu_seqlens, seen, self.process_group) + 1 if at_query else None
        context = None
        if maps is not None:
            self.check_whole("maps")
            if state is not None:
                raise ValueError("maps need every key, of which a state of cosine attention keeps none; got both")
            texts = packed_texts(cu_seqlens, map_rows, q.shape[1])
            of_itself = key_value_states is None
            maps.append(self._map(q, k, gates, counts, attention_mask, texts, of_itself=of_itself))
            context = map_context(maps[-1], v, attention_mask, texts)
            if not output_final_state:
                return self.merge(context, hidden_states), None
        if self._is_one_step(q, state, cu_seqlens):
            o, state = cosine_attention_step(q, k, v, divide_at_key, state, attention_mask=attention_mask, **gates)
        else:
            if key_value_states is not None and attention_mask is not None and q.shape[1] == k.shape[1]:
                # The operation reads a mask over T == S as masking queries too; one more padded key says it does not.
                k, v = (pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
                attention_mask = pad(attention_mask, (0, 1))
            o, state = cosine_attention(
                q,
                k,
                v,
                divide_at_key,
                causal=self.causal,
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                initial_state=state,
                output_final_state=output_final_state,
                implementation=self.implementation,
                process_group=self.process_group,
                **gates,
            )
        if context is not None:
            o = context
        elif counts is not None and self.norm_const is not None:
            o = divide_queries(o, self.norm_const, counts)
        if inputs is not None and state is not None:
            state = AttentionState(*state, inputs)
        return self.merge(o, hidden_states), state if output_final_state else None

    def empty_state(self, B: int) -> CosineState | AttentionState:
        """The state of B rows before the first token."""
        weight = self.k_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        sizes = (B, self.num_attention_heads, self.head_dim, self.head_dim)
        state = CosineState.zeros(*sizes, dtype=dtype, device=weight.device)
        inputs = self.empty_inputs(B, weight)
        return state if inputs is None else AttentionState(*state, inputs)

    def _map(
        self,
        q: Tensor,
        k: Tensor,
        gates: dict[str, Tensor],
        counts: Tensor | None,
        attention_mask: Tensor | None,
        texts: PackedTexts | None,
        *,
        of_itself: bool,
    ) -> Tensor:
        if "beta" in gates:
            raise ValueError("maps need a layer without erase, whose output is no sum of values by weights; got both")
        divide_at_key = self.norm_const if counts is None else None
        log_decay = gates.get("log_decay")
        if texts is not None:
            q, k = texts.as_rows(q), texts.as_rows(k)
            log_decay = None if log_decay is None else texts.as_rows(log_decay)
            counts = None if counts is None else texts.as_rows(counts)
        weights = cosine_map(
            q, k, divide_at_key, causal=self.causal, attention_mask=attention_mask, masks_queries=of_itself, texts=texts
        )
        if log_decay is not None:
            weights = decayed_map(weights, log_decay, attention_mask)
        if counts is not None and self.norm_const is not None:
            weights = divide_queries(weights.transpose(1, 2), self.norm_const, counts).transpose(1, 2)
        return weights

    def _is_one_step(self, q: Tensor, state: CosineState | None, cu_seqlens: Tensor | None) -> bool:
        """Whether the recurrent step serves; a form that was asked for by name is never replaced by it."""
        decodes = state is not None and self.causal and q.shape[1] == 1 and self.process_group is None
        return decodes and cu_seqlens is None and self.implementation == "auto"
