"""Seconds and bytes as people read them: three digits and the unit that fits.

duration(1e-3), size(35e9)                  # "1.00 ms", "35.0 GB"
duration(1e-3, digits=1)                    # "1 ms", for the ticks of an axis
"""

from __future__ import annotations

from collections.abc import Sequence

_SECONDS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))
_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))


def duration(seconds: float, *, digits: int = 3) -> str:
    """A time of at least a nanosecond, in s, ms, µs or ns."""
    return _in_units(seconds, _SECONDS, digits)


def size(num_bytes: float, *, digits: int = 3) -> str:
    """A size in powers of 1000, as published readings are."""
    return _in_units(num_bytes, _BYTES, digits)


def _in_units(value: float, units: Sequence[tuple[str, float]], digits: int) -> str:
    value = float(f"{value:.{digits - 1}e}")  # rounded first: what becomes 1000 is one of the next unit
    name, factor = next((unit for unit in units if value >= unit[1] * (1 - 1e-9)), units[-1])
    in_unit = value / factor
    decimals = max(0, digits - len(str(int(in_unit + 1e-9))))
    return f"{in_unit:.{decimals}f} {name}"
