"""Masked-token accuracy is what counting by hand finds, and every model is asked the same."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cottention.data import MaskedLMCollator
from cottention.errors import CottentionError, DataError
from cottention.evaluation import MaskedLMResult, UnigramModel, evaluate_masked_lm
from cottention.models import CottentionBertForPreTraining
from tests import tiny
from tests.models.helpers import bert_config, randomised

TEXTS = [tiny.TEXTS[0], "The people form for the States", "United"]
CLS, SEP, MASK = 2, 3, 4


@pytest.fixture(scope="module")
def bert() -> Any:
    return tiny.bert(max_position_embeddings=24)


def score(model: Any, texts: Any = TEXTS, **settings: Any) -> MaskedLMResult:
    return evaluate_masked_lm(model, tiny.wordpiece_tokenizer(), texts, **{"window": 12, **settings})


def windows_by_hand(texts: list[str], window: int) -> list[list[int]]:
    """Documents joined by [SEP], cut, each piece between [CLS] and [SEP]."""
    joined: list[int] = []
    for number, text in enumerate(texts):
        joined += ([SEP] if number else []) + tiny.wordpiece_tokenizer()(text, add_special_tokens=False)["input_ids"]
    pieces = [joined[start : start + window - 2] for start in range(0, len(joined), window - 2)]
    return [[CLS, *piece, SEP] for piece in pieces]


def by_hand(model: Any, texts: list[str], window: int, seed: int = 0, share: float = 0.15) -> list[tuple[int, Any]]:
    """(target, logits) of every masked token, a window at a time."""
    collator = MaskedLMCollator(tiny.wordpiece_tokenizer(), share, seed)
    asked = []
    for row in windows_by_hand(texts, window):
        batch = collator([{"input_ids": np.array(row, dtype=np.int32)}])
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[0]
        labels = batch["labels"][0].tolist()
        asked += [(label, logits[place]) for place, label in enumerate(labels) if label != -100]
    return asked


@pytest.mark.parametrize("window", [7, 12, 24])
def test_accuracy_and_loss_are_counted_by_hand(bert: Any, window: int) -> None:
    asked = by_hand(bert, TEXTS, window)
    result = score(bert, window=window)
    assert result.num_targets == len(asked) > 5
    assert result.num_windows == len(windows_by_hand(TEXTS, window))
    assert result.accuracy == sum(int(logits.argmax()) == target for target, logits in asked) / len(asked)
    nats = [-logits.log_softmax(-1)[target].item() for target, logits in asked]
    assert result.nats_per_token == pytest.approx(sum(nats) / len(asked), rel=1e-12)

    counts = Counter(target for target, _ in asked)
    assert result.baseline_accuracy == max(counts.values()) / len(asked)
    best = tiny.wordpiece_tokenizer().get_vocab()[result.baseline_token]
    assert counts[best] == max(counts.values())
    entropy = -sum(count / len(asked) * math.log(count / len(asked)) for count in counts.values())
    assert result.baseline_nats_per_token == pytest.approx(entropy, rel=1e-12)


def test_a_model_that_always_gives_the_baseline_answer_is_the_baseline(
    bert: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(bert)
    best = tiny.wordpiece_tokenizer().convert_tokens_to_ids([expected.baseline_token])

    def answers(self: Any, input_ids: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"logits": torch.zeros(*input_ids.shape, 60).index_fill(-1, torch.tensor(best), 1)}

    monkeypatch.setattr(type(bert), "forward", answers)
    result = score(bert)
    assert result.accuracy == result.baseline_accuracy == expected.baseline_accuracy
    assert result.num_targets == expected.num_targets


def test_a_model_that_copies_its_input_fills_nothing(bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(self: Any, input_ids: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        return {"logits": torch.nn.functional.one_hot(input_ids, 60).double()}

    monkeypatch.setattr(type(bert), "forward", copies)
    result = score(bert, TEXTS * 20)
    assert result.hidden_accuracy == 0
    assert 0 < result.accuracy < 0.3, "about a tenth of the targets stays in place"


def test_hidden_targets_are_scored_apart_beside_frequencies(bert: Any) -> None:
    texts = TEXTS * 20
    log_probs = np.log(np.arange(1, 61) / np.arange(1, 61).sum())
    unigram = UnigramModel(log_probs=log_probs, eos_token_id=SEP)
    collator = MaskedLMCollator(tiny.wordpiece_tokenizer(), 0.15, 0)
    nats, counted = [], []
    for row in windows_by_hand(texts, 12):
        batch = collator([{"input_ids": np.array(row, dtype=np.int32)}])
        with torch.no_grad():
            log_p = bert(batch["input_ids"]).logits[0].log_softmax(-1)
        for place, label in enumerate(batch["labels"][0].tolist()):
            if label not in (-100, int(batch["input_ids"][0, place])):
                nats.append(-log_p[place, label].item())
                counted.append(-log_probs[label])
    result = score(bert, texts, unigram=unigram)
    assert 0 < len(nats) < result.num_targets, "some targets stay in place"
    assert result.hidden_nats_per_token == pytest.approx(np.mean(nats), rel=1e-12)
    assert result.unigram_nats_per_token == pytest.approx(np.mean(counted), rel=1e-12)
    assert score(bert, texts).unigram_nats_per_token is None


def test_the_batch_size_does_not_change_the_result(bert: Any) -> None:
    first, *others = [score(bert, batch_size=batch_size) for batch_size in (1, 2, 50)]
    for other in others:
        assert other.nats_per_token == pytest.approx(first.nats_per_token, rel=1e-12)
        assert replace(other, nats_per_token=first.nats_per_token) == first


def test_the_seed_chooses_the_masks_and_nothing_else_does(bert: Any) -> None:
    first = score(bert, seed=1)
    np.random.seed(5)  # noqa: NPY002  # the global state must not matter
    torch.manual_seed(5)
    assert score(bert, seed=1) == first
    assert score(bert, seed=2) != first
    asked = by_hand(bert, TEXTS, 12, seed=1, share=0.4)
    assert score(bert, seed=1, mlm_probability=0.4).num_targets == len(asked) > first.num_targets


def test_a_pretraining_model_is_asked_through_its_masked_head() -> None:
    model = randomised(CottentionBertForPreTraining(bert_config(vocab_size=60)))
    alone = tiny.bert()
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if k in alone.state_dict()})
    assert score(model) == score(alone)


def test_dropout_is_off_and_the_mode_comes_back(bert: Any) -> None:
    model = tiny.bert(max_position_embeddings=24, hidden_dropout_prob=0.5).train()
    assert score(model) == score(bert)
    assert model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 25}, "the model has 24 positions; got a window of 25"),
        ({"window": 2}, "a window must hold at least 3 tokens; got 2"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"mlm_probability": 0.0}, "mlm_probability must be between 0 and 1; got 0.0"),
    ],
)
def test_a_number_that_makes_no_sense_is_one_line(bert: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CottentionError) as caught:
        score(bert, **settings)
    assert str(caught.value) == message


def test_text_that_cannot_be_masked_is_one_line(bert: Any) -> None:
    for texts in ([], [""]):
        with pytest.raises(DataError, match="there is no text to score"):
            score(bert, texts)
    with pytest.raises(DataError, match="no token to mask: all of it is unknown to the tokenizer"):
        score(bert, ["東京 東京"])


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(CottentionError, match="do not belong together: 60 tokens but 50 embeddings"):
        score(tiny.bert(vocab_size=50))
    with pytest.raises(CottentionError, match="the tokenizer has no mask token"):
        evaluate_masked_lm(tiny.bert(vocab_size=300), tiny.bpe_tokenizer(), TEXTS, window=12)
