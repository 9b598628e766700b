"""Runs beside each other: a table of where they ended and a picture of how they got there.

runs = [read_run("runs/cosine"), read_run("runs/softmax")]
print(as_table(runs))
draw_runs(runs, Path("compare.png"))
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cottention.errors import DataError
from cottention.files import written_file
from cottention.training.metrics import read_metrics, short_number

Curve = tuple[tuple[float, ...], tuple[float, ...]]

# Apart for people who do not see red or green, in this order (Okabe and Ito, 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory says of its training."""

    name: str
    """The directory as it was given."""
    lines: tuple[dict[str, Any], ...]
    """Those of metrics.jsonl, in order."""
    num_parameters: int | None
    """Of its model; None where the run has written none yet."""

    @property
    def last(self) -> dict[str, Any]:
        """The newest held-out line; of a run that never evaluated, its newest."""
        held_out = [line for line in self.lines if "val_loss" in line]
        return (held_out or list(self.lines))[-1]

    @property
    def seconds(self) -> float | None:
        """How long it has trained; None where it did not say."""
        times = [line["elapsed_s"] for line in self.lines if "elapsed_s" in line]
        return times[-1] if times else None

    @property
    def tokens_per_s(self) -> float | None:
        """Median of its lines."""
        rates = sorted(line["tokens_per_s"] for line in self.lines if "tokens_per_s" in line)
        return rates[len(rates) // 2] if rates else None

    def curve(self, over: str) -> Curve:
        """Held-out loss (training loss where there is none) over "tokens" or "seconds"; empty where unknown."""
        name = "val_loss" if any("val_loss" in line for line in self.lines) else "loss"
        points = [(self._place(line, over), line[name]) for line in self.lines if name in line]
        known = [(x, y) for x, y in points if x is not None]
        return tuple(x for x, _ in known), tuple(y for _, y in known)

    def _place(self, line: dict[str, Any], over: str) -> float | None:
        if over == "tokens":
            return line.get("tokens")
        if "elapsed_s" in line:
            return line["elapsed_s"]
        timed = [each for each in self.lines if "elapsed_s" in each]  # held-out lines have no time of their own
        before = bisect_right([each["step"] for each in timed], line["step"])
        return timed[before - 1]["elapsed_s"] if before else None


def read_run(directory: str | Path) -> Run:
    """Read a run directory, finished or not.

    Raises:
        DataError: it is none, or has written no line yet.
    """
    path = Path(directory)
    if not path.is_dir():
        raise DataError(f"no directory {directory}")
    if not (path / "metrics.jsonl").is_file():
        raise DataError(f"{directory} is no run: it has no metrics.jsonl")
    lines = read_metrics(path / "metrics.jsonl", warn=True)
    if not lines:
        raise DataError(f"{directory}: metrics.jsonl has no line yet")
    return Run(name=str(directory), lines=tuple(lines), num_parameters=_count_parameters(path / "model"))


def _count_parameters(model: Path) -> int | None:
    """Numbers in the weights of a model directory; tied ones are stored once."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in sorted(model.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return None
    return total or None


def as_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a run: plain values, None where the run does not say."""
    first = runs[0].last.get("val_loss")
    rows = []
    for run in runs:
        last, loss = run.last, run.last.get("val_loss")
        rows.append(
            {
                "run": run.name,
                "parameters": run.num_parameters,
                "steps": run.lines[-1]["step"],
                "tokens": next((line["tokens"] for line in reversed(run.lines) if "tokens" in line), None),
                "seconds": run.seconds,
                "tokens_per_s": run.tokens_per_s,
                "val_loss": loss,
                "val_ppl": last.get("val_ppl"),
                "val_nats_per_byte": last.get("val_nats_per_byte"),
                "against_first": None if loss is None or first is None else loss - first,
            }
        )
    return rows


_COLUMNS = (
    ("run", "run", str),
    ("parameters", "parameters", short_number),
    ("steps", "steps", "{:,}".format),
    ("tokens", "tokens", short_number),
    ("seconds", "seconds", "{:,.0f}".format),
    ("tokens_per_s", "tokens/s", "{:,.0f}".format),
    ("val_loss", "held-out loss", "{:.3f}".format),
    ("val_ppl", "perplexity", "{:,.1f}".format),
    ("val_nats_per_byte", "nats/byte", "{:.4f}".format),
    ("against_first", "against the first", "{:+.3f}".format),
)


def as_table(runs: Sequence[Run]) -> str:
    """The rows as text, columns that no run has left out."""
    rows = as_rows(runs)
    shown = [column for column in _COLUMNS if any(row[column[0]] is not None for row in rows)]
    cells = [[title for _, title, _ in shown]]
    cells += [["-" if row[name] is None else form(row[name]) for name, _, form in shown] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(shown))]
    lines = [
        [row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))] for row in cells
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def draw_runs(runs: Sequence[Run], path: Path) -> None:
    """Draw held-out loss over tokens and over seconds, as PNG or SVG by the file's name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, over in zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds"), strict=True):
        for number, run in enumerate(runs):
            x, y = run.curve(over)
            axes.plot(x, y, color=_COLOURS[number % len(_COLOURS)], marker="o", markersize=3, label=run.name)
        axes.set_xlabel(f"{over} of training")
        axes.xaxis.set_major_formatter(lambda value, _position: short_number(value))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out loss (nats per token)")
    figure.axes[0].legend()
    with written_file(path) as file:
        figure.savefig(file, format=path.suffix[1:])
