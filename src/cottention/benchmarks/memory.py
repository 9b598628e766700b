"""How much memory a call needs beyond what was there before it: two meters that must agree.

- allocated: what torch's allocator gave out, counted by torch's own profiler. Exact to the byte and repeatable, but
  blind to memory that a native kernel takes from the operating system by itself.
- resident: pages of the process, by the kernel's high-water mark, set back before the call (Linux). Sees everything,
  in pages, and counts what was touched. It is exact only where malloc returns freed blocks at once, so a process that
  measures is started with MALLOC_ENVIRONMENT; otherwise blocks freed earlier are used again and are not seen.

    reading = measure_call(call, "cpu")      # reading.allocated_bytes, reading.resident_bytes, reading.result_bytes
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cottention.benchmarks.calls import synchronize

# glibc then maps each block of 64 KiB and more by itself and unmaps it when it is freed.
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_HIGH_WATER_MARK = "5"  # proc_pid_clear_refs(5)


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """What one call needed at its peak."""

    allocated_bytes: int
    """Most bytes in tensors at once, results included, inputs not."""
    resident_bytes: int | None
    """Growth of the process at its highest; None where the operating system does not tell."""
    result_bytes: int
    """Bytes of what the call returned."""
    call_s: float
    """Seconds of this call, while it was measured."""

    @property
    def peak_bytes(self) -> int:
        """The larger of both: nothing is hidden from it."""
        return max(self.allocated_bytes, self.resident_bytes or 0)

    @property
    def extra_bytes(self) -> int:
        """Peak beyond inputs and results: what the way of computing costs."""
        return max(0, self.peak_bytes - self.result_bytes)


def measure_call(call: Callable[[], tuple[Tensor, ...]], device: str) -> MemoryReading:
    """Run a call once and say what it needed."""
    return _measure_on_cpu(call) if device == "cpu" else _measure_on_gpu(call, device)


def _measure_on_cpu(call: Callable[[], tuple[Tensor, ...]]) -> MemoryReading:
    gc.collect()  # garbage of an earlier reading, released within this one, would count against it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        before = _start_high_water_mark()
        start = time.perf_counter()
        results = call()
        call_s = time.perf_counter() - start
        resident = None if before is None else _status_bytes("VmHWM") - before
    return MemoryReading(
        allocated_bytes=_peak_of_profile(profiler),
        resident_bytes=resident,
        result_bytes=sum(x.nbytes for x in results),
        call_s=call_s,
    )


def _measure_on_gpu(call: Callable[[], tuple[Tensor, ...]], device: str) -> MemoryReading:
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    results = call()
    synchronize(device)
    return MemoryReading(
        allocated_bytes=torch.cuda.max_memory_allocated() - before,
        resident_bytes=None,
        result_bytes=sum(x.nbytes for x in results),
        call_s=time.perf_counter() - start,
    )


def _peak_of_profile(profiler: profile) -> int:
    """Largest sum of the allocations and (negative) releases so far."""
    kineto = profiler.profiler
    assert kineto is not None, "the profile has ended, so it has results"
    assert kineto.kineto_results is not None, "the profile has ended, so it has results"
    changes = [
        (event.start_ns(), event.nbytes())  # pyright: ignore[reportAttributeAccessIssue]  missing in torch's stubs
        for event in kineto.kineto_results.events()
        if event.name() == "[memory]"
    ]
    live = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        peak = max(peak, live)
    return peak


def _start_high_water_mark() -> int | None:
    """Give back what is free, set the mark to what is in use now, and return that; None where there is no mark."""
    if not _CLEAR_REFS.exists():
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others do not hoard
    if trim is not None:
        trim(0)
    _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK)
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024  # "VmHWM:    1920 kB"
    raise RuntimeError(f"{_STATUS} has no field {field}")
