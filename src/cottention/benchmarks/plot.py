"""Log-log pictures of a report: time and memory over the length or the position, a line for each candidate.

Implementations of cosine attention are solid, peers dashed; thin lines show what growth with T and with T^2 looks like.

    paths = write_figures(report, Path("runs/bench"))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from cottention.benchmarks.curves import (
    COLOURS,
    MARKERS,
    Curve,
    add_legend,
    draw_apart,
    label_axes,
    new_figure,
    one_line_each,
)
from cottention.benchmarks.decode import DecodeReport
from cottention.benchmarks.environment import machine_line
from cottention.benchmarks.results import AttentionReport, Point
from cottention.benchmarks.table import machine, title
from cottention.benchmarks.units import duration, size
from cottention.files import written_file

_STEPS = {
    "native": "cosine, native",
    "in-place": "cosine, native in place",
    "torch": "cosine, plain torch",
    "sdpa": "softmax, keys and values",
}
_GUIDE = {"color": "0.6", "linewidth": 0.8, "zorder": 0}


def write_figures(report: AttentionReport, directory: Path) -> list[Path]:
    """Draw every group that has figures to show; returns the files."""
    paths = []
    names = list(dict.fromkeys(point.name for group in report.groups for point in group))
    styles = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    for group in report.groups:
        if not any(point.timing or point.memory for point in group):
            continue
        figure = _draw(report, group, styles)
        paths.append(directory / f"attention-{_file_stem(group[0])}.png")
        with written_file(paths[-1]) as file:
            figure.savefig(file, format="png", dpi=150)
    return paths


def _file_stem(point: Point) -> str:
    shown = point.workload
    passes = shown.passes.replace("+", "-")
    return f"{shown.direction}-{passes}-{shown.dtype}-b{shown.batch_size}-h{shown.num_heads}-k{shown.head_dim}"


def _draw(report: AttentionReport, group: list[Point], styles: dict[str, tuple[str, str]]) -> Figure:
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figures: dict[str, Callable[[Point], float | None]] = {
        "time of a call, ms": lambda p: p.timing and p.timing.median_s * 1e3,
        "peak memory, MiB": lambda p: p.memory and p.memory.peak_bytes / 2**20,
    }
    shown = {label: figure_of for label, figure_of in figures.items() if any(map(figure_of, group))}
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (label, figure_of) in zip(panels, shown.items(), strict=True):
        _panel(axes, group, styles, figure_of, label)
    figure.suptitle(f"Attention, {title(group[0].workload)}\n", fontsize=12)
    figure.text(0.5, 0.925, machine(report), ha="center", fontsize=8.5, color="0.35")
    handles, labels = _legend_entries(*panels)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def write_decode_figure(report: DecodeReport, directory: Path) -> Path:
    """Draw decode.png, time and state over the position; returns the file."""
    where = machine_line(report.environment, asdict(report.settings))
    path = directory / "decode.png"
    with written_file(path) as file:
        draw_decode(report.to_dict(), where).savefig(file, format="png", dpi=150)
    return path


def draw_decode(data: dict[str, Any], machine: str) -> Figure:
    """Time of a step and what it carries, from the JSON of a report; states of one size are one line."""
    settings, results = data["settings"], data["results"]
    heading = (
        f"One token of a decoder, {settings['dtype']}: heads {settings['num_heads']}, K = V = {settings['head_dim']}"
    )
    figure = new_figure(heading, machine, height=4.4)
    lines = dict.fromkeys((result["name"], result["batch_size"]) for result in results)
    batches = len({B for _, B in lines})
    looks = [
        (
            f"{_STEPS[name]}, B = {B}" if batches > 1 else _STEPS[name],
            COLOURS[i % len(COLOURS)],
            MARKERS[i % len(MARKERS)],
        )
        for i, (name, B) in enumerate(lines)
    ]
    time_axes, state_axes = figure.subplots(1, 2)
    for axes, key, unit, what in (
        (time_axes, "median_s", duration, "time of a step"),
        (state_axes, "state_bytes", size, "memory carried to the next token"),
    ):
        curves = [
            Curve(
                *look, {each["position"]: each[key] for each in results if (each["name"], each["batch_size"]) == line}
            )
            for line, look in zip(lines, looks, strict=True)
        ]
        draw_apart(axes, one_line_each(curves) if key == "state_bytes" else curves)
        axes.set_title(what, fontsize=10)
        axes.set_xlabel("position, tokens")
        label_axes(axes, [each["position"] for each in results], unit)
    add_legend(figure, looks)
    return figure


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(_one_two_five))
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _one_two_five(value: float, _: int) -> str:
    """Between the powers of ten 2 and 5 are named, which is enough to read a height and never too close."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _panel(
    axes: Axes,
    group: list[Point],
    styles: dict[str, tuple[str, str]],
    figure_of: Callable[[Point], float | None],
    label: str,
) -> None:
    _logarithmic(axes)
    lengths = sorted({point.workload.length for point in group})
    for name in dict.fromkeys(point.name for point in group):
        points = [point for point in group if point.name == name]
        known = [(point.workload.length, value) for point in points if (value := figure_of(point))]
        if known:
            colour, marker = styles[name]
            axes.plot(
                *zip(*known, strict=True),
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.8,
                linestyle="--" if points[0].is_peer else "-",
                label=name,
            )
    _guides(axes, lengths)
    axes.set_xlabel("T, tokens")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda T, _: f"{T / 1024:g}k" if T >= 1024 else f"{T:g}"))


def _guides(axes: Axes, lengths: list[int]) -> None:
    """Growth with T and with T^2 from the lower left corner of what is drawn."""
    if len(lengths) < 2 or not axes.lines:
        return
    bottom, top = axes.get_ylim()
    left, right = axes.get_xlim()
    for exponent, name in ((1, "T"), (2, "T²")):
        end = min(lengths[-1], lengths[0] * (top / bottom) ** (1 / exponent))
        height = bottom * (end / lengths[0]) ** exponent
        axes.plot([lengths[0], end], [bottom, height], linestyle=":", **_GUIDE)
        axes.annotate(
            name, (end, height), xytext=(2, -2), textcoords="offset points", fontsize=8, color="0.45", va="top"
        )
    axes.set_ylim(bottom, top)
    axes.set_xlim(left, right)


def _legend_entries(*panels: Axes) -> tuple[list, list[str]]:
    """Each candidate once, also one that only the second panel shows."""
    entries = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    return list(entries.values()), list(entries)
