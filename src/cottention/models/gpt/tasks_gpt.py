"""GPT with a fine-tuning head: one label, number or set of flags per text, one label per token, or an answer's span.

model = CottentionGPTForSequenceClassification.from_pretrained(pretrained_dir, num_labels=3)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from cottention.models.arguments import DECODER_WORDS, known_arguments
from cottention.models.gpt.configuration_gpt import CottentionGPTConfig
from cottention.models.gpt.modeling_gpt import CottentionGPTModel, CottentionGPTPreTrainedModel
from cottention.models.losses import classification_loss, cross_entropy, span_loss
from cottention.models.packing import check_no_empty_text, check_no_spans, one_row, reads_packed_texts
from cottention.models.pretrained import wants_dict
from cottention.models.versions import CACHE_NAME, cache_of


def _loss_settings(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    return known_arguments(given, ("num_items_in_batch",), where, DECODER_WORDS)


class CottentionGPTForSequenceClassification(CottentionGPTPreTrainedModel):
    """GPT with a head on each text's last token.

    Args:
        config: settings; `num_labels` outputs.
    """

    accepts_loss_kwargs = True
    gives_a_row_per_text = True

    def __init__(self, config: CottentionGPTConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.transformer = CottentionGPTModel(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.post_init()

    @reads_packed_texts
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B S"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **loss_kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """One row of logits per text (per packed text where they are packed).

        Args:
            input_ids: see `CottentionGPTModel.forward`, as for all arguments not listed here.
            attention_mask: tells each row's last real token; None: by `pad_token_id`, else the last column.
            position_ids: see there.
            inputs_embeds: see there.
            labels: see `classification_loss`.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            cu_seqlens: see there.
            past_key_values: see there.
            use_cache: whether to return a cache; None: only where one is given.
            cache: see there.
            **loss_kwargs: `num_items_in_batch`, texts of the whole optimiser step.

        Returns:
            loss, logits, past_key_values (cache from transformers 5.24 on), hidden_states, attentions.

        Raises:
            TypeError: an argument is not known.
        """
        settings = _loss_settings(loss_kwargs, f"{type(self).__name__}.forward")
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=bool(use_cache),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seq_lens_q=cu_seqlens,
            cache=cache,
        )
        x = outputs.last_hidden_state
        logits = self.score(self._last_tokens(x, input_ids, attention_mask, cu_seqlens))
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config.problem_type, **settings)
        output = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: cache_of(outputs)},
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def _last_tokens(
        self, x: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Float[Tensor, "N D"]:
        if cu_seqlens is not None:
            check_no_empty_text(cu_seqlens, "last token")
            return one_row(x)[0, cu_seqlens[1:].to(torch.int64) - 1]
        real = attention_mask
        if real is None and self.config.pad_token_id is not None and input_ids is not None:
            real = input_ids != self.config.pad_token_id
        if real is None:
            return x[:, -1]
        column = torch.arange(x.shape[1], device=x.device)
        last = (column * (real[:, -x.shape[1] :] != 0)).argmax(dim=-1)
        return x[torch.arange(x.shape[0], device=x.device), last]


class CottentionGPTForTokenClassification(CottentionGPTPreTrainedModel):
    """GPT with a classifier on every token, after the dropout of its blocks (`resid_pdrop`).

    Args:
        config: settings; `num_labels` outputs.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: CottentionGPTConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.transformer = CottentionGPTModel(config)
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.classifier = nn.Linear(config.n_embd, self.num_labels)
        self.post_init()

    @reads_packed_texts
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B S"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        output_attentions: bool | str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **loss_kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """One row of logits per token.

        Args:
            input_ids: see `CottentionGPTModel.forward`, as for all arguments not listed here.
            attention_mask: see there.
            position_ids: see there.
            inputs_embeds: see there.
            labels: a class per token, -100 where there is none; a token's own, not the next one's.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            cu_seqlens: see there.
            past_key_values: see there; it takes up these tokens, and is not returned.
            use_cache: has no effect, as no cache is returned.
            cache: see there.
            **loss_kwargs: `num_items_in_batch`, labelled tokens of the whole optimiser step.

        Returns:
            loss, logits, hidden_states, attentions.

        Raises:
            TypeError: an argument is not known.
        """
        settings = _loss_settings(loss_kwargs, f"{type(self).__name__}.forward")
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seq_lens_q=cu_seqlens,
            cache=cache,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        output = TokenClassifierOutput(
            loss=None if labels is None else cross_entropy(logits, labels, **settings),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


class CottentionGPTForQuestionAnswering(CottentionGPTPreTrainedModel):
    """GPT with two scores per token: where the answer starts and where it ends.

    Args:
        config: settings.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: CottentionGPTConfig) -> None:
        super().__init__(config)
        self.transformer = CottentionGPTModel(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.post_init()

    @reads_packed_texts
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B S"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        start_positions: Int[Tensor, " B"] | None = None,
        end_positions: Int[Tensor, " B"] | None = None,
        output_attentions: bool | str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **loss_kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple:
        """Start and end logits.

        Args:
            input_ids: see `CottentionGPTModel.forward`, as for all arguments not listed here.
            attention_mask: see there.
            position_ids: see there.
            inputs_embeds: see there.
            start_positions: column of each answer's first token; one outside the text is ignored.
            end_positions: column of its last token.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            cu_seqlens: see there.
            past_key_values: see there; it takes up these tokens, and is not returned.
            use_cache: has no effect, as no cache is returned.
            cache: see there.
            **loss_kwargs: `num_items_in_batch`, answers of the whole optimiser step.

        Returns:
            loss (mean of both ends'), start_logits, end_logits, hidden_states, attentions.

        Raises:
            TypeError: an argument is not known.
            ValueError: answers are given for packed texts.
        """
        settings = _loss_settings(loss_kwargs, f"{type(self).__name__}.forward")
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cu_seq_lens_q=cu_seqlens,
            cache=cache,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)  # [B, T] each
        loss = None
        if start_positions is not None and end_positions is not None:
            check_no_spans(cu_seqlens)
            loss = span_loss(start_logits, end_logits, start_positions, end_positions, **settings)
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()
