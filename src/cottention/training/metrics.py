"""metrics.jsonl, one JSON object per line, and the picture of the loss drawn from it.

Training lines hold step, epoch, loss, learning_rate, grad_norm, tokens, tokens_per_s, elapsed_s; held-out lines step,
tokens, val_loss, val_ppl, val_nats_per_byte (and val_accuracy for BERT). Losses are in nats per token.

    log = MetricsLog(run_dir / "metrics.jsonl", resume_step=200)
    log.write({"step": 210, "loss": 3.1})
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cottention.files import write_text, written_file
from cottention.logging import get_logger

logger = get_logger(__name__)


class MetricsLog:
    """Appends lines to metrics.jsonl. A resumed run first drops the lines that it is going to write again."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Open the log.

        Args:
            path: the file; it is made when missing.
            resume_step: updates that the resumed checkpoint has seen, 0 for a fresh run. Later lines are dropped.
        """
        self.path = path
        kept = [line for line in read_metrics(path, warn=True) if 0 < line["step"] <= resume_step]
        write_text(path, "".join(_line(entry) for entry in kept))

    def write(self, entry: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system, so that a killed process loses none."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path, *, warn: bool = False) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl.

    Args:
        path: the file; when it is missing, there are no lines.
        warn: say how many lines are damaged, but for a last one that a crash cut short. They are left out in any case.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    found = [_entry(line) for line in lines]
    num_damaged = sum(entry is None for entry in found[:-1])
    if num_damaged and warn:
        logger.warning("%s: %d of %d lines are damaged and left out", path, num_damaged, len(lines))
    return [entry for entry in found if entry is not None]


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line as it was written: a step, and nothing but numbers."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return None
    return entry if all(isinstance(value, (int, float)) for value in entry.values()) else None


def draw_loss_curve(metrics: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw training and held-out loss over the tokens read, as PNG.

    Args:
        metrics: lines of metrics.jsonl.
        path: where the picture goes.
        title: above the picture.
    """
    # Not pyplot: it keeps global state and wants a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    placed = [entry for entry in metrics if "tokens" in entry]
    train = [(entry["tokens"], entry["loss"]) for entry in placed if "loss" in entry]
    held_out = [(entry["tokens"], entry["val_loss"]) for entry in placed if "val_loss" in entry]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db7d5", linewidth=1, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#c0392b", marker="o", markersize=3, label="held out")
        axes.annotate(
            f"{held_out[-1][1]:.3f}",
            held_out[-1],
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color="#c0392b",
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.xaxis.set_major_formatter(lambda value, _position: short_number(value))
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    with written_file(path) as file:
        figure.savefig(file, format="png")


def short_number(value: float) -> str:
    """1234567 as 1.23M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
