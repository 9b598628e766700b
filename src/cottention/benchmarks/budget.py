"""What fits: predicts time and memory of the next length from shorter ones, and says no before it is too late.

budget = Budget(time_limit_s=10, memory_limit_bytes=8 << 30)
reason = budget.refusal(length=4096, seconds={256: 0.01, 1024: 0.12}, peak_bytes={1024: 3 << 20}, input_bytes=6 << 20)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

# Nothing here grows faster than the square of the length. What was measured grows towards its final exponent, so a
# quarter is added to the exponent between the last two lengths.
_LARGEST_EXPONENT = 2.0
_EXPONENT_MARGIN = 0.25


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits on one call."""

    time_limit_s: float
    memory_limit_bytes: float

    def refusal(
        self,
        *,
        length: int,
        seconds: Mapping[int, float],
        peak_bytes: Mapping[int, float],
        input_bytes: int,
    ) -> str | None:
        """Why a call at this length must not be made; None when it may.

        Args:
            length: tokens of the call in question.
            seconds: seconds of a call at shorter lengths.
            peak_bytes: memory beyond the inputs at shorter lengths.
            input_bytes: memory of the inputs at this length.
        """
        needed_bytes = input_bytes + predict(peak_bytes, length)
        if needed_bytes > self.memory_limit_bytes:
            return f"would need about {_gib(needed_bytes)}, the limit is {_gib(self.memory_limit_bytes)}"
        needed_s = predict(seconds, length)
        if needed_s > self.time_limit_s:
            return f"a call would take about {needed_s:.3g} s, the limit is {self.time_limit_s:.3g} s"
        return None


def predict(measured: Mapping[int, float], length: int) -> float:
    """The figure to expect at a length, rather too large than too small.

    Args:
        measured: length -> figure, of shorter lengths; with none of them nothing is known and 0 is returned.
        length: where to predict.
    """
    known = sorted((shorter, value) for shorter, value in measured.items() if shorter <= length)
    if not known:
        return 0.0
    (last_length, last), exponent = known[-1], _LARGEST_EXPONENT
    if len(known) > 1:
        earlier_length, earlier = known[-2]
        if earlier > 0 and last > 0:
            slope = math.log(last / earlier) / math.log(last_length / earlier_length)
            exponent = min(_LARGEST_EXPONENT, max(1.0, slope + _EXPONENT_MARGIN))
    return last * (length / last_length) ** exponent


def free_bytes(device: str) -> int:
    """Memory that can still be had on the device."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
