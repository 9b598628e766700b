"""The report as text: the machine, what was checked, then a table for each group of workloads.

print(as_text(report))
"""

from __future__ import annotations

import itertools
from dataclasses import asdict

from cottention.benchmarks.environment import machine_line
from cottention.benchmarks.results import BASE_DTYPE, BASELINE, AttentionReport, Point, memory_growth, speed_ratio
from cottention.benchmarks.settings import Workload

_COLUMNS: tuple[str, ...] = (
    "T",
    "time",
    "spread",
    f"vs {BASELINE}",
    f"vs {BASE_DTYPE}",
    "GFLOP/s",
    "of mm",
    "of FMA",
    "peak",
    "extra",
    "a token",
    "growth",
)

_LEGEND = f"""\
time       median of interleaved samples, freed memory kept for reuse as in training; spread is half the width of
           their middle half
vs {BASELINE}    time of scaled_dot_product_attention divided by this one: more is faster
vs {BASE_DTYPE} time of the same in {BASE_DTYPE}, measured in the same rounds, divided by this one
GFLOP/s    useful operations of linear attention a second, counted alike for all
of mm      their share of torch.mm's in this dtype, timed in the same rounds; of FMA: of the FMA peak's, unless that
           was read below torch.mm's, whose operations are such too
peak       most memory beyond the inputs, native code included; extra: beyond the results too; a token: peak
growth     peak divided by that of the length before: linear is at most the factor between the lengths
A column of which nothing is known is left out."""


def as_text(report: AttentionReport) -> str:
    """Everything on the report that a person wants to see first."""
    parts = ["\n".join(_head(report)), *(_table(report, group) for group in report.groups), _LEGEND]
    if report.interrupted:
        parts.append("The run was interrupted: what is missing was not reached.")
    return "\n\n".join(parts)


def title(workload: Workload) -> str:
    """What the workloads of a group share, as a heading."""
    return (
        f"{workload.direction} {workload.passes}, {workload.dtype}, "
        f"B = {workload.batch_size}, H = {workload.num_heads}, K = V = {workload.head_dim}"
    )


def machine(report: AttentionReport) -> str:
    """What it was measured on, in one line."""
    about = report.environment
    packages = about["packages"]
    assert isinstance(packages, dict)
    where = about.get("gpu") or machine_line(about, asdict(report.settings))
    return f"{where}, torch {packages['torch']}"


def _head(report: AttentionReport) -> list[str]:
    lines = [f"{machine(report)}, load {report.environment['load_at_start']} before the start"]
    for name, figure in report.roofline.items():
        matmul = report.roofline.get(name.replace("fma_", "mm_"), figure)  # itself, for all others
        refused = ", below torch.mm: no peak" if figure.value < matmul.value else ""
        lines.append(f"{figure.description}: {figure.value:.4g} {figure.unit}{refused}")
    if report.checks:
        names = ", ".join(dict.fromkeys(check.name for check in report.checks))
        lines.append(f"values{' and gradients' if _has_backward(report) else ''} checked against float64: {names}")
    lines += [f"left out: {name}, {reason}" for name, reason in report.unavailable.items()]
    return lines + _refused_peaks(report)


def _refused_peaks(report: AttentionReport) -> list[str]:
    """A line where a peak was read below torch.mm, with the furthest."""
    wrong = report.wrong_peaks()
    if not wrong:
        return []
    worst = min(wrong, key=lambda point: (point.limit("fma") or 0) / (point.limit("mm") or 1))
    where = f"in the rounds of {len(wrong)} workloads, where it was read below torch.mm"
    furthest = f"down to {worst.limit('fma'):.4g} beside {worst.limit('mm'):.4g} GFLOP/s"
    return [f"left out: shares of the FMA peak {where} ({furthest})"]


def _has_backward(report: AttentionReport) -> bool:
    return any(check.workload.backward for check in report.checks)


def _table(report: AttentionReport, group: list[Point]) -> str:
    rows: list[tuple[str, ...]] = [("", *_COLUMNS)]
    notes = [""]
    last_name = None
    for point in group:
        rows.append((point.name if point.name != last_name else "", *_cells(report, group, point)))
        notes.append(_note(point))
        last_name = point.name
    known = [not all(cell == "-" for cell in column[1:]) for column in zip(*rows, strict=True)]
    rows = [tuple(itertools.compress(row, known)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        + note
        for row, note in zip(rows, notes, strict=True)
    ]
    return "\n".join([title(group[0].workload), *(line.rstrip() for line in lines)])


def _cells(report: AttentionReport, group: list[Point], point: Point) -> tuple[str, ...]:
    timing, memory = point.timing, point.memory
    spread = timing.spread if timing else None
    ratio, growth = speed_ratio(point, group), memory_growth(point, group)
    of_base_dtype = report.dtype_ratio(point)
    of_matmul, of_peak = point.share_of("mm"), point.share_of("fma")
    gflops, per_token = point.useful_gflops, point.bytes_per_token
    return (
        str(point.workload.length),
        _duration(timing.median_s) if timing else "-",
        "-" if spread is None else f"{spread:.0%}",
        "-" if ratio is None else f"{ratio:.3g}x",
        "-" if of_base_dtype is None else f"{of_base_dtype:.3g}x",
        "-" if gflops is None else f"{gflops:.3g}",
        "-" if of_matmul is None else f"{of_matmul:.1%}",
        "-" if of_peak is None else f"{of_peak:.1%}",
        _size(memory.peak_bytes) if memory else "-",
        _size(memory.extra_bytes) if memory else "-",
        "-" if per_token is None else f"{per_token / 1024:.1f} KiB",
        "-" if growth is None else f"x{growth:.2f}",
    )


def _note(point: Point) -> str:
    if point.time_skipped and point.time_skipped == point.memory_skipped:
        return f"  skipped: {point.time_skipped}"
    halves = (("time", point.time_skipped), ("memory", point.memory_skipped))
    return "".join(f"  {what} skipped: {reason}" for what, reason in halves if reason)


def _duration(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= 0.9995 * factor:  # what three digits round to 1000 is one of the next unit
            return f"{seconds / factor:.3g} {unit}" if seconds < 999.5 * factor else f"{seconds / factor:.0f} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
