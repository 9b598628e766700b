"""What a command that reads row after row shows and counts: a bar on a terminal, else a line now and then; cut texts.

for row in counted(rows, "rows"): ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cottention.logging import get_logger

_SECONDS_BETWEEN_LINES = 30.0

_Item = TypeVar("_Item")
logger = get_logger(__name__)


@dataclass
class Cuts:
    """Rows that were longer than what the model reads."""

    count: int = 0
    """How many."""
    limit: int = 0
    """Tokens that were read of each."""


def counted(items: Iterable[_Item], unit: str) -> Iterator[_Item]:
    """Pass items on and show how many there were, and how fast.

    Args:
        items: any number of them.
        unit: what they are, in the plural.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, unit=f" {unit}", leave=False, dynamic_ncols=True)
        return
    started = time.monotonic()
    next_line = started + _SECONDS_BETWEEN_LINES
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now >= next_line:
            next_line = now + _SECONDS_BETWEEN_LINES
            logger.info("%d %s, %.0f a second", number, unit, number / (now - started))


def num_of(count: int, unit: str) -> str:
    """How many of something there are, in words: "1 row", "2,000 rows"."""
    return f"{count:,} {unit}" if count == 1 else f"{count:,} {unit}s"
