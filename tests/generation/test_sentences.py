"""Next-sentence scores and sentence vectors: those of the texts alone, whatever the batches, in the order given."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from cottention.errors import CheckpointError, DataError, SettingsError
from cottention.generation import embed_sentences, load_model_and_tokenizer, score_next_sentences
from cottention.models import CottentionBertForPreTraining, CottentionBertModel
from tests import tiny
from tests.models.helpers import ATTENTION_TYPES, bert_config, randomised

TOKENIZER: Any = tiny.wordpiece_tokenizer()
PAIRS = [
    ("the people of the United States", "order"),
    ("Union", "in order to form a more perfect Union"),
    ("the", "people"),
    ("a more perfect Union", "the people"),
]
TEXTS = [" ".join(pair) for pair in PAIRS]


def bert(kind: Any, attention_type: str = "cosine", **settings: Any) -> Any:
    return randomised(kind(bert_config(attention_type, vocab_size=len(TOKENIZER), **settings)))


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_scores_are_those_of_each_pair_alone(attention_type: str) -> None:
    model = bert(CottentionBertForPreTraining, attention_type)
    expected = []
    for first, second in PAIRS:
        logits = model(**TOKENIZER(first, second, return_tensors="pt")).seq_relationship_logits[0]
        expected.append(1 / (1 + (logits[1] - logits[0]).exp()).item())
    assert len({round(value, 3) for value in expected}) > 1
    for batch_size in (1, 3, 32):
        assert score_next_sentences(model, TOKENIZER, PAIRS, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_vectors_are_means_over_real_tokens(attention_type: str) -> None:
    model = bert(CottentionBertModel, attention_type)
    expected = torch.stack(
        [model(**TOKENIZER(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS]
    ).float()
    for batch_size in (1, 3, 32):
        torch.testing.assert_close(embed_sentences(model, TOKENIZER, TEXTS, batch_size=batch_size), expected)
    unit = embed_sentences(model, TOKENIZER, TEXTS, normalize=True)
    torch.testing.assert_close(unit, expected / expected.norm(dim=-1, keepdim=True))
    # A model with a head gives the vectors of its base.
    whole = bert(CottentionBertForPreTraining, attention_type)
    torch.testing.assert_close(embed_sentences(whole, TOKENIZER, TEXTS), embed_sentences(whole.bert, TOKENIZER, TEXTS))


def test_nothing_gives_nothing() -> None:
    assert score_next_sentences(bert(CottentionBertForPreTraining), TOKENIZER, []) == []
    assert embed_sentences(bert(CottentionBertModel), TOKENIZER, []).shape == (0, 32)


def test_long_texts_are_cut_and_counted(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("cottention"), "propagate", True)
    model = bert(CottentionBertModel, max_position_embeddings=10)
    vectors = embed_sentences(model, TOKENIZER, ["the people " * 40, "order"])
    assert vectors.isfinite().all()
    # A logger that another test left without propagation is watched by pytest itself: the line then comes twice.
    assert set(caplog.messages) == {"1 of 2 texts are longer than 10 tokens and were cut"}


def test_mistakes_are_one_line() -> None:
    model = bert(CottentionBertForPreTraining)
    with pytest.raises(SettingsError, match="batch_size must be at least 1; got 0"):
        score_next_sentences(model, TOKENIZER, PAIRS, batch_size=0)
    with pytest.raises(DataError, match="pair 2 must have two sentences; got 'order'"):
        score_next_sentences(model, TOKENIZER, [PAIRS[0], "order"])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"text 2 is not valid Unicode text \(character 1\)"):
        embed_sentences(model, TOKENIZER, ["a", "b\udcff"])
    with pytest.raises(SettingsError, match="tokenizer and model do not belong together: 290 tokens"):
        embed_sentences(model, tiny.bpe_tokenizer(), ["a"])


def test_a_model_without_the_head_is_told_from_a_damaged_one(tmp_path: Any) -> None:
    folder = tiny.save(tmp_path / "mlm", tiny.bert(dtype=torch.float32), TOKENIZER)
    with pytest.raises(
        CheckpointError, match=r"mlm has no next-sentence head; pretrain with model\.next_sentence_head"
    ):
        load_model_and_tokenizer(folder, "next-sentence")
    model, _ = load_model_and_tokenizer(folder, "encoder")
    assert isinstance(model, CottentionBertModel)
    gpt = tiny.save(tmp_path / "gpt", tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer())
    with pytest.raises(
        CheckpointError, match="is a GPT, which generates text; needed is a BERT with a next-sentence h"
    ):
        load_model_and_tokenizer(gpt, "next-sentence")
