"""Pictures of the finished cells: loss against tokens and against time, recall against pairs.

write_curves(Lines(Path("docs/quality")), Path("docs/quality"))
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cottention.benchmarks.quality.cells import ASKED, EXPERIMENTS, Cell
from cottention.benchmarks.quality.lines import Lines
from cottention.files import written_file

Line = dict[str, Any]


def write_curves(lines: Lines, directory: Path) -> list[Path]:
    """A picture for each experiment that has finished cells; returns the files."""
    paths = []
    for name, plan in EXPERIMENTS.items():
        found = {variant: _of(name, variant, lines) for variant in plan.variants}
        found = {variant: each for variant, each in found.items() if each}
        if not found:
            continue
        directory.mkdir(parents=True, exist_ok=True)
        paths.append(directory / f"{name}.png")
        with written_file(paths[-1]) as file:
            _draw(name, found).savefig(file, format="png", dpi=120)
    return paths


def _of(experiment: str, variant: str, lines: Lines) -> list[Line]:
    cells = (Cell(experiment=experiment, variant=variant, seed=seed) for seed in EXPERIMENTS[experiment].seeds)
    return [line for cell in cells if (line := lines.of(cell)) is not None]


def _draw(name: str, found: dict[str, list[Line]]) -> Figure:
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    plan = EXPERIMENTS[name]
    per_step = plan.batch_size * plan.length
    if plan.task == "text":
        _panel(left, found, "tokens", "training loss, nats", lambda line: _curve(line, 0, per_step))
        _panel(right, found, "seconds of the processor", "", lambda line: _curve(line, 2, 1))
        for axes in (left, right):
            axes.set_xscale("log")
    else:
        _panel(left, found, ASKED[plan.task], "accuracy", _accuracies)
        left.set_ylim(-0.02, 1.02)
        _panel(right, found, "tokens", "training loss, nats", lambda line: _curve(line, 0, per_step))
    figure.suptitle(f"{name}: means over seeds")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _panel(
    axes: Axes,
    found: dict[str, list[Line]],
    x_label: str,
    y_label: str,
    points_of: Callable[[Line], list[tuple[float, float]]],
) -> None:
    for i, (variant, lines) in enumerate(found.items()):
        points = [_mean(each) for each in zip(*map(points_of, lines), strict=True)]
        style = "--" if variant.startswith("softmax") else "-"
        axes.plot(*zip(*points, strict=True), style, color=f"C{i % 10}", marker=".", linewidth=1.2, label=variant)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="0.9")


def _curve(line: Line, column: int, scale: float) -> list[tuple[float, float]]:
    return [(point[column] * scale, point[1]) for point in line["curve"]]


def _accuracies(line: Line) -> list[tuple[float, float]]:
    return [(float(name), value) for name, value in line["scores"]["accuracy"].items()]


def _mean(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    x, y = zip(*points, strict=True)
    return statistics.mean(x), statistics.mean(y)
