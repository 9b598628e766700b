"""The pictures of `cottention bench figures`, from its JSON: time beside memory, causal above bidirectional.

Stars are published readings.

    paths = write_pictures(read_figures(Path("figures.json")), Path("pictures"))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cottention.benchmarks.curves import COLOURS, MARKERS, Curve, add_legend, draw_apart, label_axes, new_figure
from cottention.benchmarks.figures import DIRECTIONS, SIZES, TITLES, fixed_sizes, machine_of, published, readings
from cottention.benchmarks.plot import draw_decode
from cottention.benchmarks.units import duration, size
from cottention.files import written_file

_LOOKS = {name: (title, COLOURS[i], MARKERS[i]) for i, (name, title) in enumerate(TITLES.items())}
_X_LABELS = {"length": "tokens T", "width": "width of the layer", "heads": "heads"}


def write_pictures(data: dict[str, Any], directory: Path) -> list[Path]:
    """Draw a picture for each sweep, and decode; returns the files, PNG and SVG of each."""
    figures = {picture: _sweep(data, picture) for picture in data["layers"]["settings"]["sweeps"]}
    if data["decode"] is not None:
        figures["decode"] = draw_decode(data["decode"], machine_of(data))
    paths = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            paths.append(directory / f"{name}.{kind}")
            # The same data give the same bytes.
            with matplotlib.rc_context({"svg.hashsalt": "cottention"}), written_file(paths[-1]) as file:
                figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {})
    return paths


def _sweep(data: dict[str, Any], picture: str) -> Figure:
    title = f"One attention layer forward, one text, float32: {fixed_sizes(data, picture)}"
    figure = new_figure(title, machine_of(data), height=7.4)
    panels = figure.subplots(2, 2, sharex=True)
    has_stars = False
    for (time_axes, memory_axes), (direction, title) in zip(panels, DIRECTIONS.items(), strict=True):
        has_stars |= bool(published(data, picture, direction))
        time_axes.set_title(f"{title}: time", fontsize=10)
        memory_axes.set_title(f"{title}: memory beyond tokens and weights", fontsize=10)
        _panel(time_axes, data, picture, direction, ("time", "median_s"), duration)
        _panel(memory_axes, data, picture, direction, ("memory", "peak_bytes"), size)
    for axes in panels[-1]:
        axes.set_xlabel(_X_LABELS[picture])
    add_legend(figure, [*_LOOKS.values(), *([("published, one A100", "white", "*")] if has_stars else [])])
    return figure


def _panel(
    axes: Axes, data: dict[str, Any], picture: str, direction: str, keys: tuple[str, str], unit: Callable[..., str]
) -> None:
    half, key = keys
    grows = SIZES[picture]
    found = readings(data, picture, direction)
    curves = [
        Curve(*_LOOKS[name], {result[grows]: result[half][key] for result in results if result[half]})
        for name, results in found.items()
    ]
    draw_apart(axes, curves)
    stars = published(data, picture, direction)
    for each in stars:
        colour = _LOOKS[each["name"]][1]
        axes.plot(each[grows], each[key], "*", color=colour, markersize=13, markeredgecolor="black")
    label_axes(axes, [result[grows] for results in (*found.values(), stars) for result in results], unit)
