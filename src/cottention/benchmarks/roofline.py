"""What the machine can do at most, measured in the same run: the shares that a benchmark reports are shares of this.

Two kinds of use: a limit is read in every round of the calls that it is to judge, so that a busy moment hits both; and
all limits are read before and after the whole, for the head of the report.

    meters = find_meters("cpu")          # {"mm_float32": Meter, "fma_float32": ..., "copy": ...}
    meters["mm_float32"].read()          # GFLOP/s, once more
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from cottention.benchmarks.measure_cuda import seconds_on_gpu
from cottention.ops.native import binding

_MATRIX = 2048
_SMALLEST_MATRIX = 256
_LONGEST_MM_S = 2.0  # bfloat16 without hardware for it: most of a minute at full size
_COPIED_BYTES = 256 << 20  # far beyond any cache
# Each figure may take about this long a time it is sampled.
_SAMPLE_S = 0.5
_FEWEST_READINGS = 2
# A reading of the arithmetic units: as long as one of torch.mm, or half of that, after the clocks have risen.
_FMA_S = 0.05


@dataclass(frozen=True, kw_only=True)
class RooflineFigure:
    """One limit of the machine."""

    description: str
    unit: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Meter:
    """Reads one limit, as often as it is asked."""

    description: str
    unit: str
    read: Callable[[], float]


def find_meters(device: str) -> dict[str, Meter]:
    """Name -> meter, of all that can be read on the device; warmed up."""
    meters = {f"mm_{name}": _matmul_meter(name, device) for name in ("float32", "bfloat16")}
    if device == "cpu":
        meters |= _arithmetic_meters()
    meters["copy"] = Meter(
        description=f"copy of {_COPIED_BYTES >> 20} MiB, read and written", unit="GB/s", read=_copy(device)
    )
    return meters


def _matmul_meter(name: str, device: str) -> Meter:
    """torch.mm in a dtype, of smaller matrices where those of `_MATRIX` would take too long."""
    size = _MATRIX
    if size > _SMALLEST_MATRIX:
        gflops = _matmul(name, _SMALLEST_MATRIX, device)()
        while size > _SMALLEST_MATRIX and 2 * size**3 / 1e9 > gflops * _LONGEST_MM_S:
            size //= 2
    return Meter(description=f"torch.mm {size}^3 {name}", unit="GFLOP/s", read=_matmul(name, size, device))


def _matmul(name: str, size: int, device: str) -> Callable[[], float]:
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, name)) for _ in range(2))
    out = torch.empty_like(a)
    return _rate(lambda: torch.mm(a, b, out=out), 2 * size**3 / 1e9, device)


def _copy(device: str) -> Callable[[], float]:
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    return _rate(lambda: target.copy_(source), 2 * _COPIED_BYTES / 1e9, device)


def _rate(call: Callable[[], object], work: float, device: str) -> Callable[[], float]:
    def read() -> float:
        if device != "cpu":
            return work / seconds_on_gpu(call, 1)
        start = time.perf_counter()
        call()
        return work / (time.perf_counter() - start)

    read()  # warm-up
    return read


def _arithmetic_meters() -> dict[str, Meter]:
    """A loop on registers alone, which only native code can run: what the arithmetic units do and nothing else."""
    if not binding.is_available():
        return {}
    peak = binding.loaded_library().ct_fma_peak
    peak.argtypes, peak.restype = [ctypes.c_int, ctypes.c_double, ctypes.c_char_p], ctypes.c_double
    meters = {}
    # float32 runs in AVX-512 where bfloat16 has instructions of its own
    isa_of_float32 = binding.instruction_set().removesuffix("bf16")
    for dtype, isa in (("float32", isa_of_float32), ("bfloat16", "avx512bf16")):

        def read(isa: str = isa) -> float:
            return peak(torch.get_num_threads(), _FMA_S, isa.encode()) / 1e9

        if read() > 0:  # 0: the processor or the compiler knows no such instructions
            about = f"FMA peak {dtype} ({isa}, registers alone)"
            meters[f"fma_{dtype}"] = Meter(description=about, unit="GFLOP/s", read=read)
    return meters


class Roofline:
    """Collects readings of every meter, whenever it is asked to."""

    def __init__(self, meters: dict[str, Meter]) -> None:
        self._meters = meters
        self._readings: dict[str, list[float]] = {name: [] for name in meters}

    def sample(self) -> dict[str, list[float]]:
        """Read every meter for about half a second; returns these readings."""
        taken: dict[str, list[float]] = {}
        for name, meter in self._meters.items():
            started, taken[name] = time.perf_counter(), []
            while len(taken[name]) < _FEWEST_READINGS or time.perf_counter() - started < _SAMPLE_S:
                taken[name].append(meter.read())
            self.add(name, taken[name])
        return taken

    def add(self, name: str, readings: Iterable[float]) -> None:
        """Take over readings, made now or by an earlier try."""
        self._readings.setdefault(name, []).extend(readings)

    def results(self) -> dict[str, RooflineFigure]:
        """The median of all readings of each meter."""
        return {
            name: RooflineFigure(description=meter.description, unit=meter.unit, value=statistics.median(taken))
            for name, meter in self._meters.items()
            if (taken := self._readings[name])
        }
