"""SoftmaxAttention: the twin of `CosineAttention` with softmax, over every token before or over a window of them.

attn = SoftmaxAttention(hidden_size=512, num_attention_heads=8, causal=True, sliding_window=256)
x, state = attn(x, output_final_state=True)             # and later attn(next_x, initial_state=state, ...)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import dropout

from cottention.layers.maps import map_context, softmax_map
from cottention.layers.projected import ProjectedAttention, packed_texts, refuse_other_conventions
from cottention.layers.rotary import RotaryTable
from cottention.layers.sliding import take_tokens
from cottention.layers.softmax import softmax_attention


class KeyValueState(NamedTuple):
    """What softmax attention remembers: every key and value.

    Attributes:
        k: `[B, S, H, K]`, rotary applied.
        v: `[B, S, H, K]`.
        real: `[B, S]`, which of them are no padding.
        inputs: `[B, width - 1, 3 H K]` as in `AttentionState`; None without a short convolution.
    """

    k: Float[Tensor, "B S H K"]
    v: Float[Tensor, "B S H K"]
    real: Bool[Tensor, "B S"]
    inputs: Float[Tensor, "B W_minus_1 C"] | None = None

    @property
    def seen(self) -> Int[Tensor, " B"]:
        """Number of real tokens per row."""
        return self.real.sum(-1)


class WindowState(NamedTuple):
    """What softmax attention over a window remembers: the last sliding_window - 1 real keys and values of each row.

    Attributes:
        k: `[B, S, H, K]`, rotary applied; S < sliding_window.
        v: `[B, S, H, K]`.
        real: `[B, S]`, which of them are no padding; rows end together.
        seen: `[B]` int64, number of real tokens so far, forgotten ones too.
        inputs: as in `KeyValueState`.
    """

    k: Float[Tensor, "B S H K"]
    v: Float[Tensor, "B S H K"]
    real: Bool[Tensor, "B S"]
    seen: Int[Tensor, " B"]
    inputs: Float[Tensor, "B W_minus_1 C"] | None = None


class SoftmaxAttention(ProjectedAttention):
    """The softmax twin of `CosineAttention`, on scaled_dot_product_attention; its weights lack norm_const only.

    Args:
        hidden_size: D, width of the tokens.
        num_attention_heads: H.
        causal: whether a token sees only itself and what came before it.
        head_dim: K; None: hidden_size / num_attention_heads.
        rotary_dim: dims of each head that get GPT-J's rotary embedding; None: none.
        bias: whether the four projections have one.
        dropout: chance of dropping an attention weight while training.
        sliding_window: real tokens that a token sees at the most, itself among them; None: all. Needs causal=True.
        short_conv: as in `CosineAttention`.
        output_norm: likewise.
        output_gate: likewise.

    Raises:
        ValueError: sizes do not fit together, or an option has no such value.
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
        sliding_window: int | None = None,
        short_conv: int | None = None,
        output_norm: bool = False,
        output_gate: str | None = None,
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
        _check_window(sliding_window, causal)
        self.dropout = dropout
        self.sliding_window = sliding_window

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        key_value_states: Float[Tensor, "B S D"] | None = None,
        *others: Tensor,
        attention_mask: Int[Tensor, "B S"] | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        rotary: RotaryTable | None = None,
        initial_state: KeyValueState | WindowState | None = None,
        output_final_state: bool = False,
        maps: list[Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        map_rows: int | None = None,
        extend: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValueState | WindowState | None]:
        """Attend; the arguments are those of `CosineAttention.forward`, the state holds every key and value.

        With a sliding_window the state is a `WindowState` of those that later tokens can see.

        `extend` is for caches of another kind than the state: it takes these tokens' keys and values and returns all.

        Raises:
            ValueError: arguments contradict each other or the layer's settings.
        """
        refuse_other_conventions(others, key_padding_mask)
        self._check_cross(key_value_states, cu_seqlens)
        wants_state = initial_state is not None or output_final_state
        if wants_state and not self.causal:
            raise ValueError("initial_state and output_final_state need a layer with causal=True; got causal=False")
        if wants_state or extend is not None:
            self.check_whole("a state of keys and values")
        if wants_state and cu_seqlens is not None:
            raise ValueError("a state and cu_seqlens exclude each other in SoftmaxAttention; got both")
        if rotary is None:
            seen = None if initial_state is None else initial_state.seen
            rotary = self._rotary_table(hidden_states, position_ids, attention_mask, cu_seqlens, seen)
        q, k, v, inputs = self.project(
            hidden_states,
            key_value_states,
            rotary,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            inputs=None if initial_state is None else initial_state.inputs,
            keep_inputs=output_final_state,
        )
        state = None
        if wants_state:
            state = self._extended(initial_state, k, v, attention_mask, inputs)
            k, v, real = state[:3]
            # Of a text's first tokens without padding every one is real, which needs no mask.
            attention_mask = attention_mask if initial_state is None else real
            state = self._kept(state)
        if extend is not None:
            k, v = extend(k, v)
        o = self.attend(q, k, v, attention_mask=attention_mask, cu_seqlens=cu_seqlens, maps=maps, map_rows=map_rows)
        return self.merge(o, hidden_states), state if output_final_state else None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        maps: list[Tensor] | None = None,
        map_rows: int | None = None,
    ) -> Tensor:
        """Attention between projected tokens `[B, T or S, H, K]`; S may exceed T, when keys come from a cache."""
        if maps is not None:
            self.check_whole("maps")
            texts = packed_texts(cu_seqlens, map_rows, q.shape[1])
            if texts is not None:
                q, k = texts.as_rows(q), texts.as_rows(k)
            weights = softmax_map(
                q, k, causal=self.causal, attention_mask=attention_mask, sliding_window=self.sliding_window, texts=texts
            )
            maps.append(dropout(weights, self.dropout, self.training))  # what is dropped is missing from the map too
            return map_context(maps[-1], v, texts=texts)
        return softmax_attention(
            q,
            k,
            v,
            causal=self.causal,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            dropout_p=self.dropout if self.training else 0.0,
            sliding_window=self.sliding_window,
            process_group=self.process_group,
        )

    def empty_state(self, B: int) -> KeyValueState | WindowState:
        """The state of B rows before the first token."""
        k = self.k_proj.weight.new_empty(B, 0, self.num_attention_heads, self.head_dim)
        real = k.new_empty(B, 0, dtype=torch.bool)
        inputs = self.empty_inputs(B, k)
        if self.sliding_window is None:
            return KeyValueState(k, k.clone(), real, inputs)
        return WindowState(k, k.clone(), real, k.new_zeros(B, dtype=torch.int64), inputs)

    def _extended(
        self,
        state: KeyValueState | WindowState | None,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        inputs: Tensor | None,
    ) -> KeyValueState | WindowState:
        """The state with these tokens, of which a window has yet to forget the first."""
        real = k.new_ones(k.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask.to(torch.bool)
        seen = real.sum(-1)
        if state is not None:
            seen = state.seen + seen
            k, v, real = (torch.cat(pair, dim=1) for pair in zip(state[:3], (k, v, real), strict=True))
        if self.sliding_window is None:
            return KeyValueState(k, v, real, inputs)
        return WindowState(k, v, real, seen, inputs)

    def _kept(self, state: KeyValueState | WindowState) -> KeyValueState | WindowState:
        """What later tokens can see."""
        if self.sliding_window is None or isinstance(state, KeyValueState):
            return state
        S = state.real.shape[1]
        kept = min(S, self.sliding_window - 1)
        # Padding first, real tokens behind it in their order.
        order = state.real.to(torch.uint8).argsort(dim=-1, stable=True)[:, S - kept :]
        k, v, real = (take_tokens(x, order) for x in state[:3])
        return WindowState(k, v, real, state.seen, state.inputs)

    def extra_repr(self) -> str:
        """Sizes."""
        window = "" if self.sliding_window is None else f", sliding_window={self.sliding_window}"
        return super().extra_repr() + window


def _check_window(sliding_window: int | None, causal: bool) -> None:
    if sliding_window is None:
        return
    if not isinstance(sliding_window, int) or isinstance(sliding_window, bool):
        raise TypeError(f"sliding_window must be an int or None; got {sliding_window!r}")
    if sliding_window < 1 or not causal:
        raise ValueError(
            f"sliding_window must be at least 1 token, of causal=True; got {sliding_window} and causal={causal}"
        )
