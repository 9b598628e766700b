"""Files of words with a tag each: lines of a word and its tag with blank lines between texts (CoNLL), or two lists.

    EU B-ORG                    {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}
    rejects O

Of a line with more columns, the first is the word and the last its tag; `# ...` comments of CoNLL-U and -DOCSTART-
lines are passed over.

    for number, where, words, tags in read_words("train.conll", words="tokens", tags="tags"): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cottention.data.malformed import MalformedError
from cottention.data.tables import SKIPPING, LeftOut, read_lines_of, read_table, table_kind
from cottention.errors import DataError

SUFFIXES = (".conll", ".bio", ".iob", ".conllu")
"""Names of files of lines."""
_MOST_WORDS = 1 << 20  # of a text: a file without blank lines is no list of texts


def is_tagged_file(path: str | Path) -> bool:
    """Whether a file's name says that it holds lines of a word and its tag."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() not in (".gz", ".zst")]
    return bool(suffixes) and suffixes[-1] in SUFFIXES


def read_words(
    path: str | Path, *, words: str, tags: str | None, left_out: LeftOut | None = None
) -> Iterator[tuple[int, str, list[str] | None, list[str] | None]]:
    """Yield (number, place, words, tags) of every text of a file.

    Args:
        path: lines of words by its name (`SUFFIXES`), else a table (tables.py); of .txt the words between blanks.
        words: column of the words' lists.
        tags: that of the tags'; None: there are none.
        left_out: texts that cannot be used are counted here; None: the first is refused.

    Raises:
        DataError: the file or a row of it cannot be used.
    """
    if is_tagged_file(path):
        yield from _from_lines(path, tags is not None, left_out)
        return
    is_text = table_kind(path)[0] == "text"
    if is_text and tags is not None:
        raise DataError(f"{path} holds no tags; lines of words are known by {', '.join(SUFFIXES)}")
    if table_kind(path)[0] in ("csv", "tsv"):
        raise DataError(f"{path} has no lists of words; .jsonl and .parquet do, or {', '.join(SUFFIXES)}")
    columns = {"texts": [words]} if is_text else {"texts": [], "values": [words, *([] if tags is None else [tags])]}
    for row in read_table(path, left_out=left_out, **columns):
        if is_text:
            written: str = row.cells[0] or ""
            yield row.number, row.where, written.split() or None, None
            continue
        try:
            found = [_strings(row.where, name, cell) for name, cell in zip((words, tags), row.cells, strict=False)]
            if tags is not None and len(found[0] or ()) != len(found[1] or ()):
                counts = f"{len(found[0] or ())} words and {len(found[1] or ())} tags"
                raise MalformedError("tags", f"{row.where}: a tag for each word expected; got {counts}; {SKIPPING}")
        except MalformedError as problem:
            if left_out is None:
                raise
            left_out.add(problem)
            continue
        yield row.number, row.where, found[0], found[1] if tags is not None else None


def _from_lines(
    path: str | Path, tagged: bool, left_out: LeftOut | None
) -> Iterator[tuple[int, str, list[str] | None, list[str] | None]]:
    words: list[str] = []
    tags: list[str] = []
    number, begin = 0, 0
    for line_number, line in read_lines_of(path, left_out):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words:
                number += 1
                yield number, f"{path}, text {number} (line {begin})", words, tags if tagged else None
                words, tags = [], []
            continue
        if line.startswith("# ") or line == "#":
            continue
        cells = line.split("\t") if "\t" in line else line.split()
        cells = [cell.strip() for cell in cells]
        if (tagged and len(cells) < 2) or not cells[0] or not cells[-1]:
            what = "a word and its tag expected"
            raise DataError(f"{path}, line {line_number}: {what}; got {line.strip()[:60]!r}")
        begin = begin if words else line_number
        words.append(cells[0])
        tags.append(cells[-1])
        if len(words) > _MOST_WORDS:
            raise DataError(f"{path}, line {begin}: more than {_MOST_WORDS:,} words without a blank line between texts")
    if words:
        number += 1
        yield number, f"{path}, text {number} (line {begin})", words, tags if tagged else None
    elif not number:
        raise DataError(f"{path} holds no words")


def _strings(where: str, column: str | None, cell: Any) -> list[str] | None:
    if cell is None:
        return None
    if isinstance(cell, list) and all(isinstance(each, str) and each for each in cell):
        return cell
    raise MalformedError("tags", f"{where}: {column!r} must hold a list of texts; {SKIPPING}")
