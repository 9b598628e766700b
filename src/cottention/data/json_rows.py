"""Lines of JSON to the fields that are asked for: one object a line, of a size that a parser can hold.

for text, key in json_rows(path, numbered_lines(...), "text", None, head=..., malformed=None): ...
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cottention.data.encodings import SKIPPING, normalised_newlines, remedy_for
from cottention.data.malformed import MalformedError, leave_out, no_column

MOST_VALUES = 1 << 21
"""Values of one row, in lists and objects, at most: of each, three bytes of a file, the parser makes 50 to 100."""

_SKIPPING = f"{SKIPPING} leave out the lines that have them"
_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def json_rows(
    path: Path,
    lines: Iterable[tuple[int, bytes]],
    column: str,
    key_column: str | None,
    *,
    head: Callable[[], bytes],
    malformed: Counter[str] | None,
) -> Iterator[tuple[str | None, Any]]:
    """Yield the text of each row, and what its other column says.

    Args:
        path: for messages.
        lines: numbered.
        column: holds the text.
        key_column: the other one, or None.
        head: gives the first bytes of the file, when a byte is not UTF-8.
        malformed: where rows that cannot be used are counted; None: one is refused.
    """
    columns = [name for name in (column, key_column) if name is not None]
    for number, line in lines:
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json_object(line, where, columns, head)
            text = text_value(row[column], where, column)
        except MalformedError as fault:
            leave_out(fault, malformed)
        else:
            yield text, row.get(key_column)


def json_object(
    line: bytes, where: str, columns: Sequence[str], head: Callable[[], bytes], skipping: str = _SKIPPING
) -> dict[str | None, Any]:
    """One line as an object that has these columns.

    Args:
        line: without its end.
        where: its place, which begins messages.
        columns: names that it must have.
        head: gives the first bytes of the file, when a byte is not UTF-8.
        skipping: what leaves such lines out.

    Raises:
        MalformedError: it is none.
    """
    if (offset := line.find(b"\0")) >= 0:
        raise MalformedError("zero_byte", f"{where}: a zero byte at column {offset + 1}")
    _check_num_values(line, where)
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        message = f"{where}: not UTF-8 (byte 0x{byte:02x}); {remedy_for(error, head(), skipping)}"
        raise MalformedError("bad_byte", message) from None
    except json.JSONDecodeError as error:
        message = f"{where}: not JSON ({error.msg} at column {error.colno}); one object per line expected"
        raise MalformedError("broken_json", message) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested as deep
        message = f"{where}: not JSON that can be read ({str(error).partition(';')[0]})"
        raise MalformedError("too_many_values", message) from None
    if not isinstance(row, dict):
        raise MalformedError("no_object", f"{where}: one JSON object per line expected; got {_kind(row)}")
    for column in columns:
        if column not in row:
            raise MalformedError("missing_column", f"{where}: {no_column(column, list(row))}")
    return row


def _check_num_values(line: bytes, where: str) -> None:
    """Count what separates values, outside strings, before a parser makes objects of them."""
    if len(line) <= MOST_VALUES or sum(map(line.count, (b",", b"[", b"{"))) <= MOST_VALUES:
        return
    bare = _STRINGS.sub(b"", line)
    if sum(map(bare.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise MalformedError("too_many_values", f"{where}: more than {MOST_VALUES:,} values in one row")


def text_value(text: object, where: str, column: str) -> str | None:
    """A text of a row; None for null.

    Raises:
        MalformedError: it is something else.
    """
    if text is None:
        return None
    if not isinstance(text, str):
        message = f"{where}: the column {column!r} must hold text; got {_kind(text)}"
        raise MalformedError("no_text", message)
    return normalised_newlines(_mend_surrogates(text))


def _kind(value: object) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return kinds.get(type(value), "null")


def _mend_surrogates(text: str) -> str:
    """Join escaped surrogate pairs that a JSON writer split; half a pair, which UTF-8 cannot hold, becomes U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
