"""Packed texts equal separate texts: outputs, losses and gradients, in both models with both attention types."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cottention.models import (
    CottentionBertForMaskedLM,
    CottentionBertForPreTraining,
    CottentionBertForSequenceClassification,
    CottentionGPTForCausalLM,
    CottentionGPTForSequenceClassification,
)
from tests.models.helpers import ATTENTION_TYPES, bert_config, gpt_config, gradients, randomised, some_tokens

TOKENS = some_tokens(1, 23)
CU_SEQLENS = torch.tensor([0, 9, 10, 23], dtype=torch.int32)
TEXTS = [slice(0, 9), slice(9, 10), slice(10, 23)]


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_gpt_logits_loss_and_gradients(attention_type: str) -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config(attention_type)))
    packed = model(TOKENS, labels=TOKENS, cu_seqlens=CU_SEQLENS, output_hidden_states=True)
    packed.loss.backward()
    got = gradients(model)
    model.zero_grad()
    separate = [model(TOKENS[:, text], labels=TOKENS[:, text], num_items_in_batch=20) for text in TEXTS]
    loss = torch.stack([out.loss for out in separate]).sum()
    loss.backward()
    torch.testing.assert_close(packed.loss, loss)
    torch.testing.assert_close(packed.logits, torch.cat([out.logits for out in separate], dim=1))
    for name, expected in gradients(model).items():
        torch.testing.assert_close(got[name], expected)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_bert_logits_loss_and_gradients(attention_type: str) -> None:
    model = randomised(CottentionBertForPreTraining(bert_config(attention_type)))
    labels = TOKENS.masked_fill(torch.arange(23) % 3 == 0, -100)
    types = (torch.arange(23) % 5 > 2).long()[None]
    sentences = torch.tensor([0, 1, 1])
    packed = model(TOKENS, token_type_ids=types, labels=labels, next_sentence_label=sentences, cu_seqlens=CU_SEQLENS)
    packed.loss.backward()
    got = gradients(model)
    model.zero_grad()
    settings = {"num_items_in_batch": (labels != -100).sum(), "num_sequences_in_batch": 3}
    separate = [
        model(
            TOKENS[:, text],
            token_type_ids=types[:, text],
            labels=labels[:, text],
            next_sentence_label=sentences[i : i + 1],
            **settings,
        )
        for i, text in enumerate(TEXTS)
    ]
    loss = torch.stack([out.loss for out in separate]).sum()
    loss.backward()
    torch.testing.assert_close(packed.loss, loss)
    torch.testing.assert_close(packed.prediction_logits, torch.cat([out.prediction_logits for out in separate], dim=1))
    torch.testing.assert_close(
        packed.seq_relationship_logits, torch.cat([out.seq_relationship_logits for out in separate])
    )
    for name, expected in gradients(model).items():
        torch.testing.assert_close(got[name], expected)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(
    ("kind", "make"),
    [(CottentionBertForSequenceClassification, bert_config), (CottentionGPTForSequenceClassification, gpt_config)],
)
def test_classifiers_give_one_row_per_text(kind: Any, make: Any, attention_type: str) -> None:
    model = randomised(kind(make(attention_type, num_labels=3)))
    packed = model(TOKENS, cu_seqlens=CU_SEQLENS).logits
    torch.testing.assert_close(packed, torch.cat([model(TOKENS[:, text]).logits for text in TEXTS]))


@pytest.mark.parametrize(
    ("kind", "make"), [(CottentionBertForMaskedLM, bert_config), (CottentionGPTForCausalLM, gpt_config)]
)
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_contradictions_are_named(kind: Any, make: Any, attention_type: str) -> None:
    model = kind(make(attention_type)).eval()
    with pytest.raises(ValueError, match="attention_mask and cu_seqlens exclude each other"):
        model(TOKENS, attention_mask=torch.ones_like(TOKENS), cu_seqlens=CU_SEQLENS)
    with pytest.raises(ValueError, match="cu_seqlens needs a batch of one packed row, B=1; got B=2"):
        model(TOKENS.expand(2, -1), cu_seqlens=CU_SEQLENS)


def test_softmax_keeps_no_cache_of_packed_texts() -> None:
    model = CottentionGPTForCausalLM(gpt_config("softmax")).eval()
    assert model(TOKENS, cu_seqlens=CU_SEQLENS).past_key_values is None
    with pytest.raises(ValueError, match="use_cache and past_key_values exclude cu_seqlens"):
        model(TOKENS, cu_seqlens=CU_SEQLENS, use_cache=True)
    cache = model(TOKENS).past_key_values
    with pytest.raises(ValueError, match="cu_seqlens and a filled past_key_values exclude each other"):
        model(TOKENS, cu_seqlens=CU_SEQLENS, past_key_values=cache)


@pytest.mark.parametrize("training", [True, False])
def test_packed_texts_go_on_from_their_states(training: bool) -> None:
    """Texts of 9, 1 and 13 tokens, read in two packs that cut them at 4, 0 and 13, equal whole ones."""
    model = randomised(CottentionGPTForCausalLM(gpt_config())).train(training)
    assert model(TOKENS, cu_seqlens=CU_SEQLENS).past_key_values is None, "only when asked for"
    whole = model(TOKENS, cu_seqlens=CU_SEQLENS).logits
    heads, tails = [slice(0, 4), slice(0, 0), slice(10, 23)], [slice(4, 9), slice(9, 10), slice(23, 23)]
    cache, found = None, []
    for parts in (heads, tails):
        ids = torch.cat([TOKENS[:, part] for part in parts], dim=1)
        ends = torch.tensor([0] + [part.stop - part.start for part in parts]).cumsum(0).to(torch.int32)
        out = model(ids, cu_seqlens=ends, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(dict(zip(range(3), out.logits.split(ends.diff().tolist(), dim=1), strict=True)))
    joined = torch.cat([torch.cat([part[i] for part in found], dim=1) for i in range(3)], dim=1)
    torch.testing.assert_close(joined, whole)
    assert cache.next_position.tolist() == [9, 1, 13]
    assert [state.seen.tolist() for state in cache.states] == [[9, 1, 13]] * len(cache.states)


def test_packed_texts_with_positions_of_their_own_go_on_behind_them() -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config())).eval()
    positions = torch.arange(23)[None] + 100
    cache = model(
        TOKENS, cu_seqlens=torch.tensor([0, 9, 9, 23]), position_ids=positions, use_cache=True
    ).past_key_values
    assert cache.next_position.tolist() == [109, 0, 123]
