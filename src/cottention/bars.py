"""What long work shows on stderr: a bar on a terminal, elsewhere (a log file) a line every half minute.

with progress("Packing", "row", total=len(rows)) as bar:
    for row in rows:
        bar.update()
"""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import Any

from cottention.logging import get_logger

_SECONDS_BETWEEN_LINES = 30.0

logger = get_logger(__name__)


def progress(
    what: str, unit: str, *, total: int | None = None, delay: float = 0, leave: bool = True, on: bool = True
) -> Any:
    """Show how far something is.

    Args:
        what: the work, in words.
        unit: of what it is counted in; "B" is shown in megabytes.
        total: how many there are; None: nobody knows.
        delay: seconds before a bar appears.
        leave: whether the bar stays when the work is done.
        on: False shows nothing.

    Returns:
        A context manager with `update(number)` and `set_postfix(name=value, refresh=False)`.
    """
    if not on or not sys.stderr.isatty():
        return _Lines(what, unit, total, _SECONDS_BETWEEN_LINES if on else math.inf)
    from tqdm import tqdm

    return tqdm(desc=what, unit=unit, unit_scale=unit == "B", total=total, delay=delay, leave=leave)


class _Lines:
    """Stands for a bar where one would fill a log."""

    def __init__(self, what: str, unit: str, total: int | None, every_s: float) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._done = 0
        self._shown = ""
        self._every_s = every_s
        self._next_line = time.monotonic() + every_s

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        pass

    def update(self, number: int = 1) -> None:
        """Count on; say so now and then."""
        self._done += number
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + self._every_s
            logger.info("%s: %s%s", self._what, self._so_far(), self._shown)

    def set_postfix(self, *, refresh: bool = False, **values: str) -> None:
        """Figures for the next line."""
        self._shown = "".join(f", {name} {value}" for name, value in values.items())

    def _so_far(self) -> str:
        if self._unit == "B":
            return f"{self._done / 1e6:,.0f} MB"
        if self._total:
            return f"{self._done:,} of {self._total:,} {self._unit}s ({self._done / self._total:.0%})"
        return f"{self._done:,} {self._unit}s"
