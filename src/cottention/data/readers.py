r"""Files to text rows, in constant memory: .txt, .jsonl, .parquet, each text file also as .gz or .zst.

Every reader yields `(text, ends_document)`. A document longer than `BLOCK` characters comes as several rows, of which
only the last ends it; joined, the rows are the document again. So a 10 GB file is never in memory as a whole and can be
tokenised in parallel. Blocks are cut before a single space between two letters, where no tokenizer of ours joins:
byte-level BPE starts a piece at that space, WordPiece drops it, hence cutting does not change the tokens. Text without
such a space is cut after a line, which is as good; text with neither, anywhere, which may cost a token.

Text is UTF-8 (a leading byte-order mark is dropped), "\r\n" and "\r" become "\n". White space is no text: documents of
nothing else are left out, and so are whole blocks of it at the head of one. Paragraphs and lines come without the blank
lines around them. What cannot be read ends in one DataError line that names the file, the place and the remedy.

    for text, ends_document in read_rows(Path("corpus.jsonl.gz"), split_by="document", text_column="text"): ...
"""

from __future__ import annotations

import codecs
import contextlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cottention.errors import DataError, did_you_mean

BLOCK = 1 << 18
"""Characters per row at most (twice that for the last row of a document)."""

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SEPARATORS = {"document": None, "paragraph": re.compile(r"\n(?:[ \t]*\n)+"), "line": re.compile(r"\n")}

_CHUNK = 1 << 20
_LONGEST_LINE = 1 << 28  # bytes of one JSON row: more is one array written in a single line, not rows
_BLANK_HEAD = re.compile(r"(?:[ \t]*\n)+")
_MAGIC = {
    b"\x1f\x8b": "gzip-compressed (name it .gz)",
    b"\x28\xb5\x2f\xfd": "zstd-compressed (name it .zst)",
    b"PAR1": "a parquet file (name it .parquet)",
    b"PK\x03\x04": "a zip archive (unpack it first)",
    b"\xff\xfe": "UTF-16 text (convert it to UTF-8)",
    b"\xfe\xff": "UTF-16 text (convert it to UTF-8)",
}


def format_of(path: Path) -> tuple[str, str | None] | None:
    """Tell format ("text", "json", "parquet") and compression from the file's name; None when it is not one of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    return (kind, compression) if kind and not (kind == "parquet" and compression) else None


def read_rows(
    path: Path, *, split_by: str, text_column: str, on_empty: Callable[[], None] | None = None
) -> Iterator[tuple[str, bool]]:
    """Yield the text of one file, row by row, with a flag on the last row of each document.

    Args:
        path: a file whose name `format_of` knows.
        split_by: what one document is: the whole "document" (file, or row of .jsonl and .parquet), "paragraph", "line".
        text_column: which field of .jsonl and .parquet holds the text.
        on_empty: called for each file, or row of .jsonl and .parquet, that is white space or null and so left out.

    Raises:
        DataError: the file is missing, unreadable, damaged, binary, not UTF-8, or lacks the column.
    """
    kind, compression = _known_format(path)
    with _reading(path):
        if kind == "text":
            yield from split_text(_decoded(path, compression), split_by, on_empty)
        else:
            for text, _ in _records(path, text_column, None):
                yield from split_text([text or ""], split_by, on_empty)


def read_records(path: Path, *, text_column: str, key_column: str | None = None) -> Iterator[tuple[str | None, Any]]:
    """Yield the rows of a file one by one: the text, and what another column says.

    Args:
        path: a file whose name `format_of` knows; the rows of a text file are its lines, blank ones included.
        text_column: which field of .jsonl and .parquet holds the text; null gives None.
        key_column: the other field.

    Raises:
        DataError: as for `read_rows`, or text files have no columns.
    """
    kind, compression = _known_format(path)
    if kind == "text" and key_column is not None:
        raise DataError(f"{path} is a text file and has no column {key_column!r}")
    with _reading(path):
        if kind == "text":
            yield from ((line.removesuffix("\n"), None) for line in _decoded_lines(path, compression))
        else:
            yield from _records(path, text_column, key_column)


def split_text(
    chunks: Iterable[str], split_by: str, on_empty: Callable[[], None] | None = None
) -> Iterator[tuple[str, bool]]:
    """Cut streamed text into documents, and these into blocks, as `read_rows` does."""
    is_empty = True
    for row in _split(chunks, SEPARATORS[split_by]):
        is_empty = False
        yield row
    if is_empty and on_empty is not None:
        on_empty()


def _known_format(path: Path) -> tuple[str, str | None]:
    found = format_of(path)
    if found is None:
        known = ", ".join(sorted(FORMATS))
        raise DataError(
            f"cannot tell the format of {path} from its name; known are {known}, text also with .gz or .zst"
        )
    return found


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {_reason(error)}") from error


def blocks_of(text: str) -> Iterator[str]:
    """Cut a text into blocks where no token is cut, as `read_rows` does; put together they are the text."""
    start = 0
    while len(text) - start > 2 * BLOCK:
        cut = _cut(text, start)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _records(path: Path, text_column: str, key_column: str | None) -> Iterator[tuple[str | None, Any]]:
    kind, compression = _known_format(path)
    if kind == "json":
        return _json_records(path, compression, text_column, key_column)
    return _parquet_records(path, text_column, key_column)


def _reason(error: OSError | pa.ArrowException) -> str:
    """One line, in a reader's words where the library's own are about its insides."""
    if number := getattr(error, "errno", None):
        return os.strerror(number)
    message = (str(error) or type(error).__name__).splitlines()[0]
    if "Truncated" in message:
        return "the compressed file is cut short; fetch it again"
    if "zlib" in message or "ZSTD" in message:
        return f"it is not valid compressed data ({message})"
    if "Parquet" in message or "parquet" in message:
        return f"it is not a whole parquet file ({message})"
    return message


def _split(chunks: Iterable[str], separator: re.Pattern[str] | None) -> Iterator[tuple[str, bool]]:
    """Cut streamed text into documents, and documents into blocks."""
    rest = ""
    inside = False  # the rest begins in the middle of a document whose earlier blocks are out
    for chunk in chunks:
        rest += chunk
        if separator is not None:
            *complete, rest = separator.split(rest)
            for document in complete:
                yield from _last_blocks(_without_head(document, inside), inside)
                inside = False
        rest, inside = yield from _first_blocks(rest, inside)
    if separator is not None:
        rest = _without_tail(_without_head(rest, inside))
    yield from _last_blocks(rest, inside)


def _without_head(document: str, inside: bool) -> str:
    """Take off blank lines: of a separator that the end of a chunk cut in two, the second half is left here."""
    head = None if inside else _BLANK_HEAD.match(document)
    return document[head.end() :] if head else document


def _without_tail(document: str) -> str:
    """Take off blank lines at the end of a file."""
    text = document.rstrip(" \t\n")
    line_end = document.find("\n", len(text))
    return document[:line_end] if line_end >= 0 else document


def _last_blocks(document: str, inside: bool) -> Iterator[tuple[str, bool]]:
    if len(document) > 2 * BLOCK:  # a generator for every line would double the time
        document, inside = yield from _first_blocks(document, inside)
    if inside or document.strip():
        yield document, True


def _first_blocks(text: str, inside: bool) -> Generator[tuple[str, bool], None, tuple[str, bool]]:
    """Yield blocks while there are two at least; return the rest, and whether a block came before it."""
    start = 0
    while len(text) - start > 2 * BLOCK:
        cut = _cut(text, start)
        if inside or not text[start:cut].isspace():
            yield text[start:cut], False
            inside = True
        start = cut
    return text[start:], inside


def _cut(text: str, start: int) -> int:
    """Find where to cut at most BLOCK characters after `start`: before a space between letters, else after a line."""
    low, high = start + BLOCK // 2, start + BLOCK
    for at in _found_backwards(text, " ", low, high):
        if text[at - 1].isalpha() and text[at + 1].isalpha():
            return at
    for at in _found_backwards(text, "\n", low, high):
        if not text[at + 1].isspace():
            return at + 1
    return high


def _found_backwards(text: str, character: str, low: int, high: int) -> Iterator[int]:
    while (high := text.rfind(character, low, high)) >= 0:
        yield high


def _open(path: Path) -> pa.OSFile:
    return pa.OSFile(os.fsencode(path))  # as bytes, because pyarrow takes names of other encodings in no other way


def _chunks(path: Path, compression: str | None) -> Iterator[bytes]:
    """Yield the uncompressed bytes, refusing what is no text as soon as it comes by."""
    num_read = 0
    with _open(path) as file, pa.input_stream(file, compression=compression) as stream:
        while chunk := stream.read(_CHUNK):
            _refuse_binary(path, chunk, at=num_read)
            num_read += len(chunk)
            yield chunk


def _decoded(path: Path, compression: str | None) -> Iterator[str]:
    """Decode UTF-8 strictly, chunk by chunk, with universal newlines."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    num_read = 0
    for chunk in itertools.chain(_chunks(path, compression), [b""]):
        num_read += len(chunk)
        try:
            yield decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise DataError(_not_utf8(path, error, num_read - len(error.object) + error.start)) from None


def _not_utf8(path: Path, error: UnicodeDecodeError, offset: int) -> str:
    byte = error.object[error.start]
    return (
        f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {offset}; "
        "convert it first, for example with: iconv -f latin1 -t utf-8"
    )


def _refuse_binary(path: Path, chunk: bytes, at: int) -> None:
    if at == 0:
        for magic, what in _MAGIC.items():
            if chunk.startswith(magic):
                raise DataError(f"{path} is not plain text but {what}")
    if (offset := chunk.find(b"\0")) >= 0:
        raise DataError(f"{path} is a binary file, not text: zero byte at offset {at + offset}")


def _json_records(
    path: Path, compression: str | None, column: str, key_column: str | None
) -> Iterator[tuple[str | None, Any]]:
    for number, line in enumerate(_lines(path, compression), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            where = f"{path}, line {number}"
            row = _json_row(line, where, [name for name in (column, key_column) if name is not None])
            yield _json_text(row[column], where, column), row.get(key_column)


def _decoded_lines(path: Path, compression: str | None) -> Iterator[str]:
    held = ""
    for chunk in _decoded(path, compression):
        *complete, held = (held + chunk).split("\n")
        yield from complete
    if held:
        yield held


def _lines(path: Path, compression: str | None) -> Iterator[bytes]:
    """Split into lines, never holding more than one of them and a chunk."""
    held: list[bytes] = []
    number = 1
    for chunk in _chunks(path, compression):
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            yield b"".join([*held, line])
            held = []
        number += len(complete)
        held.append(rest)
        if sum(map(len, held)) > _LONGEST_LINE:
            raise DataError(
                f"{path}, line {number}: longer than {_LONGEST_LINE >> 20} MiB; one JSON object per line expected"
            )
    yield b"".join(held)


def _json_row(line: bytes, where: str, columns: list[str]) -> dict[str | None, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); one object per line expected"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested as deep
        raise DataError(f"{where}: not JSON that can be read ({str(error).partition(';')[0]})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: one JSON object per line expected; got {_json_kind(row)}")
    for column in columns:
        if column not in row:
            raise DataError(f"{where}: {no_column(column, list(row))}")
    return row


def _json_text(text: object, where: str, column: str) -> str | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(f"{where}: the column {column!r} must hold text; got {_json_kind(text)}")
    return normalised_newlines(_mend_surrogates(text))


def _json_kind(value: object) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return kinds.get(type(value), "null")


def _mend_surrogates(text: str) -> str:
    """Join escaped surrogate pairs that a JSON writer split; half a pair, which UTF-8 cannot hold, becomes U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def normalised_newlines(text: str) -> str:
    """Make every end of line a single line feed."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _parquet_records(path: Path, column: str, key_column: str | None) -> Iterator[tuple[str | None, Any]]:
    # Buffered page by page: by default a whole row group is fetched ahead, which may be the whole file.
    with _open(path) as source, pq.ParquetFile(source, buffer_size=_CHUNK, pre_buffer=False) as file:
        columns = [column] if key_column in (None, column) else [column, key_column]
        _check_columns(path, file.schema_arrow, columns)
        num_read = 0
        for batch in file.iter_batches(batch_size=_parquet_batch(file.metadata), columns=columns):
            keys = [None] * len(batch) if key_column is None else batch.column(key_column).to_pylist()
            for number, (text, key) in enumerate(zip(batch.column(column), keys, strict=True), start=num_read + 1):
                where = f"{path}, row {number}"
                yield (normalised_newlines(_parquet_text(text, where)) if text.is_valid else None), key
            num_read += len(batch)


def _check_columns(path: Path, schema: pa.Schema, columns: list[str]) -> None:
    for column in columns:
        if schema.names.count(column) != 1:
            what = f"more than one column {column!r}" if column in schema.names else no_column(column, schema.names)
            raise DataError(f"{path}: {what}")
    kind = schema.field(columns[0]).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{path}: the column {columns[0]!r} must hold text; got {kind}")


def _parquet_batch(metadata: pq.FileMetaData) -> int:
    """Rows that make up some megabytes, by their mean size."""
    num_bytes = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return min(256, 1 + 4 * _CHUNK * metadata.num_rows // (num_bytes + 1))


def _parquet_text(text: pa.Scalar, where: str) -> str:
    try:
        return text.as_py()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None


def no_column(column: str, names: list[str]) -> str:
    """Say that a column is missing, which there are, and which may be meant."""
    return f"no column {column!r}; it has {', '.join(map(repr, names)) or 'none'}{did_you_mean(column, names)}"
