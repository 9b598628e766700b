"""GLUE's metrics against hand-computed cases and the libraries, and defined numbers for degenerate predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics

from cottention.data.glue_batches import GlueCollator, encode_glue
from cottention.data.glue_tasks import GLUE_TASKS, GlueTask, glue_task
from cottention.errors import DataError
from cottention.evaluation.glue import glue_logits, glue_scores, predictions_of
from cottention.models import CottentionBertForSequenceClassification
from tests import tiny
from tests.models.helpers import bert_config, randomised

# 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
LABELS = np.array([1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
GUESSES = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])


def test_by_hand() -> None:
    assert glue_scores(glue_task("sst2"), GUESSES, LABELS).official == {"accuracy": 0.7}
    cola = glue_scores(glue_task("cola"), GUESSES, LABELS)
    assert cola.official["mcc"] == pytest.approx((3 * 4 - 1 * 2) / np.sqrt(4 * 5 * 5 * 6))
    assert cola.as_published == {"accuracy": 0.7}
    mrpc = glue_scores(glue_task("mrpc"), GUESSES, LABELS)
    assert mrpc.official == {"accuracy": 0.7, "f1": pytest.approx(6 / 9)}
    assert mrpc.main == pytest.approx((0.7 + 6 / 9) / 2)
    stsb = glue_scores(glue_task("stsb"), np.array([1.0, 2.0, 4.0]), np.array([3.0, 2.0, 1.0]))
    assert stsb.official == {"pearson": pytest.approx(-3 / np.sqrt(14 / 3 * 2)), "spearman": pytest.approx(-1)}
    assert stsb.as_published == {"absolute_pearson": pytest.approx(3 / np.sqrt(14 / 3 * 2))}


def test_the_published_f1_is_a_mean_over_batches() -> None:
    # Three batches: 32 rows all right, 32 with no positive anywhere (F1 counts as 0), 2 rows of F1 2/3.
    labels = np.array([1] * 32 + [0] * 32 + [1, 1])
    guesses = np.array([1] * 32 + [0] * 32 + [1, 0])
    scores = glue_scores(glue_task("qqp"), guesses, labels)
    assert scores.as_published == {"mean_batch_f1": pytest.approx((1 + 0 + 2 / 3) / 3)}
    assert scores.official["f1"] == pytest.approx(66 / 67)


@pytest.mark.parametrize("task", GLUE_TASKS.values(), ids=GLUE_TASKS)
def test_against_the_libraries(task: GlueTask) -> None:
    source = np.random.default_rng(0)
    if task.is_regression:
        labels = source.uniform(0, 5, 200)
        guesses = labels + source.normal(size=200)
        expected = {
            "pearson": stats.pearsonr(guesses, labels)[0],
            "spearman": stats.spearmanr(guesses, labels)[0],
        }
    else:
        labels = source.integers(task.num_labels, size=200)
        guesses = np.where(source.random(200) < 0.7, labels, source.integers(task.num_labels, size=200))
        expected = {"accuracy": sklearn_metrics.accuracy_score(labels, guesses)}
        if task.name == "cola":
            expected = {"mcc": sklearn_metrics.matthews_corrcoef(labels, guesses)}
        elif task.name in ("mrpc", "qqp"):
            expected["f1"] = sklearn_metrics.f1_score(labels, guesses)
    assert glue_scores(task, guesses, labels).official == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("task", GLUE_TASKS.values(), ids=GLUE_TASKS)
@pytest.mark.parametrize("what", ["constant guesses", "constant labels", "one row"])
def test_degenerate_cases_are_numbers_without_a_warning(task: GlueTask, what: str) -> None:
    kind = np.float64 if task.is_regression else np.int64
    some, constant = np.array([0, 1, 0, 1, 1], dtype=kind), np.full(5, 0.1 if task.is_regression else 0, dtype=kind)
    guesses, labels = {
        "constant guesses": (constant, some),
        "constant labels": (some, constant),
        "one row": (some[:1], some[:1]),
    }[what]
    scores = glue_scores(task, guesses, labels)
    assert all(0 <= value <= 1 for value in (*scores.official.values(), *scores.as_published.values()))
    if task.is_regression or task.name == "cola":
        assert scores.main == 0


def test_a_constant_that_rounding_has_spread_has_no_correlation() -> None:
    guesses = 2.5 + np.array([0, 1, 0, 1]) * 4e-16
    assert glue_scores(glue_task("stsb"), guesses, np.array([1.0, 2, 3, 4])).main == 0


def test_predictions_of_logits() -> None:
    logits = np.array([[0.1, 3, 2], [1, 0, -1]])
    assert predictions_of(glue_task("mnli"), logits).tolist() == [1, 0]
    assert predictions_of(glue_task("stsb"), logits[:, :1]).tolist() == [0.1, 1]


def test_mistakes_are_one_line() -> None:
    with pytest.raises(DataError, match="predictions and labels must be as many, and some; got 2 and 3"):
        glue_scores(glue_task("sst2"), np.zeros(2), np.zeros(3))
    with pytest.raises(DataError, match="got 0 and 0"):
        glue_scores(glue_task("sst2"), np.zeros(0), np.zeros(0))
    with pytest.raises(DataError, match="predictions must be finite; 1 of them are not"):
        glue_scores(glue_task("stsb"), np.array([1, np.nan]), np.zeros(2))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("attention_type", ["cosine", "softmax"])
def test_logits_keep_the_rows_order_whatever_the_batches(attention_type: str, packed: bool) -> None:
    from datasets import Dataset

    tokenizer = tiny.wordpiece_tokenizer()
    texts = ["the people of the United States", "order", "a more perfect Union", "Union", "the people in order"]
    rows = encode_glue(Dataset.from_dict({"first": texts, "second": [""] * 5, "label": [0] * 5}), tokenizer, 64).rows
    config = bert_config(attention_type, vocab_size=len(tokenizer), num_labels=3, hidden_dropout_prob=0.5)
    model: Any = randomised(CottentionBertForSequenceClassification(config)).train()
    collator = GlueCollator(pad_token_id=tokenizer.pad_token_id, packed=packed)  # pyright: ignore[reportArgumentType]
    got = glue_logits(model, rows, collator, batch_size=2)
    assert model.training  # left as it was, but dropout did not act
    model.eval()
    with torch.inference_mode():
        expected = [model(torch.tensor([ids])).logits[0].tolist() for ids in rows["input_ids"]]
    np.testing.assert_allclose(got, expected, rtol=1e-9)
