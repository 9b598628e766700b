"""What a run found, and its JSON form: every sample is kept, and what it was measured on.

report.to_dict()["results"][0]["time"]["median_s"]
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from cottention.benchmarks.check import Check
from cottention.benchmarks.measure import Timing
from cottention.benchmarks.memory import MemoryReading
from cottention.benchmarks.roofline import RooflineFigure
from cottention.benchmarks.settings import AttentionSettings, Workload

FORMAT = 2
"""Raised when a reader of the JSON would have to change."""

BASELINE = "sdpa"
"""What everything is compared with, where it was measured."""

BASE_DTYPE = "float32"
"""The dtype that the others are compared with."""


@dataclass(kw_only=True)
class Point:
    """One candidate on one workload; each half is there, or the reason why it is not."""

    name: str
    is_peer: bool
    workload: Workload
    timing: Timing | None = None
    time_skipped: str | None = None
    memory: MemoryReading | None = None
    memory_skipped: str | None = None
    limits: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What the machine could do in the rounds in which this was timed: "mm" and "fma" in its dtype, GFLOP/s."""

    @property
    def useful_gflops(self) -> float | None:
        """Useful operations a second, in 1e9: the same count for every candidate."""
        return None if self.timing is None else self.workload.useful_flops / self.timing.median_s / 1e9

    def limit(self, name: str) -> float | None:
        """The median of a limit's readings, GFLOP/s; None where there are none."""
        readings = self.limits.get(name)
        return statistics.median(readings) if readings else None

    @property
    def peak_is_wrong(self) -> bool:
        """Whether the arithmetic units were read below torch.mm, which runs on them: a peak that is none."""
        peak, matmul = self.limit("fma"), self.limit("mm")
        return peak is not None and matmul is not None and peak < matmul

    def share_of(self, limit: str) -> float | None:
        """Useful operations a second as a share of a limit, "mm" or "fma"; None where one of both is not known."""
        most = self.limit(limit)
        if most is None or self.useful_gflops is None or (limit == "fma" and self.peak_is_wrong):
            return None
        return self.useful_gflops / most

    @property
    def bytes_per_token(self) -> float | None:
        """Peak memory for each token of the batch."""
        return None if self.memory is None else self.memory.peak_bytes / self.workload.num_tokens


@dataclass(kw_only=True)
class AttentionReport:
    """Everything that one run found."""

    settings: AttentionSettings
    environment: dict[str, object]
    unavailable: dict[str, str]
    checks: list[Check]
    roofline: dict[str, RooflineFigure] = field(default_factory=dict)
    groups: list[list[Point]] = field(default_factory=list)
    """Points that belong in one table and one figure, by candidate and then by length."""
    interrupted: bool = False

    def to_dict(self) -> dict[str, object]:
        """The report as plain data for JSON."""
        return {
            "benchmark": "attention",
            "format": FORMAT,
            "interrupted": self.interrupted,
            "environment": self.environment,
            "settings": asdict(self.settings),
            "unavailable": self.unavailable,
            "checks": [
                {
                    "name": check.name,
                    **asdict(check.workload),
                    "error": check.error,
                    "tensor": check.tensor,
                    "tolerance": check.tolerance,
                }
                for check in self.checks
            ],
            "roofline": {name: asdict(figure) for name, figure in self.roofline.items()},
            "results": [self._result(point, group) for group in self.groups for point in group],
        }

    def wrong_peaks(self) -> list[Point]:
        """A point of each workload whose peak is none: see `Point.peak_is_wrong`."""
        wrong = {point.workload: point for group in self.groups for point in group if point.peak_is_wrong}
        return list(wrong.values())

    def dtype_ratio(self, point: Point) -> float | None:
        """How many times as fast as the same candidate in float32, timed in the same rounds; None without both."""
        same = replace(point.workload, dtype=BASE_DTYPE)
        if point.timing is None or same == point.workload:
            return None
        for other in (each for group in self.groups for each in group):
            if other.name == point.name and other.workload == same and other.timing:
                return other.timing.median_s / point.timing.median_s
        return None

    def _result(self, point: Point, group: list[Point]) -> dict[str, object]:
        timing, memory = point.timing, point.memory
        return {
            "name": point.name,
            "is_peer": point.is_peer,
            **asdict(point.workload),
            "time_skipped": point.time_skipped,
            "time": None
            if timing is None
            else {
                "median_s": timing.median_s,
                "spread": timing.spread,
                "samples_s": list(timing.samples_s),
                "useful_gflops": point.useful_gflops,
                "share_of_matmul": point.share_of("mm"),
                "share_of_fma_peak": point.share_of("fma"),
                "limits_gflops": {name: list(readings) for name, readings in point.limits.items()},
                "times_as_fast_as_sdpa": speed_ratio(point, group),
                "times_as_fast_as_float32": self.dtype_ratio(point),
            },
            "memory_skipped": point.memory_skipped,
            "memory": None
            if memory is None
            else {
                "peak_bytes": memory.peak_bytes,
                "allocated_bytes": memory.allocated_bytes,
                "resident_bytes": memory.resident_bytes,
                "result_bytes": memory.result_bytes,
                "extra_bytes": memory.extra_bytes,
                "bytes_per_token": point.bytes_per_token,
                "growth": memory_growth(point, group),
            },
        }


def speed_ratio(point: Point, group: list[Point]) -> float | None:
    """How many times as fast as the baseline; None where one of the two was not timed."""
    for other in group:
        if other.name == BASELINE and other.workload == point.workload and other.timing and point.timing:
            return other.timing.median_s / point.timing.median_s
    return None


def memory_growth(point: Point, group: list[Point]) -> float | None:
    """Peak memory divided by that at the length before; linear growth is at most the ratio of the lengths."""
    shorter = [
        other
        for other in group
        if other.name == point.name and other.memory and other.workload.length < point.workload.length
    ]
    if not shorter or point.memory is None:
        return None
    before = max(shorter, key=lambda other: other.workload.length).memory
    return None if before is None or before.peak_bytes == 0 else point.memory.peak_bytes / before.peak_bytes
