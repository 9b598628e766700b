"""The parts of a BERT: embeddings, attention, feed-forward, pooler, heads; named as in stock BERT's checkpoints.

x = CottentionBertLayer(config, layer_idx=0)(x, attention_mask, cu_seqlens=None)      # x: [B, T, D]
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from cottention.layers import (
    PackedTexts,
    RotaryTable,
    WithOptions,
    apply_rotary,
    cosine_map,
    decayed_map,
    map_context,
    softmax_attention,
    softmax_map,
)
from cottention.layers.attention import new_norm_const
from cottention.layers.projected import packed_texts
from cottention.models.bert.configuration_bert import CottentionBertConfig
from cottention.models.packing import check_no_empty_text
from cottention.models.pretrained import activation
from cottention.ops import cosine_attention


class CottentionBertEmbeddings(nn.Module):
    """Word, learned position (unless positions are rotary) and token type, summed and normalised."""

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        if not config.is_rotary:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_load_state_dict_pre_hook(_drop_position_ids)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None,
        inputs_embeds: Float[Tensor, "B T D"] | None,
        token_type_ids: Int[Tensor, "B T"] | None,
        position_ids: Int[Tensor, "B T"],
    ) -> Float[Tensor, "B T D"]:
        """Embed; token types default to 0."""
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        types = self.token_type_embeddings(torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids)
        x = words + types
        if hasattr(self, "position_embeddings"):
            x = x + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(x))


def _drop_position_ids(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Old files carry the numbers 0 .. 511 as a buffer; they are no weight."""
    state_dict.pop(f"{prefix}position_ids", None)


class CottentionBertSelfAttention(WithOptions):
    """Projections and attention; the output projection is `CottentionBertSelfOutput`'s, as in stock BERT."""

    norm_const: nn.Parameter | None

    def __init__(self, config: CottentionBertConfig, layer_type: str) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.is_cosine = layer_type == "linear_attention"
        self.implementation = "auto"
        has_divisor = self.is_cosine and config.divisor != "none"
        self.norm_const = new_norm_const(config.num_attention_heads, config.norm_const_init) if has_divisor else None
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        for projection in (self.query, self.key, self.value):
            projection.keeps_default_init = config.original_init  # type: ignore[assignment]
        sizes = (config.hidden_size, config.num_attention_heads)
        head_dim = config.hidden_size // config.num_attention_heads
        self.add_options(*sizes, head_dim, causal=False, **config.attention_options)
        if self.is_cosine:
            self.add_memory_options(*sizes, causal=False, **config.memory_options)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        attention_mask: Int[Tensor, "B T"] | None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None,
        maps: list[Tensor] | None,
        rotary: RotaryTable | None = None,
        map_rows: int | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Every token asks all real tokens of its text; `maps` takes up who looked at whom, in `map_rows` rows."""
        *projected, _ = self.convolve(
            self.query(x), self.key(x), self.value(x), attention_mask=attention_mask, cu_seqlens=cu_seqlens
        )
        q, k, v = (each.unflatten(-1, (self.num_attention_heads, -1)) for each in projected)
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        dropout_p = self.dropout if self.training else 0.0
        gates = self.gates(x) if self.is_cosine else {}
        if maps is not None:
            self.check_whole("maps")
            # The context comes from the map, so that what depends on it gives the map a gradient too.
            texts = packed_texts(cu_seqlens, map_rows, x.shape[1])
            maps.append(self._map(q, k, gates.get("log_decay"), attention_mask, texts, dropout_p))
            return self.finish(map_context(maps[-1], v, attention_mask if self.is_cosine else None, texts), x)
        if self.is_cosine:
            o, _ = cosine_attention(
                q,
                k,
                v,
                self.norm_const,
                causal=False,
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                implementation=self.implementation,
                process_group=self.process_group,
                **gates,
            )
        else:
            o = softmax_attention(
                q,
                k,
                v,
                causal=False,
                attention_mask=attention_mask,
                cu_seqlens=cu_seqlens,
                dropout_p=dropout_p,
                process_group=self.process_group,
            )
        return self.finish(o, x)

    def _map(
        self,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor | None,
        attention_mask: Tensor | None,
        texts: PackedTexts | None,
        dropout_p: float,
    ) -> Float[Tensor, "B H T T"]:
        if texts is not None:
            q, k = texts.as_rows(q), texts.as_rows(k)
            log_decay = None if log_decay is None else texts.as_rows(log_decay)
        if not self.is_cosine:
            weights = softmax_map(q, k, causal=False, attention_mask=attention_mask, texts=texts)
            return nn.functional.dropout(weights, dropout_p)  # what is dropped is missing from the map too
        weights = cosine_map(q, k, self.norm_const, causal=False, attention_mask=attention_mask, texts=texts)
        return weights if log_decay is None else decayed_map(weights, log_decay, attention_mask)


class CottentionBertResidual(nn.Module):
    """Linear, dropout, the sum with the residual, LayerNorm unless it stands first: the end of both sublayers."""

    def __init__(self, config: CottentionBertConfig, width_in: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, config.hidden_size)
        if not config.norm_first:
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """LayerNorm(residual + dropout(dense(x)))."""
        return _normed(self, self.dropout(self.dense(x)) + residual)


class CottentionBertAttention(nn.Module):
    """The attention sublayer."""

    def __init__(self, config: CottentionBertConfig, layer_type: str) -> None:
        super().__init__()
        if config.norm_first:
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self = CottentionBertSelfAttention(config, layer_type)
        self.output = CottentionBertResidual(config, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        maps: list[Tensor] | None,
        rotary: RotaryTable | None = None,
        map_rows: int | None = None,
    ) -> Tensor:
        """Attend and add."""
        return self.output(self.self(_normed(self, x), attention_mask, cu_seqlens, maps, rotary, map_rows), x)


class CottentionBertIntermediate(nn.Module):
    """First half of the feed-forward sublayer."""

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__()
        if config.norm_first:
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """Widen and activate."""
        return self.act(self.dense(_normed(self, x)))


def _normed(module: Any, x: Tensor) -> Tensor:
    """Through the module's LayerNorm, if this is where the config has one."""
    norm = getattr(module, "LayerNorm", None)
    return x if norm is None else norm(x)


class CottentionBertLayer(GradientCheckpointingLayer):
    """Attention sublayer, then feed-forward sublayer, LayerNorm behind each, or before it."""

    def __init__(self, config: CottentionBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = CottentionBertAttention(config, config.layer_types[layer_idx])
        self.intermediate = CottentionBertIntermediate(config)
        self.output = CottentionBertResidual(config, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        output_attentions: bool = False,
        rotary: RotaryTable | None = None,
        map_rows: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One layer's tokens, and its attention map when asked for."""
        # A list of this pass's own: under checkpointing another pass computes the map again.
        maps: list[Tensor] | None = [] if output_attentions else None
        x = self.attention(x, attention_mask, cu_seqlens, maps, rotary, map_rows)
        x = self.output(self.intermediate(x), x)
        return (x, maps[0]) if maps else x


class CottentionBertEncoder(nn.Module):
    """The layers, under the name that checkpoints use."""

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([CottentionBertLayer(config, i) for i in range(config.num_hidden_layers)])

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        rotary: RotaryTable | None,
        maps: list[Tensor] | None,
        hidden_states: list[Tensor] | None,
        map_rows: int | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The last layer's tokens; `hidden_states` takes up every layer's, `maps` every attention map."""
        for layer in self.layer:
            x = layer(x, attention_mask, cu_seqlens, maps is not None, rotary, map_rows)
            if maps is not None:
                x, weights = x
                maps.append(weights)
            if hidden_states is not None:
                hidden_states.append(x)
        return x


class CottentionBertPooler(nn.Module):
    """tanh of a linear map of each text's first token."""

    # Ranks that share the sequence: see `cottention.distributed`.
    process_group: Any = None

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "B T D"], cu_seqlens: Tensor | None) -> Float[Tensor, "N D"]:
        """`[B, D]`, or `[N, D]` of N packed texts."""
        if self.process_group is not None:
            from cottention.layers.slices import first_tokens  # torch.distributed, for those who ask for it

            return torch.tanh(self.dense(first_tokens(x, cu_seqlens, self.process_group)))
        check_no_empty_text(cu_seqlens, "first token")
        first = x[:, 0] if cu_seqlens is None else x[0, cu_seqlens[:-1].to(torch.int64)]
        return torch.tanh(self.dense(first))


class CottentionBertTransform(nn.Module):
    """Linear, activation, LayerNorm before the decoder."""

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Each token by itself."""
        return self.LayerNorm(self.act(self.dense(x)))


class CottentionBertPredictionHead(nn.Module):
    """Scores of every word; the decoder's matrix is the word embedding, its bias `bias`."""

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = CottentionBertTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, vocab_size]`."""
        return self.decoder(self.transform(x))


class CottentionBertNextSentenceHead(nn.Module):
    """The next-sentence head alone."""

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled: Float[Tensor, "N D"]) -> Float[Tensor, "N 2"]:
        """Scores of follows and of random."""
        return self.seq_relationship(pooled)


class CottentionBertHeads(nn.Module):
    """The masked-token head, and the next-sentence head where there is one."""

    def __init__(self, config: CottentionBertConfig, next_sentence: bool) -> None:
        super().__init__()
        self.predictions = CottentionBertPredictionHead(config)
        if next_sentence:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, x: Tensor, pooled: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scores of words, of tokens `[..., D]`; and of sentence pairs `[N, 2]`, of pooled ones `[N, D]`."""
        return self.predictions(x), None if pooled is None else self.seq_relationship(pooled)
