"""Scores of a classifier, a regressor or a tagger on rows of one's own, balanced: every class counts the same.

Accuracy alone flatters a model of rare classes; macro F1, the mean of the classes' F1, decides which epoch is the best.
Where a text has several labels, it is the mean over the labels, each above a probability of one half; for numbers the
mean of Pearson's and Spearman's correlation; for tags that mark spans (B-, I-) the F1 of whole spans.

    scores = label_scores("classes", ("neg", "pos"), logits, labels)
    scores.main, scores.official, scores.details["confusion"]
    print(scores.report())
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cottention.evaluation.glue import correlations
from cottention.files import IGNORE_INDEX

_LARGEST_TABLE = 30  # classes of which every confusion is kept
_WIDEST_TABLE = 12  # classes of which they are shown
_MOST_CONFUSED = 10
_LONGEST_NAME = 18


@dataclass(frozen=True, kw_only=True)
class LabelScores:
    """Scores of one set of rows, as fractions of 1."""

    main: float
    """By which epochs are compared."""
    official: dict[str, float]
    """What a line shows."""
    details: dict[str, Any]
    """For plain JSON: num_rows, classes (precision, recall, f1 and rows of each), confusion, or most_confused."""

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"main": self.main, "official": self.official, **self.details}


def label_scores(kind: str, names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> LabelScores:
    """Score what a model says of texts.

    Args:
        kind: "classes", "number" or "several".
        names: of the classes.
        logits: `[N, L]`.
        labels: `[N]` classes or numbers, or `[N, L]` zeros and ones.
    """
    if kind == "number":
        return _of_numbers(logits[:, 0], labels)
    if kind == "several":
        return _of_several(names, logits > 0, labels > 0.5)
    return _of_classes(names, logits.argmax(axis=1), labels)


def tag_scores(names: Sequence[str], predicted: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> LabelScores:
    """Score what a model says of words.

    Args:
        names: of the tags; where they are B-X, I-X (also E-X, S-X) and O, whole spans are scored.
        predicted: of each text, a tag's number for each word.
        labels: the same; -100 where there is none.
    """
    flat = [np.concatenate([np.empty(0, dtype=np.int64), *rows]) for rows in (predicted, labels)]
    known = flat[1] != IGNORE_INDEX
    words = _of_classes(names, flat[0][known], flat[1][known])
    if not marks_spans(names):
        return words
    found, given, right = 0, 0, 0
    for mine, true in zip(predicted, labels, strict=True):
        spans = [spans_of([names[int(tag)] for tag in row[true != IGNORE_INDEX]]) for row in (mine, true)]
        found, given, right = found + len(spans[0]), given + len(spans[1]), right + len(spans[0] & spans[1])
    f1 = _f1(right, found, given)
    official = {"span_f1": f1, "accuracy": words.official["accuracy"]}
    spans = {"num_spans": given, "precision": right / max(found, 1), "recall": right / max(given, 1), "f1": f1}
    return LabelScores(main=f1, official=official, details={**words.details, "spans": spans})


def marks_spans(names: Sequence[str]) -> bool:
    """Whether tags are those of spans: O, and others that begin with B-, I-, E- or S-."""
    return any(name.startswith("B-") for name in names) and all(
        name == "O" or name[:2] in ("B-", "I-", "E-", "S-") for name in names
    )


def spans_of(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Spans (kind, first word, word behind the last) of a text's tags; an I- without its B- begins one."""
    spans, begin, kind = set(), 0, ""
    for at, tag in enumerate([*tags, "O"]):
        mark, _, named = tag.partition("-")
        goes_on = kind and named == kind and mark in ("I", "E")
        if kind and not goes_on:
            spans.add((kind, begin, at))
            kind = ""
        if mark != "O" and not goes_on:
            begin, kind = at, named
        if mark in ("E", "S") and kind:
            spans.add((kind, begin, at + 1))
            kind = ""
    return spans


def report(scores: dict[str, Any]) -> str:
    """The details of `LabelScores.as_dict` as people read them: what was taken for what, and each class's figures."""
    classes: dict[str, Any] = scores.get("classes", {})
    lines = []
    if "confusion" in scores and len(classes) <= _WIDEST_TABLE:
        lines += _confusion_lines(list(classes), scores["confusion"])
    elif scores.get("most_confused"):
        lines.append("most often confused:")
        lines += [f"  {true} taken for {other}: {count}" for true, other, count in scores["most_confused"]]
    if classes and len(classes) <= _LARGEST_TABLE:
        lines += ["", *_class_lines(classes)] if lines else _class_lines(classes)
    if "spans" in scores:
        spans = scores["spans"]
        shown = ", ".join(f"{name} {spans[name]:.4f}" for name in ("precision", "recall", "f1"))
        lines += [f"{spans['num_spans']} spans: {shown}"]
    return "\n".join(lines)


def _of_numbers(predicted: np.ndarray, labels: np.ndarray) -> LabelScores:
    found = correlations(predicted, labels)
    difference = np.abs(predicted - labels)
    official = {**found, "mean_error": float(difference.mean())}
    details = {"num_rows": len(labels), "root_mean_square_error": float(np.sqrt((difference**2).mean()))}
    return LabelScores(main=sum(found.values()) / len(found), official=official, details=details)


def _of_classes(names: Sequence[str], predicted: np.ndarray, labels: np.ndarray) -> LabelScores:
    count = len(names)
    confusion = np.bincount(labels.astype(np.int64) * count + predicted, minlength=count * count)
    confusion = confusion.reshape(count, count)  # [true, predicted]
    right, given, found = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    classes, macro = _classes(names, right, found, given)
    accuracy = float(right.sum() / max(len(labels), 1))
    details: dict[str, Any] = {"num_rows": len(labels), "classes": classes}
    if count <= _LARGEST_TABLE:
        details["confusion"] = confusion.tolist()
    details["most_confused"] = _most_confused(names, confusion)
    return LabelScores(main=macro, official={"macro_f1": macro, "accuracy": accuracy}, details=details)


def _of_several(names: Sequence[str], predicted: np.ndarray, labels: np.ndarray) -> LabelScores:
    right, found, given = (predicted & labels).sum(0), predicted.sum(0), labels.sum(0)
    classes, macro = _classes(names, right, found, given)
    official = {
        "macro_f1": macro,
        "micro_f1": _f1(int(right.sum()), int(found.sum()), int(given.sum())),
        "all_right": float((predicted == labels).all(axis=1).mean()),
    }
    return LabelScores(main=macro, official=official, details={"num_rows": len(labels), "classes": classes})


def _classes(
    names: Sequence[str], right: np.ndarray, found: np.ndarray, given: np.ndarray
) -> tuple[dict[str, dict[str, Any]], float]:
    """Each class's figures, and the mean F1 of those that the rows or the predictions have."""
    classes, scored = {}, []
    for name, *counts in zip(names, right.tolist(), found.tolist(), given.tolist(), strict=True):
        hits, said, true = counts
        f1 = _f1(hits, said, true)
        classes[name] = {"precision": hits / max(said, 1), "recall": hits / max(true, 1), "f1": f1, "rows": true}
        if said or true:
            scored.append(f1)
    return classes, float(np.mean(scored)) if scored else 0.0


def _f1(right: int, found: int, given: int) -> float:
    return 2 * right / (found + given) if found + given else 0.0


def _most_confused(names: Sequence[str], confusion: np.ndarray) -> list[list[Any]]:
    wrong = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSED]
    pairs = [np.unravel_index(at, wrong.shape) for at in order]
    return [[names[true], names[other], int(wrong[true, other])] for true, other in pairs if wrong[true, other]]


def _confusion_lines(names: list[str], confusion: list[list[int]]) -> list[str]:
    shown = [_short(name) for name in names]
    first = max(map(len, [*shown, "label"]))
    widths = [max(len(name), *(len(str(row[at])) for row in confusion)) for at, name in enumerate(shown)]
    head = "  ".join(f"{name:>{width}}" for name, width in zip(shown, widths, strict=True))
    rows = [
        f"{name:<{first}}  " + "  ".join(f"{count:>{width}}" for count, width in zip(row, widths, strict=True))
        for name, row in zip(shown, confusion, strict=True)
    ]
    return [f"{'label':<{first}}  predicted", f"{'':<{first}}  {head}", *rows]


def _class_lines(classes: dict[str, Any]) -> list[str]:
    first = max(len(_short(name)) for name in classes)
    lines = [f"{'':<{first}}  precision  recall      f1    rows"]
    for name, values in classes.items():
        figures = f"{values['precision']:>9.4f}  {values['recall']:.4f}  {values['f1']:.4f}  {values['rows']:>6}"
        lines.append(f"{_short(name):<{first}}  {figures}")
    return lines


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."
