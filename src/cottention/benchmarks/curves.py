"""Lines of a picture that hide none of each other, on logarithmic axes with units that people read.

Lines that lie on each other share their place in dashes of different colours, with markers inside markers.

    draw_apart(axes, [Curve("cosine", "#0072B2", "o", {128: 1e-3, 512: 4e-3}), ...])
    label_axes(axes, [128, 512], duration)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's, told apart by everyone."""

MARKERS = "osD^vPX*"

# Nearer than this, two lines of a panel are one to the eye.
_SAME_LINE = 0.08
_DASH = 5.0


class Curve(NamedTuple):
    """A line of a panel."""

    label: str
    colour: str
    marker: str
    points: dict[float, float]
    """x -> y."""


def one_line_each(curves: Sequence[Curve]) -> list[Curve]:
    """Curves with the very same points once, under the first one's look."""
    distinct: dict[tuple[tuple[float, float], ...], Curve] = {}
    for curve in curves:
        distinct.setdefault(tuple(curve.points.items()), curve)
    return list(distinct.values())


def draw_apart(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw lines so that each is seen, also where it lies on another."""
    for group in _coinciding([curve for curve in curves if curve.points]):
        for i, curve in enumerate(group):
            gap = _DASH * (len(group) - 1)
            axes.plot(
                *zip(*sorted(curve.points.items()), strict=True),
                label=curve.label,
                color=curve.colour,
                marker=curve.marker,
                markersize=5 + 4 * (len(group) - 1 - i),
                markerfacecolor=curve.colour if i == len(group) - 1 else "white",
                linewidth=1.8,
                linestyle=(_DASH * i, (_DASH, gap)) if gap else "-",
            )


def _coinciding(curves: list[Curve]) -> list[list[Curve]]:
    """Groups of curves that lie on each other somewhere."""
    groups: list[list[Curve]] = []
    for curve in curves:
        group = next((each for each in groups if any(_touch(other, curve) for other in each)), None)
        if group is None:
            groups.append([curve])
        else:
            group.append(curve)
    return groups


def _touch(a: Curve, b: Curve) -> bool:
    """Whether one line hides the other from one place to the next, or at the only one that they share."""
    near = [
        abs(a.points[x] - b.points[x]) <= _SAME_LINE * max(a.points[x], b.points[x])
        for x in sorted(a.points.keys() & b.points.keys())
    ]
    return near == [True] or any(map(all, pairwise(near)))


def new_figure(title: str, subtitle: str, height: float) -> Figure:
    """An empty figure, 10 inches wide, with what it shows and on what that was measured."""
    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n", fontsize=12)
    figure.text(0.5, 1 - 0.36 / height, subtitle, ha="center", va="top", fontsize=8.5, color="0.35")
    return figure


def add_legend(figure: Figure, entries: Sequence[tuple[str, str, str]]) -> None:
    """One row below everything, of (label, colour, marker)."""
    handles = [Line2D([], [], label=label, color=colour, marker=marker) for label, colour, marker in entries]
    for handle in handles:
        if handle.get_color() == "white":  # a marker alone
            handle.set(markersize=12, markeredgecolor="black")
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)


def label_axes(axes: Axes, places: Sequence[float], unit: Callable[..., str]) -> None:
    """Logarithmic axes: every place of a reading is named, and heights in a unit of `units.py`."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(places))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
    bottom, top = axes.get_ylim()
    if top / bottom < 30:  # one power of ten alone would tell nothing
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if top / bottom > 6 else (1, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: unit(y, digits=1)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
