"""Time spent on training alone: pauses for evaluation and saving do not count, earlier sessions of the run do.

stopwatch = Stopwatch(elapsed_s=0.0, step=0)
with stopwatch.paused():
    evaluate()
seconds = stopwatch.lap(step=10)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """A clock that can be paused."""

    def __init__(self, *, elapsed_s: float, step: int) -> None:
        """Start.

        Args:
            elapsed_s: what earlier sessions took.
            step: updates they made.
        """
        self._before_s = elapsed_s
        self._started = time.perf_counter()
        self._paused_s = 0.0
        self._lap_step = step
        self._lap_elapsed_s = elapsed_s

    @property
    def elapsed_s(self) -> float:
        """Seconds of training so far."""
        return self._before_s + time.perf_counter() - self._started - self._paused_s

    @property
    def since_start_s(self) -> float:
        """The same with this session's pauses among them."""
        return self._before_s + time.perf_counter() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - start

    @property
    def lap_step(self) -> int:
        """The step at which the lap began."""
        return self._lap_step

    def lap(self, step: int) -> float:
        """Seconds since the lap before; starts a new lap."""
        elapsed_s = self.elapsed_s
        seconds = elapsed_s - self._lap_elapsed_s
        self._lap_step, self._lap_elapsed_s = step, elapsed_s
        return max(seconds, 1e-9)
