"""Scores of own labels beside scikit-learn's, spans beside their definition, and the report that people read."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from cottention.evaluation.labels import label_scores, marks_spans, report, spans_of, tag_scores

NAMES = ("bad", "fair", "good", "rare")
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 60)  # nothing is rare
LOGITS = RNG.normal(size=(60, 4)) + 1.5 * np.eye(4)[LABELS]


def test_classes_are_scored_as_by_scikit_learn() -> None:
    scores = label_scores("classes", NAMES, LOGITS, LABELS)
    predicted = LOGITS.argmax(1)
    expected = f1_score(LABELS, predicted, average="macro", zero_division=0.0)  # pyright: ignore
    assert scores.main == scores.official["macro_f1"] == pytest.approx(expected)
    assert scores.official["accuracy"] == pytest.approx(accuracy_score(LABELS, predicted))
    matrix = confusion_matrix(LABELS, predicted, labels=range(4))
    assert scores.details["confusion"] == matrix.tolist()
    each = precision_recall_fscore_support(LABELS, predicted, labels=range(4), zero_division=0.0)  # pyright: ignore
    found = [
        [values[name] for name in ("precision", "recall", "f1", "rows")]
        for values in scores.details["classes"].values()
    ]
    np.testing.assert_allclose(found, np.transpose(np.asarray(each)))
    wrong = matrix - np.diag(np.diag(matrix))
    true, other, count = scores.details["most_confused"][0]
    assert wrong[NAMES.index(true), NAMES.index(other)] == count == wrong.max()


def test_a_class_that_nobody_has_and_nobody_says_counts_for_nothing() -> None:
    logits = np.eye(4)[LABELS]
    assert label_scores("classes", NAMES, logits, LABELS).main == 1


def test_several_labels_are_scored_as_by_scikit_learn() -> None:
    labels = (RNG.random((50, 3)) < 0.4).astype(float)
    logits = RNG.normal(size=(50, 3)) + labels
    scores = label_scores("several", NAMES[:3], logits, labels)
    for average in ("macro", "micro"):
        expected = f1_score(labels, logits > 0, average=average)
        assert scores.official[f"{average}_f1"] == pytest.approx(expected)
    assert scores.official["all_right"] == pytest.approx(accuracy_score(labels, logits > 0))


def test_numbers_are_scored_by_correlation_and_error() -> None:
    labels = np.array([1.0, 2.0, 3.0, 4.0])
    scores = label_scores("number", ("stars",), (labels * 2)[:, None], labels)
    assert scores.main == pytest.approx(1)
    assert scores.official["mean_error"] == pytest.approx(2.5)
    assert label_scores("number", ("stars",), np.ones((4, 1)), labels).main == 0


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-A I-A O", {("A", 1, 3)}),
        ("B-A B-A", {("A", 0, 1), ("A", 1, 2)}),
        ("B-A I-B", {("A", 0, 1), ("B", 1, 2)}),
        ("I-A I-A O I-A", {("A", 0, 2), ("A", 3, 4)}),
        ("B-A I-A E-A S-A O", {("A", 0, 3), ("A", 3, 4)}),
        ("O", set()),
    ],
)
def test_spans(tags: str, spans: set[tuple[str, int, int]]) -> None:
    assert spans_of(tags.split()) == spans


def test_tags_of_spans_are_scored_by_whole_spans_and_others_by_word() -> None:
    names = ("B-A", "I-A", "O")
    true = [np.array([0, 1, 2, 0]), np.array([2, -100, 0])]
    mine = [np.array([0, 1, 2, 2]), np.array([2, 0, 0])]  # one span missed; a word without a tag counts for nothing
    scores = tag_scores(names, mine, true)
    assert scores.official["span_f1"] == scores.main == pytest.approx(2 * 2 / (2 + 3))
    assert scores.official["accuracy"] == pytest.approx(5 / 6)
    assert not marks_spans(("NOUN", "VERB"))
    assert "span_f1" not in tag_scores(("NOUN", "VERB", "X"), mine, true).official


def test_the_report_shows_what_was_taken_for_what() -> None:
    lines = report(label_scores("classes", ("no", "yes"), np.eye(2)[[0, 1, 1, 1]], np.array([0, 0, 1, 1])).as_dict())
    assert lines.splitlines() == [
        "label  predicted",
        "       no  yes",
        "no      1    1",
        "yes     0    2",
        "",
        "     precision  recall      f1    rows",
        "no      1.0000  0.5000  0.6667       2",
        "yes     0.6667  1.0000  0.8000       2",
    ]
    many = tuple(f"class {number}" for number in range(40))
    scores = label_scores("classes", many, np.eye(40)[[1, 1, 2]], np.array([0, 1, 2])).as_dict()
    assert "confusion" not in scores
    assert report(scores).splitlines() == ["most often confused:", "  class 0 taken for class 1: 1"]
