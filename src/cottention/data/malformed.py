"""Lines and rows that are not text: an error, or, where a caller wants that, left out and counted by reason.

try: text = parsed(line)
except MalformedError as fault: leave_out(fault, counts)       # raises it when counts is None
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, AnyStr

from cottention.errors import DataError, did_you_mean

PREFIX = "malformed_"
"""Begins the names of the counts."""

REASONS = {
    "bad_byte": "with a byte that is not UTF-8",
    "zero_byte": "with a zero byte",
    "broken_json": "of broken JSON",
    "no_object": "of JSON that is no object",
    "missing_column": "without the column",
    "no_text": "whose column holds no text",
    "too_long": "too long",
    "too_many_values": "of too many values or too deep",
}
"""Why a line or row is left out, as people read it."""


class MalformedError(DataError):
    """One line or row cannot be used; those around it may be.

    Args:
        reason: one of REASONS.
        message: the whole of what a user reads when it is not left out.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def leave_out(fault: MalformedError, counts: Counter[str] | None) -> None:
    """Count what is left out; without counts nothing is, and the fault is raised."""
    if counts is None:
        raise fault
    counts[PREFIX + fault.reason] += 1


def numbered_lines(
    path: Path, chunks: Iterable[AnyStr], newline: AnyStr, longest: int, what: str, malformed: Counter[str] | None
) -> Iterator[tuple[int, AnyStr]]:
    """Split text or bytes into numbered lines, never holding more than one of them and a chunk.

    Args:
        path: for the message.
        chunks: of the file.
        newline: what ends a line.
        longest: length of a line at most, of whole MiB.
        what: what a line should be.
        malformed: where longer lines are counted; None: one is refused.
    """
    held: list[Any] = []  # a type checker cannot tell that all are of one type
    empty: Any = newline[:0]
    num_held, number, is_left_out = 0, 1, False
    for chunk in chunks:
        pieces: list[Any] = chunk.split(newline)
        for index, piece in enumerate(pieces):
            if index:  # the line before ends here
                if not is_left_out:
                    yield number, held[0] if len(held) == 1 else empty.join(held)
                held, num_held, number, is_left_out = [], 0, number + 1, False
            if is_left_out or not piece:
                continue
            held.append(piece)
            num_held += len(piece)
            if num_held > longest:
                message = f"{path}, line {number}: longer than {longest >> 20} MiB; {what}"
                leave_out(MalformedError("too_long", message), malformed)
                held, is_left_out = [], True
    if held:
        yield number, empty.join(held)


def described_malformed(counts: Mapping[str, int]) -> str | None:
    """One line on what was left out, by reason; None when nothing was."""
    found = {reason: counts[PREFIX + reason] for reason in REASONS if counts.get(PREFIX + reason)}
    if not found:
        return None
    total = sum(found.values())
    by_reason = ", ".join(f"{count:,} {REASONS[reason]}" for reason, count in found.items())
    return f"left out {total:,} malformed {'line or row' if total == 1 else 'lines or rows'}: {by_reason}"


def no_column(column: str, names: list[str]) -> str:
    """Say that a column is missing, which there are, and which may be meant."""
    shown = ", ".join(map(repr, names[:_MOST_NAMES])) or "none"
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"no column {column!r}; it has {shown}{more}{did_you_mean(column, names[:_MOST_NAMES])}"


_MOST_NAMES = 50
