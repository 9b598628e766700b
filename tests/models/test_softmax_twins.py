"""With attention_type="softmax" our models are stock BERT and GPT-J: same weights, same outputs, same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, GPTJConfig
from transformers.models.bert import modeling_bert as stock_bert
from transformers.models.gptj import modeling_gptj as stock_gpt

from cottention.models import (
    CottentionBertForMaskedLM,
    CottentionBertForPreTraining,
    CottentionBertForQuestionAnswering,
    CottentionBertForSequenceClassification,
    CottentionBertForTokenClassification,
    CottentionGPTForCausalLM,
    CottentionGPTForSequenceClassification,
)
from tests.models.helpers import bert_config, gpt_config, gradients, randomised, some_tokens

MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 11, [1] * 7 + [0] * 4]),
    "left": torch.tensor([[1] * 11, [0] * 4 + [1] * 7]),
}
TOKENS = some_tokens(2, 11)


def bert_twins(ours: Any, stock: Any, **settings: Any) -> tuple[Any, Any]:
    config = bert_config("softmax", **settings)
    fields = {k: v for k, v in config.to_dict().items() if k in BertConfig().to_dict() and k != "model_type"}
    theirs = stock(BertConfig(**{**fields, **settings, "attn_implementation": "eager"}))
    return same_weights(ours(config), theirs, torch.float64)


def gpt_twins(ours: Any, stock: Any, **settings: Any) -> tuple[Any, Any]:
    config = gpt_config("softmax", **settings)
    fields = {k: v for k, v in config.to_dict().items() if k in GPTJConfig().to_dict() and k != "model_type"}
    # GPT-J computes its scores in float32 whatever the model's dtype, so float32 it is.
    return same_weights(ours(config), stock(GPTJConfig(**{**fields, **settings})), torch.float32)


def same_weights(ours: Any, theirs: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    randomised(ours, dtype)
    theirs.to(dtype).load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs.eval()


def assert_same(ours: Tensor, theirs: Tensor, where: Tensor | None = None) -> None:
    if where is not None:
        ours, theirs = ours[where.bool()], theirs[where.bool()]
    rtol, atol = (1e-10, 1e-10) if ours.dtype == torch.float64 else (1e-4, 2e-5)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def assert_same_gradients(ours: Any, theirs: Any) -> None:
    got, expected = gradients(ours), gradients(theirs)
    assert set(got) == set(expected)
    for name in got:
        # Softmax does not see a key's bias, so that gradient is rounding noise: hence the floor.
        error = (got[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-4)
        assert error < (1e-10 if got[name].dtype == torch.float64 else 1e-4), (name, error)


@pytest.mark.parametrize("mask", MASKS)
def test_bert_for_pretraining(mask: str) -> None:
    ours, theirs = bert_twins(CottentionBertForPreTraining, stock_bert.BertForPreTraining)
    labels = some_tokens(2, 11, seed=1)
    labels[:, ::3] = -100
    types = torch.tensor([[0] * 4 + [1] * 7]).expand(2, -1)
    inputs: dict[str, Any] = {
        "attention_mask": MASKS[mask],
        "token_type_ids": types,
        "labels": labels,
        "next_sentence_label": torch.tensor([0, 1]),
        "output_hidden_states": True,
    }
    got, expected = ours(TOKENS, **inputs), theirs(TOKENS, **inputs)
    assert_same(got.prediction_logits, expected.prediction_logits, MASKS[mask])
    assert_same(got.seq_relationship_logits, expected.seq_relationship_logits)
    assert_same(got.loss, expected.loss)
    assert_same(got.mlm_loss + got.nsp_loss, got.loss)
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for mine, stock in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_same(mine, stock, MASKS[mask])
    got.loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize(
    ("ours", "stock", "labels", "settings"),
    [
        (CottentionBertForMaskedLM, stock_bert.BertForMaskedLM, some_tokens(2, 11, seed=1), {}),
        (
            CottentionBertForSequenceClassification,
            stock_bert.BertForSequenceClassification,
            torch.tensor([2, 0]),
            {"num_labels": 3},
        ),
        (
            CottentionBertForSequenceClassification,
            stock_bert.BertForSequenceClassification,
            torch.tensor([0.5, -1.0]),
            {"num_labels": 1},
        ),
        (
            CottentionBertForSequenceClassification,
            stock_bert.BertForSequenceClassification,
            torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64),
            {"num_labels": 3},
        ),
        (
            CottentionBertForTokenClassification,
            stock_bert.BertForTokenClassification,
            some_tokens(2, 11, vocab_size=3),
            {"num_labels": 3},
        ),
    ],
    ids=["masked_lm", "single_label", "regression", "multi_label", "token"],
)
def test_bert_tasks(ours: Any, stock: Any, labels: Tensor, settings: dict[str, Any]) -> None:
    mine, theirs = bert_twins(ours, stock, **settings)
    got = mine(TOKENS, attention_mask=MASKS["right"], labels=labels)
    expected = theirs(TOKENS, attention_mask=MASKS["right"], labels=labels)
    assert_same(got.logits, expected.logits)
    assert_same(got.loss, expected.loss)
    got.loss.backward()
    expected.loss.backward()
    assert_same_gradients(mine, theirs)


def test_bert_for_question_answering() -> None:
    mine, theirs = bert_twins(CottentionBertForQuestionAnswering, stock_bert.BertForQuestionAnswering)
    # The second text's answer was cut off: it counts for nothing.
    ends = {"start_positions": torch.tensor([2, 11]), "end_positions": torch.tensor([5, 30])}
    got, expected = mine(TOKENS, **ends), theirs(TOKENS, **ends)
    assert_same(got.start_logits, expected.start_logits)
    assert_same(got.end_logits, expected.end_logits)
    assert_same(got.loss, expected.loss)


@pytest.mark.parametrize("mask", MASKS)
def test_gpt_for_causal_lm(mask: str) -> None:
    ours, theirs = gpt_twins(CottentionGPTForCausalLM, stock_gpt.GPTJForCausalLM)
    labels = TOKENS if MASKS[mask] is None else TOKENS.masked_fill(MASKS[mask] == 0, -100)
    if mask == "left":
        labels[1, 4] = -100  # predicted from padding, where nothing is promised
    inputs: dict[str, Any] = {"attention_mask": MASKS[mask], "labels": labels, "output_hidden_states": True}
    got, expected = ours(TOKENS, **inputs), theirs(TOKENS, **inputs)
    assert_same(got.logits, expected.logits, MASKS[mask])
    assert_same(got.loss, expected.loss)
    assert len(got.hidden_states) == len(expected.hidden_states) == 3
    for mine, stock in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_same(mine, stock, MASKS[mask])
    got.loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_gpt_for_sequence_classification(num_labels: int) -> None:
    mine, theirs = gpt_twins(
        CottentionGPTForSequenceClassification,
        stock_gpt.GPTJForSequenceClassification,
        num_labels=num_labels,
        pad_token_id=0,
    )
    tokens = TOKENS.masked_fill(MASKS["right"] == 0, 0)
    labels = torch.tensor([2, 0]) if num_labels == 3 else torch.tensor([0.5, -1.0])
    expected = theirs(tokens, attention_mask=MASKS["right"], labels=labels)
    for mask in (MASKS["right"], None):
        got = mine(tokens, attention_mask=mask, labels=labels)
        assert_same(got.logits, expected.logits)
        assert_same(got.loss, expected.loss)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_gpt_generates_the_same_text(num_beams: int, padded: bool) -> None:
    ours, theirs = gpt_twins(CottentionGPTForCausalLM, stock_gpt.GPTJForCausalLM)
    mask = MASKS["left"] if padded else torch.ones(2, 11, dtype=torch.int64)
    arguments: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "pad_token_id": 0,
        "do_sample": False,
        "num_beams": num_beams,
    }
    assert torch.equal(ours.generate(TOKENS, **arguments), theirs.generate(TOKENS, **arguments))


def test_gpt_takes_prompt_lookup_decoding() -> None:
    ours, _ = gpt_twins(CottentionGPTForCausalLM, stock_gpt.GPTJForCausalLM)
    tokens = torch.cat([TOKENS[:1], TOKENS[:1]], dim=1)
    arguments: dict[str, Any] = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False}
    plain = ours.generate(tokens, **arguments)
    assert torch.equal(ours.generate(tokens, prompt_lookup_num_tokens=3, **arguments), plain)
