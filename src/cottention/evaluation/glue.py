"""GLUE's metrics: the official ones, and those by which the published tables were made.

Both are computed here from the same predictions, because the published figures are others than their columns' usual
meaning: accuracy for CoLA, the mean of every batch's F1 for QQP and MRPC, the absolute Pearson correlation for STS-B.

    scores = glue_scores(glue_task("mrpc"), predictions, labels)
    scores.official                    # {"accuracy": 0.86, "f1": 0.9}
    scores.as_published                # {"mean_batch_f1": 0.89}
    scores.main                        # 0.88, by which epochs are compared
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from transformers import PreTrainedModel

from cottention.data.glue_batches import GlueCollator
from cottention.data.glue_tasks import GlueTask
from cottention.errors import DataError

PUBLISHED_BATCH = 32
"""Rows whose F1 the published code averaged: its batch."""


@dataclass(frozen=True, kw_only=True)
class GlueScores:
    """Both kinds of scores of one split, as fractions of 1."""

    official: dict[str, float]
    """By GLUE's metric names."""
    as_published: dict[str, float]
    """By the published code's way of counting."""

    @property
    def main(self) -> float:
        """Mean of the official metrics, as the GLUE server averages a task that has two."""
        return sum(self.official.values()) / len(self.official)


def glue_scores(task: GlueTask, predictions: np.ndarray, labels: np.ndarray) -> GlueScores:
    """Score predictions.

    Args:
        task: whose metrics.
        predictions: `[N]` class numbers, or scores in STS-B; see `predictions_of`.
        labels: `[N]`, of the same kind.

    Returns:
        Defined numbers whatever was predicted: a correlation with a constant, which has none, counts as 0.

    Raises:
        DataError: there is nothing to score, their numbers differ, or a prediction is NaN or infinite.
    """
    if len(predictions) != len(labels) or not len(labels):
        raise DataError(f"predictions and labels must be as many, and some; got {len(predictions)} and {len(labels)}")
    if not np.isfinite(predictions).all():
        raise DataError(f"predictions must be finite; {int((~np.isfinite(predictions)).sum())} of them are not")
    metrics = _METRICS.get(task.name, (_accuracy, _accuracy))
    official, as_published = (metric(predictions, labels) for metric in metrics)
    return GlueScores(official=official, as_published=as_published)


def predictions_of(task: GlueTask, logits: np.ndarray) -> np.ndarray:
    """Class numbers, or STS-B's scores, of a model's logits `[N, labels]`."""
    return logits[:, 0] if task.is_regression else logits.argmax(axis=1)


@torch.inference_mode()
def glue_logits(
    model: PreTrainedModel,
    rows: Dataset,
    collator: GlueCollator,
    *,
    batch_size: int = 64,
    autocast: dict[str, Any] | None = None,
    show_progress: bool = False,
) -> np.ndarray:
    """A classifier's logits `[N, labels]` for every encoded row, in the rows' order.

    Args:
        model: in evaluation mode while this runs; put back afterwards.
        rows: of `encode_glue`.
        collator: joins them.
        batch_size: rows read together; the result does not depend on it.
        autocast: arguments of torch.autocast; None computes in the weights' type.
        show_progress: a bar on stderr.
    """
    from tqdm import tqdm

    was_training = model.training
    model.eval()
    lengths = np.fromiter((len(ids) for ids in rows["input_ids"]), dtype=np.int64, count=len(rows))
    order = np.argsort(lengths, kind="stable")  # texts of like length together: padded batches waste the least
    logits = np.zeros((len(rows), model.config.num_labels or 1), dtype=np.float64)
    inputs = rows.remove_columns("label") if "label" in rows.column_names else rows
    try:
        for start in tqdm(range(0, len(rows), batch_size), desc="scoring", leave=False, disable=not show_progress):
            chosen = order[start : start + batch_size]
            batch = send_to_device(collator(inputs.select(chosen).to_list()), model.device)
            with torch.autocast(**autocast or {"device_type": model.device.type, "enabled": False}):
                logits[chosen] = model(**batch).logits.double().cpu().numpy()
    finally:
        model.train(was_training)
    return logits


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"accuracy": float((predictions == labels).mean())}


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import matthews_corrcoef

    # A constant has no correlation; scikit-learn calls that 0, but not without a warning in every version.
    constant = len(set(predictions.tolist())) < 2 or len(set(labels.tolist())) < 2
    return {"mcc": 0.0 if constant else float(matthews_corrcoef(labels, predictions))}


def _accuracy_and_f1(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {**_accuracy(predictions, labels), "f1": _f1(predictions, labels)}


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))  # pyright: ignore[reportArgumentType]


def _mean_batch_f1(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    starts = range(0, len(labels), PUBLISHED_BATCH)
    pairs = [(predictions[i : i + PUBLISHED_BATCH], labels[i : i + PUBLISHED_BATCH]) for i in starts]
    return {"mean_batch_f1": float(np.mean([_f1(*pair) for pair in pairs]))}


def correlations(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's, 0 where one side is constant."""
    from scipy.stats import pearsonr, spearmanr

    return {
        name: _correlation(of, predictions, labels) for name, of in (("pearson", pearsonr), ("spearman", spearmanr))
    }


def _absolute_pearson(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"absolute_pearson": abs(correlations(predictions, labels)["pearson"])}


def _correlation(of: Callable[..., Any], predictions: np.ndarray, labels: np.ndarray) -> float:
    # Rounding can leave a constant with a spread of its last bit, which would correlate as anything.
    spread = [float(np.ptp(values)) for values in (predictions, labels)]
    scale = [float(np.abs(values).max()) for values in (predictions, labels)]
    if len(labels) < 2 or any(width <= 1e-12 * size for width, size in zip(spread, scale, strict=True)):
        return 0.0
    value = float(of(predictions, labels)[0])
    return value if math.isfinite(value) else 0.0


_METRICS = {
    "cola": (_matthews, _accuracy),
    "mrpc": (_accuracy_and_f1, _mean_batch_f1),
    "qqp": (_accuracy_and_f1, _mean_batch_f1),
    "stsb": (correlations, _absolute_pearson),
}
"""Official and published way, where they are not accuracy."""
