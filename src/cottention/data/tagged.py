"""Words with a tag each, as rows for training: see `word_files.py` for the files.

raw = read_tagged("train.conll", words="tokens", tags="tags")        # columns number, words, labels
rows = with_tags(raw, tags_of(raw, "train.conll"), "train.conll")    # columns words, label
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value

from cottention.data.arrow_cache import cached_dataset, cached_map, fingerprint_of
from cottention.data.malformed import MalformedError
from cottention.data.tables import SKIPPING, LeftOut
from cottention.data.word_files import read_words
from cottention.errors import DataError, did_you_mean

_VERSION = 1  # part of the cache key: raise it when the same files shall give other rows
_ROWS_PER_TABLE = 1 << 10
_MOST_SHOWN = 10

_FEATURES = Features({"number": Value("int64"), "words": List(Value("string")), "labels": List(Value("string"))})


def read_tagged(path: str | Path, *, words: str, tags: str, skip_malformed: bool = False) -> Dataset:
    """Read the texts of a file once, to disk.

    Args:
        path: see `read_words`.
        words: column of the words' lists.
        tags: column of the tags' lists.
        skip_malformed: leave out texts that cannot be used, and say how many.

    Raises:
        DataError: see `read_words`, or a text has no words.
    """
    left_out = LeftOut() if skip_malformed else None
    try:
        state = Path(path).expanduser().stat()
        stamp = [str(Path(path).expanduser().resolve()), state.st_size, state.st_mtime_ns]
    except OSError:
        stamp = []  # reading it says what is wrong
    rows = _usable(read_words(path, words=words, tags=tags, left_out=left_out), left_out)
    key = ["tagged", _VERSION, *stamp, words, tags, skip_malformed]
    dataset = cached_dataset(_tables(rows), _FEATURES, key=key)
    if left_out is not None:
        left_out.report(path)
    if not len(dataset):
        raise DataError(f"{path} holds no text with tags")
    return dataset


def tags_of(rows: Dataset, path: str | Path) -> tuple[str, ...]:
    """The tags of rows, in alphabetical order.

    Raises:
        DataError: there is one alone.
    """
    names: set[str] = set()
    for batch in rows.select_columns("labels").iter(batch_size=_ROWS_PER_TABLE):
        names.update(name for row in batch["labels"] for name in row)  # pyright: ignore
    if len(names) < 2:
        raise DataError(f"{path}: every word has the tag {min(names)[:40]!r}: there is nothing to tell apart")
    return tuple(sorted(names))


def with_tags(rows: Dataset, names: Sequence[str], path: str | Path) -> Dataset:
    """Rows with the columns words and label, the number of each word's tag.

    Raises:
        DataError: a row has another tag; the message names both.
    """
    features = Features({"words": List(Value("string")), "label": List(Value("int64"))})
    key = ["tags", _VERSION, fingerprint_of(rows), list(names)]
    return cached_map(rows, _Number(names, path), features, key=key, batch_size=_ROWS_PER_TABLE)


class _Number:
    """The step of `cached_map`."""

    def __init__(self, names: Sequence[str], path: str | Path) -> None:
        self.places = {name: at for at, name in enumerate(names)}
        self.path = path

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Sequence[Any]]:
        return {
            "words": batch["words"],
            "label": [
                [self._place(tag, number) for tag in tags]
                for tags, number in zip(batch["labels"], batch["number"], strict=True)
            ],
        }

    def _place(self, tag: str, number: int) -> int:
        if tag not in self.places:
            shown = ", ".join(list(self.places)[:_MOST_SHOWN]) + (", ..." if len(self.places) > _MOST_SHOWN else "")
            near = did_you_mean(tag, self.places)
            raise DataError(
                f"{self.path}, text {number}: the tag {tag[:40]!r} is none of those trained on ({shown}){near}"
            )
        return self.places[tag]


def _usable(rows: Iterable[Any], left_out: LeftOut | None) -> Iterator[dict[str, Any]]:
    for number, where, words, tags in rows:
        if words:
            yield {"number": number, "words": words, "labels": tags}
            continue
        problem = MalformedError("no_text", f"{where}: no words; {SKIPPING}")
        if left_out is None:
            raise problem
        left_out.add(problem)


def _tables(rows: Iterable[dict[str, Any]]) -> Iterator[pa.Table]:
    schema = _FEATURES.arrow_schema
    held: list[dict[str, Any]] = []
    for row in rows:
        held.append(row)
        if len(held) == _ROWS_PER_TABLE:
            yield pa.Table.from_pylist(held, schema=schema)
            held = []
    if held:
        yield pa.Table.from_pylist(held, schema=schema)
