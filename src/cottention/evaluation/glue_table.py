"""The tables of GLUE: our runs under the published rows, by the official metrics and by the published way of counting.

The published figures are no official metrics in four columns (see `evaluation/glue.py`), so the first table leaves
those cells of the published rows empty, and the second one counts our predictions as the published code did.

    runs = [read_glue_run(Path("runs/glue-cosine")), read_glue_run(Path("runs/glue-softmax"))]
    print(glue_tables(runs).markdown())
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cottention.data.glue_tasks import GLUE_TASKS
from cottention.errors import DataError
from cottention.seals import is_intact_record

COLUMNS = {
    "MNLI-m": ("mnli", "dev_matched"),
    "MNLI-mm": ("mnli", "dev_mismatched"),
    "QQP": ("qqp", "dev"),
    "QNLI": ("qnli", "dev"),
    "SST-2": ("sst2", "dev"),
    "CoLA": ("cola", "dev"),
    "STS-B": ("stsb", "dev"),
    "MRPC": ("mrpc", "dev"),
    "RTE": ("rte", "dev"),
}
"""The published columns, with the task and split of each; the average is theirs."""
PUBLISHED = {
    "published softmax": (81.8, 82.5, 86.5, 89.9, 90.5, 80.5, 78.3, 90.0, 67.9),
    "published cosine": (80.6, 81.1, 86.2, 89.3, 90.1, 77.8, 76.5, 88.6, 66.4),
}
"""Source: arXiv 2409.18747; validation rows, the published code's way of counting."""
_OTHER_METRICS = ("QQP", "CoLA", "STS-B", "MRPC")
_EXTRA = {"WNLI": ("wnli", "dev")}
_ABSENT = "–"
_NOTES = {
    "official": "Official metrics, dev rows, x100: QQP, MRPC: accuracy / F1 over all rows; CoLA: Matthews correlation; "
    "STS-B: Pearson / Spearman; others: accuracy. No published figure exists where the published rows show –.",
    "as_published": "As the published code counts, x100: CoLA: accuracy; QQP, MRPC: mean of the F1 of every 32 rows; "
    "STS-B: absolute Pearson; others: accuracy. Not comparable with other work.",
}


@dataclass(frozen=True, kw_only=True)
class GlueRun:
    """What `cottention finetune` left in one output directory."""

    name: str
    """The directory's."""
    attention_type: str
    """Of the models; "mixed" when they differ."""
    num_seeds: int
    """The least of any task."""
    scores: dict[str, dict[str, dict[str, dict[str, list[float]]]]]
    """kind -> task -> split -> metric -> one value per seed, each of its best epoch."""
    remarks: tuple[str, ...] = ()
    """What a reader of the figures has to know."""


def read_glue_run(folder: str | Path) -> GlueRun:
    """Read the tasks of an output directory (or of one task's directory).

    Raises:
        DataError: there is none, or one is damaged.
    """
    folder = Path(folder)
    files = sorted([*folder.glob("metrics.json"), *folder.glob("*/metrics.json")])
    found = [_read(path) for path in files]
    if not found:
        raise DataError(f"{folder} holds no finished run of `cottention finetune` (TASK/metrics.json)")
    kinds = ("official", "as_published")
    scores: dict[str, Any] = {kind: {} for kind in kinds}
    for metrics in found:
        epochs = [seed["epochs"][seed["best_epoch"] - 1] for seed in metrics["seeds"]]
        for kind in kinds:
            scores[kind][metrics["task"]] = {
                split: {name: [epoch["splits"][split][kind][name] for epoch in epochs] for name in values[kind]}
                for split, values in epochs[0]["splits"].items()
            }
    attention = {metrics["attention_type"] for metrics in found}
    return GlueRun(
        name=folder.resolve().name,
        attention_type=attention.pop() if len(attention) == 1 else "mixed",
        num_seeds=min(len(metrics["seeds"]) for metrics in found),
        scores=scores,
        remarks=tuple(remark for metrics in found for remark in _remarks(metrics)),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if metrics["task"] not in GLUE_TASKS or not metrics["seeds"]:
            raise ValueError
        is_intact = is_intact_record(metrics)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is not what `cottention finetune` writes") from error
    if not is_intact:
        raise DataError(f"{path} was changed after it was written; its scores may be wrong")
    return metrics


def _remarks(metrics: Mapping[str, Any]) -> list[str]:
    title = GLUE_TASKS[metrics["task"]].title
    remarks = [f"{title}: {split} absent" for split in metrics["absent"]]
    if metrics["train_limit"] is not None:
        remarks.append(f"{title}: {metrics['num_rows']['train']} training rows")
    rows = [number for split, number in metrics["num_rows"].items() if split.startswith("dev")]
    if metrics["dev_limit"] is not None and max(rows, default=math.inf) >= metrics["dev_limit"]:
        remarks.append(f"{title}: the first {metrics['dev_limit']} dev rows")
    if metrics["from_scratch"]:
        remarks.append(f"{title}: no pretraining")
    return remarks


@dataclass(frozen=True, kw_only=True)
class GlueTables:
    """Both tables."""

    runs: tuple[GlueRun, ...]
    """Our rows, from top to bottom."""

    def markdown(self) -> str:
        """Two tables and their notes, columns aligned."""
        parts = []
        for kind, title in (("official", "Official metrics"), ("as_published", "As the published code counts")):
            parts += [f"**{title}**", _aligned(self._cells(kind)), _NOTES[kind]]
        parts += [f"{run.name}: {'; '.join(run.remarks)}." for run in self.runs if run.remarks]
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; means over seeds, in fractions of 1."""
        return {
            "published": {name: dict(zip(COLUMNS, values, strict=True)) for name, values in PUBLISHED.items()},
            "runs": [
                {
                    "name": run.name,
                    "attention_type": run.attention_type,
                    "num_seeds": run.num_seeds,
                    "remarks": list(run.remarks),
                    **{kind: {c: _means(run, kind, *where) for c, where in _present(run)} for kind in run.scores},
                    **{f"average_{kind}": average(run, kind) for kind in run.scores},
                }
                for run in self.runs
            ],
        }

    def _cells(self, kind: str) -> list[list[str]]:
        has_extra = any(where[0] in run.scores[kind] for run in self.runs for where in _EXTRA.values())
        extra = list(_EXTRA) if has_extra else []
        rows = [["", *COLUMNS, "average", *extra]]
        for name, values in PUBLISHED.items():
            hidden = _OTHER_METRICS if kind == "official" else ()
            cells = [
                _ABSENT if column in hidden else f"{value:.1f}" for column, value in zip(COLUMNS, values, strict=True)
            ]
            rows.append([name, *cells, _ABSENT if hidden else f"{mean(values):.1f}", *[_ABSENT for _ in extra]])
        for run in self.runs:
            cells = [_cell(run, kind, *where) for where in COLUMNS.values()]
            whole = average(run, kind)
            others = [_cell(run, kind, *_EXTRA[column]) for column in extra]
            seeds = "1 seed" if run.num_seeds == 1 else f"{run.num_seeds} seeds"
            rows.append(
                [
                    f"{run.name} ({run.attention_type}, {seeds})",
                    *cells,
                    _ABSENT if whole is None else f"{100 * whole:.1f}",
                    *others,
                ]
            )
        return rows


def glue_tables(runs: Sequence[GlueRun]) -> GlueTables:
    """Put runs under the published rows."""
    return GlueTables(runs=tuple(runs))


def average(run: GlueRun, kind: str) -> float | None:
    """Mean of the nine columns, each the mean of its metrics and seeds; None while one is missing."""
    values = [_means(run, kind, *where) for where in COLUMNS.values()]
    return mean(mean(value.values()) for value in values) if all(values) else None


def _present(run: GlueRun) -> list[tuple[str, tuple[str, str]]]:
    every = {**COLUMNS, **_EXTRA}
    return [(column, where) for column, where in every.items() if _means(run, "official", *where)]


def _means(run: GlueRun, kind: str, task: str, split: str) -> dict[str, float]:
    return {name: mean(values) for name, values in run.scores[kind].get(task, {}).get(split, {}).items()}


def _cell(run: GlueRun, kind: str, task: str, split: str) -> str:
    """68.4, or 84.8 / 88.9; behind several seeds the standard deviation between them."""
    found = run.scores[kind].get(task, {}).get(split, {})
    if not found:
        return _ABSENT
    shown = []
    for values in found.values():
        spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
        shown.append(f"{100 * mean(values):.1f}{spread}")
    return " / ".join(shown)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *body = (
        "| "
        + " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    )
    rule = (
        "|" + "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|"
    )
    return "\n".join([header, rule, *body])
