"""Columns of parquet files to rows, a few megabytes at a time, however far they are compressed.

A parquet file names equal values by number, shares beginnings, and compresses: 500 bytes may hold half a gigabyte of
text. So the size of a batch follows from the largest value that a row group can name, not from the size on disk.

    for number, text, key in parquet_rows(path, "text", None, buffer_bytes=1 << 20, malformed=None): ...
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cottention.data.encodings import normalised_newlines
from cottention.data.malformed import MalformedError, leave_out, no_column
from cottention.data.opening import MOST_DECODED_RATIO, DecodedLimit, check_regular
from cottention.errors import DataError

_BATCH_BYTES = 4 << 20
_MOST_ROWS = 256
_SHARED_BYTES = 16 << 20  # of a batch at worst, where every value may be as long as all of its row group
_FREE_COLUMN_BYTES = 64 << 20  # of a column in a row group: below, nobody asks how well it was compressed


def parquet_rows(
    path: Path, column: str, key_column: str | None, *, buffer_bytes: int, malformed: Counter[str] | None
) -> Iterator[tuple[str | None, Any]]:
    """Yield the text of each row, and what its other column says.

    Args:
        path: the file.
        column: holds the text.
        key_column: the other one, or None.
        buffer_bytes: read at a time.
        malformed: where rows that are not UTF-8 are counted; None: one is refused.

    Raises:
        DataError: a column is missing or of another kind, a row cannot be used, or a few bytes make gigabytes.
        OSError, pa.ArrowException: it cannot be opened, or is damaged.
    """
    for _, found in parquet_records(
        path, [column], [] if key_column in (None, column) else [key_column], buffer_bytes=buffer_bytes, nested=False
    ):
        if isinstance(found, MalformedError):
            leave_out(found, malformed)
        else:
            yield found[0], None if key_column is None else found[-1]


def parquet_records(
    path: Path, texts: Sequence[str], values: Sequence[str], *, buffer_bytes: int, nested: bool = True
) -> Iterator[tuple[int, list[Any] | MalformedError]]:
    """Yield the number of each row, from 1, and its texts and other values, or what is wrong with it.

    Args:
        path: the file.
        texts: columns of text.
        values: other columns.
        buffer_bytes: read at a time.
        nested: whether the other columns may hold lists.

    Raises:
        DataError, OSError, pa.ArrowException: as for `parquet_rows`.
    """
    check_regular(path)
    columns = [*texts, *values]
    limit = DecodedLimit(path, path.stat().st_size)
    # Buffered page by page: by default a whole row group is fetched ahead, which may be the whole file.
    options: dict[str, Any] = {"buffer_size": buffer_bytes, "pre_buffer": False}
    name = os.fsencode(path)  # as bytes, because pyarrow takes names of other encodings in no other way
    with pa.OSFile(name) as source, pq.ParquetFile(source, **options) as file:
        _check_columns(path, file.schema_arrow, texts, values, nested=nested)
        number = 0
        for group in range(file.num_row_groups):
            with pa.OSFile(name) as again, _as_dictionaries(again, file.schema_arrow, columns, options) as dictionaries:
                batch_size = _batch_size(path, file.metadata.row_group(group), dictionaries, group, columns)
            for batch in file.iter_batches(batch_size=batch_size, row_groups=[group], columns=columns):
                texts_of = [batch.column(column) for column in texts]
                others = [batch.column(column).to_pylist() for column in values]
                for at in range(len(batch)):
                    number += 1
                    try:
                        found = [_text(column[at], f"{path}, row {number}") for column in texts_of]
                    except MalformedError as fault:
                        yield number, fault
                        continue
                    limit.add(sum(len(text or "") for text in found))
                    yield number, [*found, *(column[at] for column in others)]


def _check_columns(path: Path, schema: pa.Schema, texts: Sequence[str], values: Sequence[str], *, nested: bool) -> None:
    for column in (*texts, *values):
        if schema.names.count(column) != 1:
            what = f"more than one column {column!r}" if column in schema.names else no_column(column, schema.names)
            raise DataError(f"{path}: {what}")
    for column in texts:
        kind = _value_type(schema.field(column).type)
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise DataError(f"{path}: the column {column!r} must hold text; got {_shown(kind)}")
    for column in values:
        kind = _value_type(schema.field(column).type)
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if pa.types.is_nested(kind) and not (nested and is_list and not pa.types.is_nested(kind.value_type)):
            raise DataError(f"{path}: the column {column!r} must hold single values; got {_shown(kind)}")


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _shown(kind: pa.DataType) -> str:
    """A type as people read it; that of a nested column may be as long as its file."""
    shown = str(kind)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _as_dictionaries(
    source: pa.OSFile, schema: pa.Schema, columns: list[str], options: dict[str, Any]
) -> pq.ParquetFile:
    """The file again, with the columns that have values of any length read as numbers and what they name."""
    long = [column for column in columns if _is_long(_value_type(schema.field(column).type))]
    return pq.ParquetFile(source, read_dictionary=long, **options)


def _is_long(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    kinds += (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(is_kind(kind) for is_kind in kinds)


def _batch_size(path: Path, group: Any, dictionaries: pq.ParquetFile, number: int, columns: list[str]) -> int:
    """How many rows of a row group make some megabytes, by their mean size and the largest value they can name."""
    sizes = [_BATCH_BYTES // _MOST_ROWS, group.total_byte_size // max(group.num_rows, 1)]
    largest = 0
    for name, stored in _stored_columns(group, columns):
        encoded, compressed = stored.total_uncompressed_size, stored.total_compressed_size
        if encoded > _FREE_COLUMN_BYTES and encoded > MOST_DECODED_RATIO * max(compressed, 1):
            raise DataError(
                f"{path} is no text: the column {name!r} is {encoded:,} bytes out of {compressed:,}, more than "
                f"{MOST_DECODED_RATIO} for one"
            )
        largest = max(largest, encoded)
    try:
        # Read like this, the first row brings all values that the row group names by number.
        first = next(dictionaries.iter_batches(batch_size=1, row_groups=[number], columns=columns), None)
    except (OSError, pa.ArrowException):  # or they share their beginnings: each may be as long as all of the group
        return int(np.clip(_SHARED_BYTES // max(largest, 1), 1, _MOST_ROWS))
    named = [column for column in (first.columns if first is not None else []) if pa.types.is_dictionary(column.type)]
    sizes += [_longest(column.dictionary) for column in named if _is_long(column.type.value_type)]
    return int(np.clip(_BATCH_BYTES // max(sizes), 1, _MOST_ROWS))


def _longest(values: pa.Array) -> int:
    return pc.max(pc.binary_length(values)).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]


def _stored_columns(group: Any, columns: list[str]) -> Iterator[tuple[str, Any]]:
    for index in range(group.num_columns):
        stored = group.column(index)
        name = stored.path_in_schema
        column = name if name in columns else name.partition(".")[0]  # a list's values have a longer name
        if column in columns:
            yield column, stored


def _text(text: pa.Scalar, where: str) -> str | None:
    try:
        value = text.as_py()
    except UnicodeDecodeError as error:
        raise MalformedError("bad_byte", f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    return None if value is None else normalised_newlines(value)
