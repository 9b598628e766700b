"""Times calls side by side: warm-up, then rounds in which every call has its turn, and the median of the rounds.

Interleaving lets a busy moment of the machine hit everybody; a median lets it hit nobody. Short calls are repeated
within a sample, so that the clock's resolution does not show.

    timings = time_interleaved({"chunk": call, "sdpa": other}, "cpu", repeats=10, time_limit_s=10)
    timings["chunk"].median_s
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from cottention.benchmarks.measure_cuda import seconds_on_gpu

# A sample lasts this long at least: thousands of ticks of the clock.
_SHORTEST_SAMPLE_S = 2e-3

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one call, in every sample."""

    samples_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The middle sample."""
        return statistics.median(self.samples_s)

    @property
    def spread(self) -> float | None:
        """Half the width of the middle half of the samples, as a share of the median; None for fewer than 3."""
        if len(self.samples_s) < 3:
            return None
        lower, _, upper = statistics.quantiles(self.samples_s, n=4)
        return (upper - lower) / 2 / self.median_s


def time_interleaved(
    calls: Mapping[Key, Callable[[], object]],
    device: str,
    *,
    repeats: int,
    time_limit_s: float,
    before_each_round: Callable[[], object] | None = None,
    processor_time: bool = False,
) -> dict[Key, Timing]:
    """Time each call as often as asked, or as its time limit allows, at least once.

    Args:
        calls: name -> what to time.
        device: cpu or cuda.
        repeats: samples wanted of each.
        time_limit_s: seconds that one call may take for warm-up and samples together. A call whose warm-up alone takes
            more than half of it is not repeated: the warm-up, at that length no longer different, is its sample.
        before_each_round: what else has its turn in every round, such as reading the machine's limits.
        processor_time: whether seconds on a CPU are those that this process was given, which other work on the machine
            hardly moves; all threads are counted together.
    """
    samples: dict[Key, list[float]] = {}
    plans: dict[Key, tuple[int, int]] = {}  # name -> samples, calls in each
    for name, call in calls.items():
        warm_up_s = _seconds_of(call, 1, device, processor_time)
        if warm_up_s > time_limit_s / 2:
            samples[name], plans[name] = [warm_up_s], (0, 1)
            continue
        samples[name] = []
        again_s = _seconds_of(call, 1, device, processor_time)  # the first call may have set something up
        calls_each = max(1, math.ceil(_SHORTEST_SAMPLE_S / again_s))
        fitting = int((time_limit_s - warm_up_s - again_s) / (again_s * calls_each))
        plans[name] = (max(1, min(repeats, fitting)), calls_each)
    for i in range(max(1, *(wanted for wanted, _ in plans.values()))):
        if before_each_round is not None:
            before_each_round()
        names = list(calls)
        turn = i % len(names)  # nobody is always the first, or always behind the same other
        for name in names[turn:] + names[:turn]:
            num_samples, calls_each = plans[name]
            if i < num_samples:
                samples[name].append(_seconds_of(calls[name], calls_each, device, processor_time))
    return {name: Timing(samples_s=tuple(taken)) for name, taken in samples.items()}


def _seconds_of(call: Callable[[], object], num_calls: int, device: str, processor_time: bool) -> float:
    if device != "cpu":
        return seconds_on_gpu(call, num_calls)
    clock = time.process_time if processor_time else time.perf_counter
    start = clock()
    for _ in range(num_calls):
        call()
    return (clock() - start) / num_calls
