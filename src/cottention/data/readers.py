r"""Files to text rows, in constant memory: .txt, .jsonl, .parquet, each text file also as .gz or .zst.

Every reader yields `(text, ends_document)`. A document longer than `BLOCK` characters comes as several rows, of which
only the last ends it; joined, the rows are the document again. So a 10 GB file is never in memory as a whole and can be
tokenised in parallel. Blocks are cut before a single space between two letters, where no tokenizer of ours joins:
byte-level BPE starts a piece at that space, WordPiece drops it, hence cutting does not change the tokens.

Text is UTF-8 (a leading byte-order mark is dropped), "\r\n" and "\r" become "\n", documents of white space alone are
left out. What cannot be read ends in one DataError line that names the file, the place and the remedy.

    for text, ends_document in read_rows(Path("corpus.jsonl.gz"), split_by="document", text_column="text"): ...
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cottention.errors import DataError, did_you_mean

BLOCK = 1 << 18
"""Characters per row at most (twice that for the last row of a document)."""

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SEPARATORS = {"document": None, "paragraph": re.compile(r"\n(?:[ \t]*\n)+"), "line": re.compile(r"\n")}

_CHUNK = 1 << 20
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


def read_rows(path: Path, *, split_by: str, text_column: str) -> Iterator[tuple[str, bool]]:
    """Yield the text of one file, row by row, with a flag on the last row of each document.

    Args:
        path: a file whose name `format_of` knows.
        split_by: what one document is: the whole "document" (file, or row of .jsonl and .parquet), "paragraph", "line".
        text_column: which field of .jsonl and .parquet holds the text.

    Raises:
        DataError: the file is missing, unreadable, damaged, binary, not UTF-8, or lacks the column.
    """
    found = format_of(path)
    if found is None:
        known = ", ".join(sorted(FORMATS))
        raise DataError(
            f"cannot tell the format of {path} from its name; known are {known}, text also with .gz or .zst"
        )
    kind, compression = found
    separator = SEPARATORS[split_by]
    try:
        if kind == "text":
            yield from _split(_decoded(path, compression), separator)
        elif kind == "json":
            for text in _json_texts(path, compression, text_column):
                yield from _split([text], separator)
        else:
            for text in _parquet_texts(path, text_column):
                yield from _split([text], separator)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot read {path}: {_reason(error)}") from error


def _reason(error: OSError | pa.ArrowInvalid) -> str:
    """One line, in a reader's words where the library's own are about its insides."""
    message = getattr(error, "strerror", None) or str(error).splitlines()[0]
    if "Truncated" in message:
        return "the compressed file is cut short; fetch it again"
    if "zlib" in message or "ZSTD" in message:
        return f"it is not valid compressed data ({message})"
    if "Parquet" in message or "parquet" in message:
        return f"it is not a whole parquet file ({message})"
    return message


def _split(chunks: Iterable[str], separator: re.Pattern[str] | None) -> Iterator[tuple[str, bool]]:
    """Cut streamed text into documents, and documents into blocks."""
    buffer = ""
    inside = False  # the buffer begins in the middle of a document whose earlier blocks are out
    for chunk in chunks:
        buffer += chunk
        if separator is not None:
            *complete, buffer = separator.split(buffer)
            for document in complete:
                yield from _blocks(document.strip("\n"), inside)
                inside = False
        while len(buffer) > 2 * BLOCK:
            cut = _cut(buffer)
            yield buffer[:cut], False
            buffer, inside = buffer[cut:], True
    yield from _blocks(buffer if separator is None else buffer.strip("\n"), inside)


def _blocks(document: str, inside: bool) -> Iterator[tuple[str, bool]]:
    if not inside and not document.strip():
        return
    start = 0
    while len(document) - start > 2 * BLOCK:
        cut = _cut(document, start)
        yield document[start:cut], False
        start = cut
    yield document[start:], True


def _cut(text: str, start: int = 0) -> int:
    """Find where to cut at most BLOCK characters after `start`: before a space between letters, else after a line."""
    low, high = start + BLOCK // 2, start + BLOCK
    at = text.rfind(" ", low, high)
    while at >= 0:
        if text[at - 1].isalpha() and text[at + 1].isalpha():
            return at
        at = text.rfind(" ", low, at)
    line_end = text.rfind("\n", low, high)
    return line_end + 1 if line_end >= 0 else high


def _open(path: Path, compression: str | None) -> pa.NativeFile:
    return pa.input_stream(str(path), compression=compression)


def _decoded(path: Path, compression: str | None) -> Iterator[str]:
    """Decode UTF-8 strictly, chunk by chunk, with universal newlines."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    num_read = 0
    with _open(path, compression) as stream:
        while True:
            chunk = stream.read(_CHUNK)
            _refuse_binary(path, chunk, at=num_read)
            num_read += len(chunk)
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise DataError(_not_utf8(path, error, num_read - len(error.object) + error.start)) from None
            if not chunk:
                return


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


def _json_texts(path: Path, compression: str | None, column: str) -> Iterator[str]:
    with _open(path, compression) as stream:
        for number, line in enumerate(io.BufferedReader(stream, _CHUNK), start=1):
            if number == 1:
                _refuse_binary(path, line, at=0)
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            text = _json_text(line, f"{path}, line {number}", column)
            if text is not None:
                yield text


def _json_text(line: bytes, where: str, column: str) -> str | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); one object per line expected"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: one JSON object per line expected; got {_json_kind(row)}")
    if column not in row:
        raise DataError(f"{where}: {_no_column(column, list(row))}")
    text = row[column]
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(f"{where}: the column {column!r} must hold text; got {_json_kind(text)}")
    return _newlines(_mend_surrogates(text))


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


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise DataError(f"{path}: {_no_column(column, names)}")
        kind = file.schema_arrow.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: the column {column!r} must hold text; got {kind}")
        for batch in file.iter_batches(batch_size=256, columns=[column]):
            for text in batch.column(0):
                if text.is_valid:
                    yield _newlines(text.as_py())


def _no_column(column: str, names: list[str]) -> str:
    return f"no column {column!r}; it has {', '.join(map(repr, names)) or 'none'}{did_you_mean(column, names)}"
