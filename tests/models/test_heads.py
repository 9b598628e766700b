"""Heads of every task: stock parameter names, numbers and arguments; a loss by the step's items; labels in range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as stock_bert
from transformers.models.gptj import modeling_gptj as stock_gpt

from cottention import models as ours
from cottention.models.versions import cache_of
from tests.models.helpers import ATTENTION_TYPES, bert_config, gpt_config, randomised
from tests.models.test_softmax_twins import (
    MASKS,
    TOKENS,
    assert_same,
    assert_same_gradients,
    bert_twins,
    gpt_twins,
)

B, T = TOKENS.shape
CHOICES = torch.stack([TOKENS, TOKENS.flip(1), TOKENS.roll(3, 1)], dim=1)  # [B, 3, T]
SPANS = {"start_positions": torch.tensor([2, 5]), "end_positions": torch.tensor([4, 9])}
# Each head's labels, how many items they are, and labels with one that is out of range.
HEADS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "CottentionGPTForCausalLM": ({"labels": TOKENS}, B * (T - 1), {"labels": TOKENS.clone().fill_(61)}),
    "CottentionGPTForSequenceClassification": (
        {"labels": torch.tensor([1, 0])},
        B,
        {"labels": torch.tensor([2, 0])},
    ),
    "CottentionGPTForTokenClassification": ({"labels": TOKENS % 2}, B * T, {"labels": -(TOKENS % 2)}),
    "CottentionBertForMaskedLM": ({"labels": TOKENS}, B * T, {"labels": TOKENS + 60}),
    "CottentionBertForPreTraining": ({"labels": TOKENS}, B * T, {"labels": -TOKENS}),
    "CottentionBertForNextSentencePrediction": (
        {"labels": torch.tensor([1, 0])},
        B,
        {"labels": torch.tensor([-1, 0])},
    ),
    "CottentionBertForSequenceClassification": (
        {"labels": torch.tensor([1, 0])},
        B,
        {"labels": torch.tensor([2, 0])},
    ),
    "CottentionBertForTokenClassification": ({"labels": TOKENS % 2}, B * T, {"labels": TOKENS % 3}),
    "CottentionBertForMultipleChoice": ({"labels": torch.tensor([2, 0])}, B, {"labels": torch.tensor([3, 0])}),
    "CottentionGPTForQuestionAnswering": (SPANS, B, {}),
    "CottentionBertForQuestionAnswering": (SPANS, B, {}),
}


def head(name: str, attention_type: str = "cosine", **settings: Any) -> Any:
    make = gpt_config if "GPT" in name else bert_config
    return randomised(getattr(ours, name)(make(attention_type, **settings)))


def inputs_of(name: str) -> Tensor:
    return CHOICES if name.endswith("MultipleChoice") else TOKENS


def test_every_head_is_listed_here() -> None:
    assert set(HEADS) == {name for name in ours.__all__ if "For" in name}


@pytest.mark.parametrize("mask", MASKS)
def test_bert_for_multiple_choice_is_the_stock_one(mask: str) -> None:
    mine, theirs = bert_twins(ours.CottentionBertForMultipleChoice, stock_bert.BertForMultipleChoice)
    given = MASKS[mask]
    inputs: dict[str, Any] = {
        "attention_mask": None if given is None else given[:, None].repeat(1, 3, 1),
        "token_type_ids": (CHOICES % 2),
        "labels": torch.tensor([2, 0]),
    }
    got, expected = mine(CHOICES, **inputs), theirs(CHOICES, **inputs)
    assert_same(got.logits, expected.logits)
    assert_same(got.loss, expected.loss)
    got.loss.backward()
    expected.loss.backward()
    assert_same_gradients(mine, theirs)
    embeds = mine.bert.embeddings.word_embeddings(CHOICES)
    assert_same(mine(inputs_embeds=embeds, **inputs).logits, got.logits)


@pytest.mark.parametrize("mask", MASKS)
def test_bert_for_next_sentence_prediction_is_the_stock_one(mask: str) -> None:
    mine, theirs = bert_twins(ours.CottentionBertForNextSentencePrediction, stock_bert.BertForNextSentencePrediction)
    inputs: dict[str, Any] = {"attention_mask": MASKS[mask], "labels": torch.tensor([1, 0])}
    got, expected = mine(TOKENS, **inputs), theirs(TOKENS, **inputs)
    assert_same(got.logits, expected.logits)
    assert_same(got.loss, expected.loss)
    got.loss.backward()
    expected.loss.backward()
    assert_same_gradients(mine, theirs)


@pytest.mark.parametrize("mask", MASKS)
def test_gpt_for_question_answering_is_the_stock_one(mask: str) -> None:
    mine, theirs = gpt_twins(ours.CottentionGPTForQuestionAnswering, stock_gpt.GPTJForQuestionAnswering)
    # The second text's answer was cut off: it counts for nothing.
    ends = {"start_positions": torch.tensor([2, 11]), "end_positions": torch.tensor([5, 30])}
    inputs: dict[str, Any] = {"attention_mask": MASKS[mask], **ends}
    got, expected = mine(TOKENS, **inputs), theirs(TOKENS, **inputs)
    assert_same(got.start_logits, expected.start_logits, MASKS[mask])
    assert_same(got.end_logits, expected.end_logits, MASKS[mask])
    if mask != "left":  # the softmax of an answer's place reads the logits of padding too, of which nothing is promised
        assert_same(got.loss, expected.loss)
        got.loss.backward()
        expected.loss.backward()
        for key in ("qa_outputs.weight", "transformer.wte.weight", "transformer.h.0.attn.q_proj.weight"):
            assert_same(mine.get_parameter(key).grad, theirs.get_parameter(key).grad)


def test_gpt_for_token_classification_is_a_stock_body_and_a_linear_layer() -> None:
    class Stock(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.transformer = stock_gpt.GPTJModel(config)
            self.classifier = nn.Linear(config.n_embd, config.num_labels)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.classifier(self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state)

    mine, theirs = gpt_twins(ours.CottentionGPTForTokenClassification, Stock, num_labels=3)
    labels = (TOKENS % 3).masked_fill(MASKS["right"] == 0, -100)
    got, logits = mine(TOKENS, attention_mask=MASKS["right"], labels=labels), theirs(TOKENS, MASKS["right"])
    assert_same(got.logits, logits, MASKS["right"])
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), labels)
    assert_same(got.loss, expected)
    got.loss.backward()
    expected.backward()
    assert_same_gradients(mine, theirs)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("name", HEADS)
def test_a_loss_is_scaled_by_the_items_of_the_step(name: str, attention_type: str) -> None:
    labels, num_items, _ = HEADS[name]
    model, inputs = head(name, attention_type, num_labels=2), inputs_of(name)
    mean = model(inputs, **labels).loss
    for items in (4 * num_items, torch.tensor(4 * num_items)):
        torch.testing.assert_close(4 * model(inputs, **labels, num_items_in_batch=items).loss, mean)


@pytest.mark.parametrize("name", [name for name, (_, _, wrong) in HEADS.items() if wrong])
def test_a_label_out_of_range_raises_as_in_torch(name: str) -> None:
    model, inputs, wrong = head(name, num_labels=2), inputs_of(name), HEADS[name][2]
    with pytest.raises(IndexError, match=r"Target -?\d+ is out of bounds"):
        model(inputs, **wrong)
    if name.endswith(("PreTraining", "MaskedLM")):
        with pytest.raises(IndexError, match="is out of bounds"):
            model(inputs, sparse_prediction=True, **wrong)
    if name.endswith("PreTraining"):
        with pytest.raises(IndexError, match="is out of bounds"):
            model(inputs, next_sentence_label=torch.tensor([2, 0]))


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(
    "name",
    [
        "CottentionGPTForSequenceClassification",
        "CottentionGPTForTokenClassification",
        "CottentionGPTForQuestionAnswering",
    ],
)
def test_a_gpt_head_goes_on_from_a_cache(name: str, attention_type: str) -> None:
    model = head(name, attention_type, num_labels=2, pad_token_id=0)
    mask = torch.ones(2, 11, dtype=torch.int64)
    whole = model(TOKENS, attention_mask=mask)
    for argument in ("past_key_values", "cache"):
        cache = cache_of(model.transformer(TOKENS[:, :6], use_cache=True))
        rest = model(TOKENS[:, 6:], attention_mask=mask, **{argument: cache})
        assert cache.get_seq_length() == 11
        for key in ("logits", "start_logits", "end_logits"):
            if key in whole:
                expected = whole[key] if "Sequence" in name else whole[key][:, 6:]
                torch.testing.assert_close(rest[key], expected)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_sequence_classifier_returns_the_cache_that_is_asked_for(attention_type: str) -> None:
    model = head("CottentionGPTForSequenceClassification", attention_type)
    plain = model(TOKENS)
    assert cache_of(plain) is None
    assert cache_of(model(TOKENS, use_cache=False)) is None
    cached = model(TOKENS, use_cache=True)
    assert cache_of(cached).get_seq_length() == 11
    torch.testing.assert_close(cached.logits, plain.logits)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("name", [name for name in HEADS if "Choice" in name or "GPT" in name or "NextSent" in name])
def test_a_head_is_saved_and_opened_and_starts_from_a_pretrained_body(
    name: str, attention_type: str, tmp_path: Path
) -> None:
    model = head(name, attention_type).float()
    model.save_pretrained(tmp_path / "head")
    again = type(model).from_pretrained(tmp_path / "head")
    for old, new in zip(model(inputs_of(name)).to_tuple(), again(inputs_of(name)).to_tuple(), strict=True):
        if isinstance(old, Tensor):
            torch.testing.assert_close(old, new)
    pretrained = head("CottentionGPTForCausalLM" if "GPT" in name else "CottentionBertForPreTraining", attention_type)
    pretrained.float().save_pretrained(tmp_path / "body")
    started = type(model).from_pretrained(tmp_path / "body")
    for key, weight in pretrained.base_model.state_dict().items():
        assert torch.equal(started.base_model.state_dict()[key], weight)
    if "NextSent" in name:  # its head is a part of pretraining's
        assert torch.equal(started.cls.seq_relationship.weight, pretrained.cls.seq_relationship.weight)


def test_choices_need_their_dimension() -> None:
    model = head("CottentionBertForMultipleChoice")
    with pytest.raises(ValueError, match=r"inputs must have shape \[B, choices, T, \.\.\.\]; got \[2, 11\]"):
        model(TOKENS)
    with pytest.raises(ValueError, match="give exactly one of input_ids and inputs_embeds; got neither"):
        model()
