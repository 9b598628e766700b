"""BERT with a fine-tuning head: one label per text, one per token, an answer's span, a choice, or a next sentence.

model = CottentionBertForSequenceClassification.from_pretrained(pretrained_dir, num_labels=3)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from cottention.models.arguments import ENCODER_WORDS, known_arguments
from cottention.models.bert.configuration_bert import CottentionBertConfig
from cottention.models.bert.layers_bert import CottentionBertNextSentenceHead
from cottention.models.bert.modeling_bert import CottentionBertModel, CottentionBertPreTrainedModel
from cottention.models.losses import classification_loss, cross_entropy, span_loss
from cottention.models.packing import check_no_spans, reads_packed_texts
from cottention.models.pretrained import wants_dict


def _loss_settings(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    return known_arguments(given, ("num_items_in_batch",), where, ENCODER_WORDS)


def _classifier_dropout(config: CottentionBertConfig) -> nn.Dropout:
    return nn.Dropout(config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout)


class CottentionBertForSequenceClassification(CottentionBertPreTrainedModel):
    """BERT with a classifier or regressor on the pooled first token.

    Args:
        config: settings; `num_labels` outputs.
    """

    accepts_loss_kwargs = True
    gives_a_row_per_text = True

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.bert = CottentionBertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @reads_packed_texts
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B T"] | None = None,
        token_type_ids: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        **loss_kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """One row of logits per text.

        Args:
            input_ids: see `CottentionBertModel.forward`, as for all arguments not listed here.
            attention_mask: see there.
            token_type_ids: see there.
            position_ids: see there.
            inputs_embeds: see there.
            labels: see `classification_loss`.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            cu_seqlens: see there.
            **loss_kwargs: `num_items_in_batch`, texts of the whole optimiser step.

        Returns:
            loss, logits, hidden_states, attentions.

        Raises:
            TypeError: an argument is not known.
        """
        settings = _loss_settings(loss_kwargs, f"{type(self).__name__}.forward")
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
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config.problem_type, **settings)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


class CottentionBertForTokenClassification(CottentionBertPreTrainedModel):
    """BERT with a classifier on every token.

    Args:
        config: settings; `num_labels` outputs.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.bert = CottentionBertModel(config, add_pooling_layer=False)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
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
        **loss_kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """One row of logits per token.

        Args:
            input_ids: see `CottentionBertModel.forward`, as for all arguments not listed here.
            attention_mask: see there.
            token_type_ids: see there.
            position_ids: see there.
            inputs_embeds: see there.
            labels: a class per token, -100 where there is none.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            cu_seqlens: see there.
            **loss_kwargs: `num_items_in_batch`, labelled tokens of the whole optimiser step.

        Returns:
            loss, logits, hidden_states, attentions.

        Raises:
            TypeError: an argument is not known.
        """
        settings = _loss_settings(loss_kwargs, f"{type(self).__name__}.forward")
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
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else cross_entropy(logits, labels, **settings)
        output = TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


class CottentionBertForQuestionAnswering(CottentionBertPreTrainedModel):
    """BERT with two scores per token: where the answer starts and where it ends.

    Args:
        config: settings.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__(config)
        self.bert = CottentionBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @reads_packed_texts
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B T"] | None = None,
        token_type_ids: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        start_positions: Int[Tensor, " B"] | None = None,
        end_positions: Int[Tensor, " B"] | None = None,
        output_attentions: bool | str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        **loss_kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple:
        """Start and end logits.

        Args:
            input_ids: see `CottentionBertModel.forward`, as for all arguments not listed here.
            attention_mask: see there.
            token_type_ids: see there.
            position_ids: see there.
            inputs_embeds: see there.
            start_positions: column of each answer's first token; one outside the text is ignored.
            end_positions: column of its last token.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            cu_seqlens: see there.
            **loss_kwargs: `num_items_in_batch`, answers of the whole optimiser step.

        Returns:
            loss (mean of both ends'), start_logits, end_logits, hidden_states, attentions.

        Raises:
            TypeError: an argument is not known.
            ValueError: answers are given for packed texts.
        """
        settings = _loss_settings(loss_kwargs, f"{type(self).__name__}.forward")
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


class CottentionBertForMultipleChoice(CottentionBertPreTrainedModel):
    """BERT with one score per text, compared between the choices of a question.

    Args:
        config: settings.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__(config)
        self.bert = CottentionBertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B N T"] | None = None,
        attention_mask: Int[Tensor, "B N T"] | None = None,
        token_type_ids: Int[Tensor, "B N T"] | None = None,
        position_ids: Int[Tensor, "B N T"] | None = None,
        inputs_embeds: Float[Tensor, "B N T D"] | None = None,
        labels: Int[Tensor, " B"] | None = None,
        output_attentions: bool | str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **loss_kwargs: Any,
    ) -> MultipleChoiceModelOutput | tuple:
        """One row of N logits per question.

        Args:
            input_ids: a question's N choices, each a text; see `CottentionBertModel.forward`, as for all arguments not
                listed here, which have this shape too.
            attention_mask: see there.
            token_type_ids: see there.
            position_ids: see there.
            inputs_embeds: see there.
            labels: the right choice of each question.
            output_attentions: see there; rows are texts, question by question, as of hidden states.
            output_hidden_states: see there.
            return_dict: see there.
            **loss_kwargs: `num_items_in_batch`, questions of the whole optimiser step.

        Returns:
            loss, logits, hidden_states, attentions.

        Raises:
            ValueError: the inputs have no dimension for choices.
            TypeError: an argument is not known.
        """
        settings = _loss_settings(loss_kwargs, f"{type(self).__name__}.forward")
        questions = input_ids if inputs_embeds is None else inputs_embeds
        if questions is not None and questions.ndim != (3 if inputs_embeds is None else 4):
            raise ValueError(f"inputs must have shape [B, choices, T, ...]; got {list(questions.shape)}")
        texts = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        rows = [None if each is None else each.flatten(0, 1) for each in texts]  # [B * N, T] each
        outputs = self.bert(
            *rows,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        scores = self.classifier(self.dropout(outputs.pooler_output))  # [B * N, 1]
        assert questions is not None
        if len(scores) != questions.shape[:2].numel():
            raise ValueError("position_ids must not start again within a choice: each is one text; they do")
        logits = scores.view(questions.shape[:2])
        output = MultipleChoiceModelOutput(
            loss=None if labels is None else cross_entropy(logits, labels, **settings),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


class CottentionBertForNextSentencePrediction(CottentionBertPreTrainedModel):
    """BERT with the next-sentence head of pretraining alone.

    Args:
        config: settings.
    """

    accepts_loss_kwargs = True
    gives_a_row_per_text = True

    def __init__(self, config: CottentionBertConfig) -> None:
        super().__init__(config)
        self.bert = CottentionBertModel(config)
        self.cls = CottentionBertNextSentenceHead(config)
        self.post_init()

    @reads_packed_texts
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Int[Tensor, "B T"] | None = None,
        token_type_ids: Int[Tensor, "B T"] | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, " B"] | None = None,
        output_attentions: bool | str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
        **loss_kwargs: Any,
    ) -> NextSentencePredictorOutput | tuple:
        """One row of two logits per text.

        Args:
            input_ids: two sentences; see `CottentionBertModel.forward`, as for all arguments not listed here.
            attention_mask: see there.
            token_type_ids: see there.
            position_ids: see there.
            inputs_embeds: see there.
            labels: 0: the second sentence follows the first; 1: it is random.
            output_attentions: see there.
            output_hidden_states: see there.
            return_dict: see there.
            cu_seqlens: see there.
            **loss_kwargs: `num_items_in_batch`, texts of the whole optimiser step.

        Returns:
            loss, logits, hidden_states, attentions.

        Raises:
            TypeError: an argument is not known.
        """
        settings = _loss_settings(loss_kwargs, f"{type(self).__name__}.forward")
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
        logits = self.cls(outputs.pooler_output)
        output = NextSentencePredictorOutput(
            loss=None if labels is None else cross_entropy(logits, labels, **settings),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()
