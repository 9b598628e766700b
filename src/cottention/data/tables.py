r"""Tables of one's own to rows, one at a time: .csv, .tsv, .jsonl, .parquet (the first three also .gz, .zst), .txt.

    .csv      a first line of names; cells with commas, quotes or line ends in double quotes (RFC 4180). Spreadsheets
              of some countries write semicolons, which is told by where the names are found.
    .tsv      the same with tabs and no line ends in a cell; a quote at a cell's beginning is text unless the whole cell
              is quoted as a .csv's would be.
    .jsonl    an object a line; .parquet: as it is.
    .txt, -   a text a line (- is stdin), whatever the column is called.

A row that cannot be used ends in one line that names it by number, or is left out and counted.

    for row in read_table("train.csv", texts=["review"], values=["stars"]):
        row.where, row.cells                    # "train.csv, row 3 (line 4)", ["Never again.", "1"]
"""

from __future__ import annotations

import codecs
import csv
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cottention.data.encodings import other_kind, remedy_for
from cottention.data.json_rows import json_object, text_value
from cottention.data.malformed import MalformedError, no_column, numbered_lines
from cottention.data.opening import check_regular, decoded_chunks
from cottention.errors import DataError, did_you_mean
from cottention.files import one_line
from cottention.logging import get_logger

STDIN = "-"
"""The name that stands for it."""
KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
SKIPPING = "--skip-malformed leaves such rows out"

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_CHUNK = 1 << 20
_HEAD = 4 << 20  # bytes at the beginning of a file that show what encoding it is in
_LONGEST = 1 << 24  # bytes of a line and characters of a cell: of text, three novels
_LONGEST_HEADER = 1 << 20
_OTHER_DELIMITERS = (";", "\t", "|")
_SHOWN = 60  # characters of a cell in a message

logger = get_logger(__name__)


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    number: int
    """From 1, the line of names not counted."""
    where: str
    """Its place, as a message names it."""
    cells: list[Any]
    """What was asked for, in that order: texts, then values; None where there is nothing."""


@dataclass
class LeftOut:
    """Rows that could not be used and were passed over."""

    count: int = 0
    """How many."""
    first: str = ""
    """What was wrong with the first of them."""

    def add(self, problem: Exception) -> None:
        """Count one more."""
        self.first = self.first or str(problem)
        self.count += 1

    def report(self, path: str | Path) -> None:
        """Say how many there were; nothing where there were none."""
        if self.count:
            rows = "row is" if self.count == 1 else "rows are"
            logger.warning("%s: %d malformed %s left out; the first: %s", path, self.count, rows, self.first)


def table_kind(path: str | Path) -> tuple[str, str | None]:
    """The kind of a table ("csv", "tsv", "json", "parquet", "text") and its compression, by its name.

    Raises:
        DataError: the name says neither.
    """
    if str(path) == STDIN:
        return "text", None
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    if kind is None or (kind == "parquet" and compression):
        raise DataError(
            f"cannot tell the format of {path} from its name; known are {', '.join(KINDS)}, all but .parquet also with "
            ".gz or .zst"
        )
    return kind, compression


def read_table(
    path: str | Path, *, texts: Sequence[str], values: Sequence[str] = (), left_out: LeftOut | None = None
) -> Iterator[Row]:
    """Yield the rows of a file, or of stdin for "-", in constant memory.

    Args:
        path: the file; its name tells the kind.
        texts: columns of text.
        values: columns of anything.
        left_out: rows that cannot be used are counted here; None: the first of them is refused.

    Raises:
        DataError: the file is missing, damaged, not UTF-8, holds no row, or lacks a column; or a row cannot be used.
    """
    kind, compression = table_kind(path)
    columns = [*texts, *values]
    if kind != "text" and len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise DataError(f"the column {twice!r} is asked for twice")
    rows = _RowsOf(Path(path).expanduser(), str(path), compression, left_out)
    found = _READERS[kind](rows, list(texts), list(values))
    try:
        first = next(found, None)
        if first is None and not (left_out and left_out.count):
            raise DataError(f"{_shown(path)} holds no rows")
        if first is not None:
            yield first
            yield from found
    except OSError as error:
        raise DataError(f"cannot read {_shown(path)}: {one_line(error)}") from error


def first_row(path: str | Path, *, texts: Sequence[str], values: Sequence[str] = ()) -> None:
    """Look whether a file has these columns and a row that can be used.

    Raises:
        DataError: as for `read_table`.
    """
    left_out = LeftOut()
    if next(read_table(path, texts=texts, values=values, left_out=left_out), None) is None:
        raise DataError(left_out.first)


def read_lines_of(path: str | Path, left_out: LeftOut | None = None) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a file of any name, .gz and .zst unpacked.

    Raises:
        DataError: as for `read_table`.
    """
    place = Path(path).expanduser()
    rows = _RowsOf(place, str(path), _COMPRESSIONS.get(place.suffix.lower()), left_out)
    try:
        yield from rows.text_lines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {one_line(error)}") from error


def _shown(path: str | Path) -> str:
    return "stdin" if str(path) == STDIN else str(path)


@dataclass
class _RowsOf:
    """A file that is being read."""

    path: Path
    name: str
    compression: str | None
    left_out: LeftOut | None
    _head: bytes | None = field(default=None, repr=False)

    def where(self, row: int, line: int | None = None) -> str:
        shown = _shown(self.name)
        if line is None:
            return f"{shown}, row {row}"
        return f"{shown}, line {line}" if line == row else f"{shown}, row {row} (line {line})"

    def skip(self, problem: MalformedError) -> None:
        """Leave a row out, or refuse it."""
        if self.left_out is None:
            raise problem
        self.left_out.add(problem)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        r"""Numbered lines; only "\n" ends one, as some texts hold other characters that Python takes for line ends."""
        chunks = self._chunks()
        first = next(chunks, b"")
        if what := other_kind(first):
            raise DataError(f"{_shown(self.name)} is not plain text but {what}")
        first = first.removeprefix(codecs.BOM_UTF8)
        what = "one row per line expected"
        return numbered_lines(Path(_shown(self.name)), itertools.chain([first], chunks), b"\n", _LONGEST, what, None)

    def text_lines(self) -> Iterator[tuple[int, str]]:
        """The same as text, without what ends them."""
        for number, line in self.lines():
            try:
                yield number, self.decoded(line.removesuffix(b"\r"), number)
            except MalformedError as problem:
                self.skip(problem)

    def decoded(self, line: bytes, number: int) -> str:
        where = f"{_shown(self.name)}, line {number}"
        if (at := line.find(b"\0")) >= 0:
            raise MalformedError("zero_byte", f"{where}: a zero byte at column {at + 1}; {SKIPPING}")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            remedy = remedy_for(error, self.head(), SKIPPING)
            raise MalformedError("bad_byte", f"{where}: not UTF-8 (byte 0x{byte:02x}); {remedy}") from None

    def head(self) -> bytes:
        """The beginning of the file, which shows its encoding; of stdin it is gone."""
        if self._head is None:
            chunks = decoded_chunks(self.path, self.compression, size=_HEAD) if self.name != STDIN else iter(())
            self._head = next(chunks, b"")
        return self._head

    def _chunks(self) -> Iterator[bytes]:
        if self.name != STDIN:
            return decoded_chunks(self.path, self.compression, size=_CHUNK)
        stdin: Any = sys.stdin.buffer  # a buffered reader, which gives what is there without waiting for more
        return iter(lambda: stdin.read1(_CHUNK), b"")


# Lines of text, JSON, parquet


def _text_rows(rows: _RowsOf, texts: list[str], values: list[str]) -> Iterator[Row]:
    others = [*texts[1:], *values]
    if others:
        raise DataError(f"{_shown(rows.name)} is a text file and has no column {others[0]!r}")
    for number, line in rows.text_lines():
        yield Row(number, rows.where(number, number), [line or None])


def _json_rows(rows: _RowsOf, texts: list[str], values: list[str]) -> Iterator[Row]:
    row_number = 0
    for number, line in rows.lines():
        if not line.strip():
            continue
        row_number += 1
        where = rows.where(row_number, number)
        try:
            found = json_object(line, where, texts, rows.head, skipping=SKIPPING)
            cells = [text_value(found[name], where, name) for name in texts]
        except MalformedError as problem:
            rows.skip(problem)
            continue
        # A field that is not there is one without a value, unless no row so far has had it.
        for name in values:
            if row_number == 1 and name not in found:
                raise DataError(f"{where}: {no_column(name, [str(key) for key in found])}")
        yield Row(row_number, where, [*cells, *(found.get(name) for name in values)])


def _parquet_rows(rows: _RowsOf, texts: list[str], values: list[str]) -> Iterator[Row]:
    import pyarrow as pa

    from cottention.data.parquet_rows import parquet_records

    try:
        for number, found in parquet_records(rows.path, texts, values, buffer_bytes=_CHUNK):
            if isinstance(found, MalformedError):
                rows.skip(found)
            else:
                yield Row(number, rows.where(number), found)
    except pa.ArrowException as error:
        raise DataError(f"cannot read {rows.name}: it is not a whole parquet file ({one_line(error)})") from error


# Cells with something between them


def _csv_rows(rows: _RowsOf, texts: list[str], values: list[str]) -> Iterator[Row]:
    lines = _CsvLines(rows.text_lines())
    header = _header(rows, lines)
    delimiter = _delimiter(header, [*texts, *values])
    names = _parsed(rows, csv.reader([header], delimiter=delimiter, strict=True), lines, 0) or []
    wanted = _places(rows, [name.strip() for name in names], [*texts, *values])
    # The limit is the process's: raised, never lowered, as somebody else may have wanted more.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number = 0
    while True:
        lines.begin = None
        try:
            cells = _parsed(rows, reader, lines, number + 1)
        except MalformedError as problem:
            number += 1
            rows.skip(problem)
            continue
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        number += 1
        yield from _chosen(rows, cells, names, wanted, number, lines.begin)


def _tsv_rows(rows: _RowsOf, texts: list[str], values: list[str]) -> Iterator[Row]:
    lines = _CsvLines(rows.text_lines())
    names = [_unquoted(name).strip() for name in _header(rows, lines).removesuffix("\n").split("\t")]
    wanted = _places(rows, names, [*texts, *values])
    number = 0
    for line in lines:
        if line == "\n":
            continue
        number += 1
        cells = [_unquoted(cell) for cell in line[:-1].split("\t")]
        yield from _chosen(rows, cells, names, wanted, number, lines.last)


class _CsvLines:
    """Lines with their ends, which remembers the numbers of those that were read."""

    def __init__(self, lines: Iterable[tuple[int, str]]) -> None:
        self._lines = iter(lines)
        self.begin: int | None = None
        """The first line since it was set to None."""
        self.last = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        self.last, line = next(self._lines)
        self.begin = self.last if self.begin is None else self.begin
        return f"{line}\n"


def _header(rows: _RowsOf, lines: _CsvLines) -> str:
    for line in lines:
        if len(line) > _LONGEST_HEADER:
            raise DataError(f"{rows.name}, line {lines.last}: a first line with the columns' names expected")
        if line.strip():
            return line
    raise DataError(f"{rows.name} holds no rows")


def _delimiter(header: str, wanted: Sequence[str]) -> str:
    """A comma, unless the names that are wanted are found by another sign, and not by it."""

    def names_by(sign: str) -> set[str]:
        try:
            return {name.strip() for name in next(csv.reader([header], delimiter=sign), [])}
        except csv.Error:
            return set()

    if not names_by(",").issuperset(wanted):
        for sign in _OTHER_DELIMITERS:
            if names_by(sign).issuperset(wanted):
                return sign
    return ","


def _parsed(rows: _RowsOf, reader: Iterator[list[str]], lines: _CsvLines, number: int) -> list[str] | None:
    """The next row's cells; None behind the last.

    Raises:
        MalformedError: quotes stand where none may, in one line.
        DataError: they may have swallowed other rows.
    """
    try:
        return next(reader, None)
    except csv.Error as error:
        begin = lines.begin or lines.last
        where = rows.where(number, begin)
        reason = str(error)
        if "unexpected end" in reason:
            raise DataError(f"{where}: a quote is opened and not closed up to the end of the file") from None
        if "field larger" in reason:
            what = f"a quote is opened and not closed, or a cell is longer than {_LONGEST:,} characters"
            raise DataError(f"{where}: {what}") from None
        if lines.last > begin:
            what = f"a quote is opened there, and what closes it in line {lines.last} is inside another cell"
            raise DataError(f"{where}: {what}; write quotes inside a quoted cell twice") from None
        what = "behind a quote that ends a cell stands more text; quotes inside a quoted cell are written twice"
        raise MalformedError("bad_quotes", f"{where}: {what if 'expected after' in reason else reason}") from None


def _unquoted(cell: str) -> str:
    """What a program meant that quotes cells as in .csv; of one that does not, the cell as it is."""
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        inside = cell[1:-1]
        if '"' not in inside.replace('""', ""):
            return inside.replace('""', '"')
    return cell


def _places(rows: _RowsOf, names: list[str], wanted: list[str]) -> list[int]:
    for name in wanted:
        if names.count(name) != 1:
            what = f"more than one column {name!r}" if name in names else no_column(name, [_short(n) for n in names])
            raise DataError(f"{rows.name}: {what}")
    return [names.index(name) for name in wanted]


def _chosen(
    rows: _RowsOf, cells: list[str], names: list[str], wanted: list[int], number: int, line: int | None
) -> Iterator[Row]:
    """The row, unless it has another number of cells than there are names."""
    where = rows.where(number, line)
    if len(cells) != len(names):
        what = f"{len(names)} cells expected, as the first line has names; got {len(cells)}"
        rows.skip(MalformedError("cells", f"{where}: {what}; {SKIPPING}"))
        return
    yield Row(number, where, [cells[at] or None for at in wanted])


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_READERS = {"text": _text_rows, "json": _json_rows, "parquet": _parquet_rows, "csv": _csv_rows, "tsv": _tsv_rows}


def check_table(path: str | Path, *, what: str = "") -> None:
    """Refuse a file that is not there or cannot be a table, before anything heavy is loaded.

    Args:
        path: the file, or "-".
        what: how a user named it, e.g. "--data"; begins the message.

    Raises:
        DataError: one line.
    """
    prefix = f"{what}: " if what else ""
    if str(path) == STDIN:
        return
    place = Path(path).expanduser()
    if not place.exists():
        near = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
        raise DataError(f"{prefix}no such file: {path}{did_you_mean(place.name, near)}")
    if place.is_dir():
        raise DataError(f"{prefix}{path} is a folder; a file of rows is expected ({', '.join(KINDS)})")
    check_regular(place)
    if not os.access(place, os.R_OK):
        raise DataError(f"{prefix}cannot read {path}: Permission denied")
