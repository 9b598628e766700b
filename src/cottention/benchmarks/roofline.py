"""What the machine can do at most, measured in the same run: the shares that a benchmark reports are shares of this.

meter = Roofline("cpu")
meter.sample()                       # before, and once more after, what is to be judged by it
meter.results()                      # {"mm_float32": RooflineFigure(unit="GFLOP/s", value=...), ...}
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cottention.benchmarks.measure_cuda import seconds_on_gpu

_MATRIX = 2048
_COPIED_BYTES = 256 << 20  # far beyond any cache
# Each figure may take about this long a time it is sampled: bfloat16 without hardware for it is slow.
_SAMPLE_S = 0.5
_FEWEST_CALLS = 2


@dataclass(frozen=True, kw_only=True)
class RooflineFigure:
    """One limit of the machine."""

    description: str
    unit: str
    value: float


@dataclass(frozen=True, kw_only=True)
class _Meter:
    description: str
    unit: str
    work: float  # in the unit, a second
    prepare: Callable[[str], Callable[[], object]]  # device -> the call that does the work


def _matmul(dtype: torch.dtype) -> Callable[[str], Callable[[], object]]:
    def prepare(device: str) -> Callable[[], object]:
        a, b = (torch.randn(_MATRIX, _MATRIX, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    return prepare


def _copy(device: str) -> Callable[[], object]:
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


_MATMUL_GFLOP = 2 * _MATRIX**3 / 1e9

METERS: dict[str, _Meter] = {
    "mm_float32": _Meter(
        description="torch.mm 2048^3 float32", unit="GFLOP/s", work=_MATMUL_GFLOP, prepare=_matmul(torch.float32)
    ),
    "mm_bfloat16": _Meter(
        description="torch.mm 2048^3 bfloat16", unit="GFLOP/s", work=_MATMUL_GFLOP, prepare=_matmul(torch.bfloat16)
    ),
    "copy": _Meter(
        description="copy of 256 MiB, read and written", unit="GB/s", work=2 * _COPIED_BYTES / 1e9, prepare=_copy
    ),
}
"""Name -> what measures it. A native library that can run its arithmetic alone adds its peak here."""


class Roofline:
    """Collects samples of every meter, whenever it is asked to."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._seconds: dict[str, list[float]] = {name: [] for name in METERS}

    def sample(self) -> None:
        """Run every meter for about half a second."""
        for name, meter in METERS.items():
            call = meter.prepare(self._device)
            call()  # warm-up
            started, calls = time.perf_counter(), 0
            while calls < _FEWEST_CALLS or time.perf_counter() - started < _SAMPLE_S:
                if self._device != "cpu":
                    self._seconds[name].append(seconds_on_gpu(call, 1))
                else:
                    start = time.perf_counter()
                    call()
                    self._seconds[name].append(time.perf_counter() - start)
                calls += 1

    def results(self) -> dict[str, RooflineFigure]:
        """The median of all samples of each meter."""
        return {
            name: RooflineFigure(
                description=meter.description, unit=meter.unit, value=meter.work / statistics.median(taken)
            )
            for name, meter in METERS.items()
            if (taken := self._seconds[name])
        }
