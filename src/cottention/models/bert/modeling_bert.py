"""BERT with cosine or softmax attention, its masked-token and next-sentence heads.

Parameter names are BERT's plus `attention.self.norm_const`, so published and stock weights load by name.

    model = CottentionBertForPreTraining(CottentionBertConfig(vocab_size=2048, hidden_size=256, num_attention_heads=4))
    out = model(input_ids, attention_mask, labels=labels, next_sentence_label=is_random)  # out.mlm_loss, out.nsp_loss
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput
from transformers.utils.generic import ModelOutput

from cottention.files import IGNORE_INDEX
from cottention.layers import RotaryTable, rotary_table
from cottention.models.arguments import ENCODER_WORDS, known_arguments, zeros_and_ones
from cottention.models.bert.configuration_bert import CottentionBertConfig
from cottention.models.bert.layers_bert import (
    CottentionBertEmbeddings,
    CottentionBertEncoder,
    CottentionBertHeads,
    CottentionBertPooler,
    CottentionBertPredictionHead,
)
from cottention.models.losses import cross_entropy
from cottention.models.packing import one_row, reads_packed_texts
from cottention.models.pretrained import (
    CottentionPreTrainedModel,
    attention_maps,
    check_inputs,
    check_length,
    default_positions,
    longest_text,
    wants_dict,
)


class CottentionBertPreTrainedModel(CottentionPreTrainedModel):
    """Base of the BERT models."""

    config: CottentionBertConfig
    config_class = CottentionBertConfig
    base_model_prefix = "bert"
    _no_split_modules: ClassVar[list[str]] = ["CottentionBertEmbeddings", "CottentionBertLayer"]
    # Heads of the sibling tasks, and a buffer that old files carry.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"^cls\.",
        r"^classifier\.",
        r"^qa_outputs\.",
        r"(^|\.)pooler\.",
        r"embeddings\.position_ids$",
    ]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CottentionBertPredictionHead):
            nn.init.zeros_(module.bias)


class CottentionBertModel(CottentionBertPreTrainedModel):
    """The layers without a head.

    Args:
        config: settings.
        add_pooling_layer: whether to add the pooler, which sentence-level heads read.
    """

    def __init__(self, config: CottentionBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = CottentionBertEmbeddings(config)
        self.encoder = CottentionBertEncoder(config)
        if config.norm_first:
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = CottentionBertPooler(config) if add_pooling_layer else None
        self.gives_a_row_per_text = add_pooling_layer
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the word embedding."""
        self.embeddings.word_embeddings = value

    @reads_packed_texts
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B T"] | None = None,
        token_type_ids: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        output_attentions: bool | str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Run the layers.

        Args:
            input_ids: tokens, or give `inputs_embeds`.
            attention_mask: 1 = real; padding anywhere.
            token_type_ids: 1 after the first [SEP]; None: all 0.
            position_ids: None: 0 .. T-1 with padding counted, restarting per packed text.
            inputs_embeds: word embeddings.
            output_attentions: whether to return every layer's map `[B, H, T, T]`, by which map @ v is its context; the
                config's when None. Quadratic in T. "packed": of packed texts too, zero between texts.
            output_hidden_states: whether to return the normalised embedding and every layer's output, the last one's
                behind the last LayerNorm.
            return_dict: whether to return an object rather than a tuple.
            cu_seqlens: boundaries of packed texts; needs B == 1. Or transformers' `cu_seq_lens_q`, `cu_seq_lens_k`,
                `seq_idx`, or position_ids that start again within a row: see `cottention.models.packing`.
            **others: words of the library that ask for nothing here, such as `use_cache`.

        Returns:
            last_hidden_state, pooler_output (one row per text), hidden_states, attentions.

        Raises:
            ValueError: arguments contradict each other.
            TypeError: an argument is not known.
            CottentionError: the text is longer than the learned positions, where positions are learned.
        """
        known_arguments(others, ("num_items_in_batch",), f"{type(self).__name__}.forward", ENCODER_WORDS)
        attention_mask = zeros_and_ones(attention_mask)
        check_inputs(input_ids, inputs_embeds, attention_mask, cu_seqlens)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        maps = attention_maps(self.config, output_attentions, cu_seqlens)
        B, T = tokens.shape[:2]
        if self.config.longest_text is not None:
            longest = longest_text(cu_seqlens, position_ids, T)
            check_length(longest, self.config.longest_text, "max_position_embeddings")
        if position_ids is None:
            num_tokens = T if cu_seqlens is None else B * T
            position_ids = default_positions(num_tokens, cu_seqlens, tokens.device).reshape(-1, T)
        x = self.embeddings(input_ids, inputs_embeds, token_type_ids, position_ids)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if cu_seqlens is not None:
            x = one_row(x)
        hidden_states = [x] if keep else None
        rotary = self._rotary(position_ids, B, cu_seqlens)
        x = self.encoder(x, attention_mask, cu_seqlens, rotary, maps, hidden_states, B)
        if self.config.norm_first:
            x = self.LayerNorm(x)
            if hidden_states is not None:
                hidden_states[-1] = x
        pooled = None if self.pooler is None else self.pooler(x, cu_seqlens)
        if cu_seqlens is not None:
            x, *kept = (states.reshape(B, T, -1) for states in (x, *(hidden_states or ())))
            hidden_states = kept if keep else None
        output = BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=pooled,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            attentions=None if maps is None else tuple(maps),
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def _rotary(self, position_ids: Tensor, B: int, cu_seqlens: Tensor | None) -> RotaryTable | None:
        """The table that all layers share; None where positions are learned."""
        if not self.config.is_rotary:
            return None
        if cu_seqlens is not None:
            position_ids = one_row(position_ids.expand(B, -1))
        rotary_dim = self.config.rotary_dim
        if rotary_dim is None:
            rotary_dim = self.config.hidden_size // self.config.num_attention_heads
        return rotary_table(position_ids, rotary_dim)


@dataclass
class CottentionBertForPreTrainingOutput(ModelOutput):
    """Stock BERT's output with each loss by itself too.

    Args:
        loss: sum of the losses whose labels were given.
        prediction_logits: `[B, T, vocab_size]`; `[targets, vocab_size]` with sparse prediction.
        seq_relationship_logits: `[B, 2]`; column 1: the second sentence is random.
        hidden_states: embedding and every layer's output, when asked for.
        attentions: every layer's map `[B, H, T, T]`, when asked for.
        mlm_loss: masked-token loss.
        nsp_loss: next-sentence loss.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    mlm_loss: Tensor | None = None
    nsp_loss: Tensor | None = None


class _TiedHead(CottentionBertPreTrainedModel):
    """What both pretraining classes share: a decoder tied to the word embeddings."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    accepts_loss_kwargs = True
    cls: CottentionBertHeads

    def get_output_embeddings(self) -> nn.Module:
        """The decoder."""
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the decoder and its bias, which an untied decoder shares with nothing: a file holds both then."""
        self.cls.predictions.decoder = new_embeddings
        bias = new_embeddings.bias
        self.cls.predictions.bias = bias if self.config.tie_word_embeddings else nn.Parameter(bias.detach().clone())

    def _scored(self, x: Tensor, labels: Tensor | None, sparse_prediction: bool | None) -> tuple[Tensor, Tensor | None]:
        """Tokens whose words are scored, and their labels: all `[B, T]`, or the labelled positions alone."""
        if sparse_prediction is None:
            sparse_prediction = self.config.sparse_prediction and self.training
        if labels is not None and sparse_prediction:
            is_target = labels.to(x.device) != IGNORE_INDEX
            return x[is_target], labels[is_target]  # [targets, D], [targets]
        return x, labels


class CottentionBertForPreTraining(_TiedHead):
    """BERT with the masked-token and the next-sentence head.

    Args:
        config: settings.
    """

    gives_a_row_per_text = True

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__(config)
        self.bert = CottentionBertModel(config)
        self.cls = CottentionBertHeads(config, next_sentence=True)
        self.post_init()

    @reads_packed_texts
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B T"] | None = None,
        token_type_ids: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        next_sentence_label: Int[Tensor, " B"] | None = None,
        output_attentions: bool | str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        sparse_prediction: bool | None = None,
        **loss_kwargs: Any,
    ) -> CottentionBertForPreTrainingOutput | tuple:
        """Both heads' logits, and the losses whose labels are given.

        Args:
            input_ids: see `CottentionBertModel.forward`, as for all arguments not listed here.
            attention_mask: see there.
            token_type_ids: see there.
            position_ids: see there.
            inputs_embeds: see there.
            labels: the original tokens at masked positions, -100 elsewhere.
            next_sentence_label: 0: the second sentence follows the first; 1: it is random.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            cu_seqlens: see there.
            sparse_prediction: whether to score words at labelled positions alone; None: as the config says in training,
                everywhere otherwise.
            **loss_kwargs: `num_items_in_batch`, masked tokens of the whole optimiser step, and
                `num_sequences_in_batch`, its texts.

        Returns:
            loss, prediction_logits, seq_relationship_logits, hidden_states, attentions, mlm_loss, nsp_loss.

        Raises:
            TypeError: an argument is not known.
        """
        known = ("num_items_in_batch", "num_sequences_in_batch")
        settings = known_arguments(loss_kwargs, known, f"{type(self).__name__}.forward", ENCODER_WORDS)
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seq_lens_q=cu_seqlens,
        )
        x, labels = self._scored(outputs.last_hidden_state, labels, sparse_prediction)
        prediction_logits, seq_relationship_logits = self.cls(x, outputs.pooler_output)
        mlm_loss = nsp_loss = None
        if labels is not None:
            mlm_loss = cross_entropy(prediction_logits, labels, settings.get("num_items_in_batch"))
        if next_sentence_label is not None:
            nsp_loss = _nsp_loss(seq_relationship_logits, next_sentence_label, labels, **settings)
        losses = [loss for loss in (mlm_loss, nsp_loss) if loss is not None]
        output = CottentionBertForPreTrainingOutput(
            loss=torch.stack(losses).sum() if losses else None,
            prediction_logits=prediction_logits,
            seq_relationship_logits=seq_relationship_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            mlm_loss=mlm_loss,
            nsp_loss=nsp_loss,
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


def _nsp_loss(
    logits: Tensor,
    next_sentence_label: Tensor,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    num_sequences_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Next-sentence loss, scaled like the masked-token loss.

    The Trainer counts masked tokens only. Without the number of texts, this micro-batch's share of the step's masked
    tokens stands in for its share of the texts: the shares add up to 1, so the scale is right.
    """
    if num_sequences_in_batch is not None or num_items_in_batch is None or labels is None:
        return cross_entropy(logits, next_sentence_label, num_sequences_in_batch)
    share = (labels != IGNORE_INDEX).sum().to(logits.device) / num_items_in_batch
    return cross_entropy(logits, next_sentence_label) * share


class CottentionBertForMaskedLM(_TiedHead):
    """BERT with the masked-token head alone.

    Args:
        config: settings.
    """

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__(config)
        self.bert = CottentionBertModel(config, add_pooling_layer=False)
        self.cls = CottentionBertHeads(config, next_sentence=False)
        self.post_init()

    @reads_packed_texts
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B T"] | None = None,
        token_type_ids: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        output_attentions: bool | str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        sparse_prediction: bool | None = None,
        **loss_kwargs: Any,
    ) -> MaskedLMOutput | tuple:
        """Logits of every token, and the loss when there are labels.

        Args:
            input_ids: see `CottentionBertModel.forward`, as for all arguments not listed here.
            attention_mask: see there.
            token_type_ids: see there.
            position_ids: see there.
            inputs_embeds: see there.
            labels: the original tokens at masked positions, -100 elsewhere.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            cu_seqlens: see there.
            sparse_prediction: whether to score words at labelled positions alone; None: as the config says in training,
                everywhere otherwise.
            **loss_kwargs: `num_items_in_batch`, masked tokens of the whole optimiser step.

        Returns:
            loss, logits, hidden_states, attentions.

        Raises:
            TypeError: an argument is not known.
        """
        known = ("num_items_in_batch",)
        settings = known_arguments(loss_kwargs, known, f"{type(self).__name__}.forward", ENCODER_WORDS)
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seq_lens_q=cu_seqlens,
        )
        x, labels = self._scored(outputs.last_hidden_state, labels, sparse_prediction)
        logits, _ = self.cls(x)
        loss = None if labels is None else cross_entropy(logits, labels, **settings)
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()
