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
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from cottention.data.encodings import SKIPPING, other_kind, remedy_for
from cottention.data.json_rows import json_rows
from cottention.data.malformed import MalformedError, leave_out, numbered_lines
from cottention.data.opening import decoded_chunks
from cottention.data.parquet_rows import parquet_rows
from cottention.errors import DataError

BLOCK = 1 << 18
"""Characters per row at most (twice that for the last row of a document)."""

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SEPARATORS = {"document": None, "paragraph": re.compile(r"\n(?:[ \t]*\n)+"), "line": re.compile(r"\n")}

_CHUNK = 1 << 20
_LONGEST_LINE = 1 << 28  # bytes of one JSON row: more is one array written in a single line, not rows
_LONGEST_TEXT_LINE = 1 << 26  # bytes of a line that stands for a sentence
_PART = 1 << 26  # bytes of a longer line of text that are left out together
_HEAD = 4 << 20  # bytes at the beginning of a file that show what encoding it is in
_CONTROLS = bytes([*range(9), *range(14, 32)])  # text has none
_BYTES_PER_CONTROL = 100  # where they are rarer, it is text that is damaged
_SEARCHED = 1 << 12  # characters searched together for a place to cut
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_BEFORE_LINE = re.compile(r"\n(?=\S)")
_BLANK_HEAD = re.compile(r"(?:[ \t]*\n)+")


def format_of(path: Path) -> tuple[str, str | None] | None:
    """Tell format ("text", "json", "parquet") and compression from the file's name; None when it is not one of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    kind = FORMATS.get(suffixes[-1]) if suffixes else None
    return (kind, compression) if kind and not (kind == "parquet" and compression) else None


def read_rows(
    path: Path,
    *,
    split_by: str,
    text_column: str,
    on_empty: Callable[[], None] | None = None,
    malformed: Counter[str] | None = None,
) -> Iterator[tuple[str, bool]]:
    """Yield the text of one file, row by row, with a flag on the last row of each document.

    Args:
        path: a file whose name `format_of` knows.
        split_by: what one document is: the whole "document" (file, or row of .jsonl and .parquet), "paragraph", "line".
        text_column: which field of .jsonl and .parquet holds the text.
        on_empty: called for each file, or row of .jsonl and .parquet, that is white space or null and so left out.
        malformed: lines and rows that are not text are left out and counted here, by reason (see malformed.py); None:
            the first of them is refused.

    Raises:
        DataError: the file is missing, unreadable, damaged, binary, not UTF-8, or lacks the column.
    """
    kind, compression = _known_format(path)
    with _reading(path):
        if kind == "text":
            yield from split_text(_decoded(path, compression, malformed), split_by, on_empty)
        else:
            for text, _ in _records(path, text_column, None, malformed):
                yield from split_text([text or ""], split_by, on_empty)


def read_records(
    path: Path, *, text_column: str, key_column: str | None = None, malformed: Counter[str] | None = None
) -> Iterator[tuple[str | None, Any]]:
    """Yield the rows of a file one by one: the text, and what another column says.

    Args:
        path: a file whose name `format_of` knows; the rows of a text file are its lines, blank ones included.
        text_column: which field of .jsonl and .parquet holds the text; null gives None.
        key_column: the other field.
        malformed: as for `read_rows`.

    Raises:
        DataError: as for `read_rows`, or text files have no columns.
    """
    kind, compression = _known_format(path)
    if kind == "text" and key_column is not None:
        raise DataError(f"{path} is a text file and has no column {key_column!r}")
    with _reading(path):
        if kind == "text":
            chunks, what = _decoded(path, compression, malformed), "one sentence per line expected"
            for _, line in numbered_lines(path, chunks, "\n", _LONGEST_TEXT_LINE, what, malformed):
                yield line, None
        else:
            yield from _records(path, text_column, key_column, malformed)


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


def _records(
    path: Path, text_column: str, key_column: str | None, malformed: Counter[str] | None
) -> Iterator[tuple[str | None, Any]]:
    kind, compression = _known_format(path)
    if kind == "parquet":
        return parquet_rows(path, text_column, key_column, buffer_bytes=_CHUNK, malformed=malformed)
    chunks = _checked(path, _chunks(path, compression), refuse_zeros=malformed is None)
    lines = numbered_lines(path, chunks, b"\n", _LONGEST_LINE, "one JSON object per line expected", malformed)
    return json_rows(path, lines, text_column, key_column, head=lambda: _head(path, compression), malformed=malformed)


def _reason(error: OSError | pa.ArrowException) -> str:
    """One line, in a reader's words where the library's own are about its insides."""
    if number := getattr(error, "errno", None):
        return os.strerror(number)
    message = (str(error) or type(error).__name__).splitlines()[0]
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
                if not inside and (not document or document.isspace()):  # blank ones may be millions
                    continue
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
    for at in _found_backwards(" ", _BETWEEN_WORDS, text, low, high):
        if text[at - 1].isalpha() and text[at + 1].isalpha():
            return at
    for at in _found_backwards("\n", _BEFORE_LINE, text, low, high):
        return at + 1
    return high


def _found_backwards(character: str, pattern: re.Pattern[str], text: str, low: int, high: int) -> Iterator[int]:
    """Where a pattern of a character and those around it begins, the last place first."""
    while (high := text.rfind(character, low, high) + 1) > low:
        begin = max(low, high - _SEARCHED)
        yield from reversed(
            [found.start() for found in pattern.finditer(text, begin, high + 1) if found.start() < high]
        )
        high = begin


def _chunks(path: Path, compression: str | None) -> Iterator[bytes]:
    return decoded_chunks(path, compression, size=_CHUNK)


def _head(path: Path, compression: str | None) -> bytes:
    """The beginning of a file, to see what it is."""
    return b"".join(itertools.islice(_chunks(path, compression), -(-_HEAD // _CHUNK)))


def _checked(path: Path, chunks: Iterator[bytes], *, refuse_zeros: bool) -> Iterator[bytes]:
    """Pass bytes on, refusing what is no text as soon as it comes by."""
    num_read = 0
    for chunk in chunks:
        if not num_read and (what := other_kind(chunk)):
            raise DataError(f"{path} is not plain text but {what}")
        if refuse_zeros and (offset := chunk.find(b"\0")) >= 0:
            few = (len(chunk) - len(chunk.translate(None, _CONTROLS))) * _BYTES_PER_CONTROL <= len(chunk)
            remedy = f", or text that is damaged: {SKIPPING} leave out the lines that have one" if few else ""
            raise DataError(f"{path} is a binary file, not text: zero byte at offset {num_read + offset}{remedy}")
        num_read += len(chunk)
        yield chunk


def _decoded(path: Path, compression: str | None, malformed: Counter[str] | None) -> Iterator[str]:
    """Decode UTF-8 strictly, chunk by chunk, with universal newlines."""
    chunks = _checked(path, _chunks(path, compression), refuse_zeros=malformed is None)
    if malformed is not None:
        chunks = _without_malformed(path, chunks, malformed)
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    num_read = num_characters = 0
    for chunk in itertools.chain(chunks, [b""]):
        num_read += len(chunk)
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            byte, offset = error.object[error.start], num_read - len(error.object) + error.start
            raise DataError(
                f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {offset}; "
                f"{remedy_for(error, _head(path, compression))}"
            ) from None
        yield text if num_characters else text.removeprefix("\ufeff")
        num_characters += len(text)


def _without_malformed(path: Path, chunks: Iterable[bytes], malformed: Counter[str]) -> Iterator[bytes]:
    """Leave out the lines that are not UTF-8 or hold a zero byte; of very long lines, parts."""
    held: list[bytes] = []
    num_held = 0
    for chunk in itertools.chain(chunks, [b""]):
        end = chunk.rfind(b"\n") + 1 if chunk else 0
        held.append(chunk)
        num_held += len(chunk)
        if not end and chunk and num_held < _PART:
            continue
        block = b"".join(held)
        if chunk:
            end = num_held - len(chunk) + end if end else _whole_characters(block)
        else:
            end = num_held
        yield _well_formed(path, block[:end], malformed)
        held, num_held = [block[end:]], num_held - end


def _whole_characters(block: bytes) -> int:
    """Where to cut behind a character: before the last byte that begins one."""
    end = len(block) - 1
    while end > len(block) - 4 and block[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _well_formed(path: Path, block: bytes, malformed: Counter[str]) -> bytes:
    """Take the lines out of a block that are not text."""
    if not _fault_of(path, block):
        return block
    kept = []
    for line in block.splitlines(keepends=True):  # of bytes, which knows the ends \n, \r\n and \r alone
        if fault := _fault_of(path, line):
            leave_out(fault, malformed)
        else:
            kept.append(line)
    return b"".join(kept)


def _fault_of(path: Path, block: bytes) -> MalformedError | None:
    if b"\0" in block:
        return MalformedError("zero_byte", f"{path}: a zero byte")
    try:
        block.decode("utf-8")
    except UnicodeDecodeError:
        return MalformedError("bad_byte", f"{path}: a byte that is not UTF-8")
    return None
