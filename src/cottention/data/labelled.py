"""Labelled rows of one's own: what their labels are, rows to hold out, and the labels as a model learns them.

Labels are classes, numbers (a regression), or any number of classes at once (several labels). Which, is told by the
column unless it is said: several columns of 0 and 1, lists, or a separator make several labels; numbers with a
fraction, or more than `MOST_WHOLE` whole ones, a regression; everything else classes.

    raw = read_labelled("train.csv", text="review", label=["stars"])
    labels = labels_of(raw, "train.csv", kind="auto")              # Labels(kind="classes", names=("1", ..., "5"))
    train, dev = hold_out(raw, labels, share=0.1, seed=0)
    rows = with_labels(train, labels, "train.csv")                 # columns first, second, label
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from cottention.data.arrow_cache import cached_dataset, cached_map, fingerprint_of
from cottention.data.malformed import MalformedError
from cottention.data.tables import SKIPPING, LeftOut, Row, read_table
from cottention.errors import DataError, SettingsError, did_you_mean
from cottention.logging import get_logger

Kind = Literal["classes", "number", "several"]
KINDS: tuple[Kind, ...] = ("classes", "number", "several")

MOST_WHOLE = 20
"""Different whole numbers that are taken for classes: ratings and codes have fewer."""
_MOST_CLASSES = 10_000
_FEW_ROWS = 20  # of so few, each may have a label of its own
_VERSION = 1  # part of the cache key: raise it when the same files shall give other rows
_ROWS_PER_TABLE = 1 << 12
_TABLE_CHARACTERS = 1 << 24
_TRUE, _FALSE = ("1", "true", "yes"), ("0", "false", "no")
_MOST_SHOWN = 10
_NEIGHBOURS = 10  # numbers of like size that are split together

logger = get_logger(__name__)

_RAW = Features({"number": Value("int64"), "first": Value("string"), "second": Value("string")})
_TAGS = Features({**_RAW, "labels": List(Value("string"))})


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a model is to say of a text."""

    kind: Kind
    """One of its classes, a number, or any of its classes."""
    names: tuple[str, ...]
    """Of the classes, in the order of the model's outputs; of a number, that of its column."""

    @property
    def problem_type(self) -> str:
        """transformers' name for it."""
        return {
            "classes": "single_label_classification",
            "number": "regression",
            "several": "multi_label_classification",
        }[self.kind]

    def described(self) -> str:
        """In words."""
        if self.kind == "number":
            return "numbers"
        what = "classes" if self.kind == "classes" else "labels, any number of them to a text"
        more = ", ..." if len(self.names) > _MOST_SHOWN else ""
        return f"{len(self.names)} {what} ({', '.join(self.names[:_MOST_SHOWN])}{more})"


def read_labelled(
    path: str | Path,
    *,
    text: str,
    text_pair: str | None = None,
    label: Sequence[str],
    separator: str | None = None,
    skip_malformed: bool = False,
) -> Dataset:
    """Read the rows of a file once, to disk.

    Args:
        path: see `tables.py`.
        text: column of the text.
        text_pair: column of the second text, for pairs.
        label: column of the labels; several: columns of 0 and 1, each a label.
        separator: between the labels of one cell.
        skip_malformed: leave out rows that lack a text or a label, or cannot be read, and say how many.

    Returns:
        Columns number (of the row in the file, from 1), first, second ("" where there are no pairs), labels (as text).

    Raises:
        DataError: a column is missing, or a row cannot be used; the message names it.
    """
    if str(path) == "-":
        raise DataError("labelled rows must be in a file, which is read more than once; got -")
    place = Path(path).expanduser()
    left_out = LeftOut() if skip_malformed else None
    texts = [text] if text_pair is None else [text, text_pair]
    try:
        state = place.stat()
        stamp = [str(place.resolve()), state.st_size, state.st_mtime_ns]
    except OSError:
        stamp = []  # reading it says what is wrong
    rows = _usable(read_table(path, texts=texts, values=label, left_out=left_out), texts, label, separator, left_out)
    key = ["labelled", _VERSION, *stamp, texts, list(label), separator, skip_malformed]
    dataset = cached_dataset(_tables(rows), _TAGS, key=key)
    if left_out is not None:
        left_out.report(path)
    if not len(dataset):
        raise DataError(f"{path} holds no row with text and label")
    return dataset


def labels_of(rows: Dataset, path: str | Path, *, kind: str = "auto", label: Sequence[str], listed: bool) -> Labels:
    """What the labels of rows are.

    Args:
        rows: of `read_labelled`.
        path: where they are from, for messages.
        kind: one of `KINDS`, or "auto".
        label: the columns that they are from.
        listed: whether a cell may hold several of them.

    Raises:
        DataError: they are all the same, or nearly all different.
        SettingsError: they are not of this kind.
    """
    counts = _counts(rows)
    column = ", ".join(label)
    if kind == "auto":
        kind = _kind_of(counts, several=listed or len(label) > 1 or _has_lists(rows))
    if kind == "number":
        if listed or len(label) > 1 or _has_lists(rows):
            raise SettingsError(f"numbers must stand alone in one column; got several labels to a row in {column!r}")
        wrong = next((name for name in counts if _number(name) is None), None)
        if wrong is not None:
            where = _where(rows, path, wrong)
            raise DataError(f"{where}: the label must be a number; got {wrong[:40]!r}")
        labels = Labels(kind="number", names=(column,))
    elif kind == "several":
        labels = Labels(kind="several", names=tuple(label) if len(label) > 1 else _sorted(counts))
    else:
        if _has_lists(rows):
            raise SettingsError(f"the column {column!r} holds several labels to a row; --label-type several takes them")
        labels = Labels(kind="classes", names=_sorted(counts))
        _check_classes(counts, len(rows), column, path)
    if labels.kind == "number" and len(counts) < 2:
        raise DataError(f"{path}: every row has the number {next(iter(counts))} in {column!r}: nothing to learn")
    if not labels.names:
        raise DataError(f"{path}: no row has any label in {column!r}")
    return labels


def hold_out(rows: Dataset, labels: Labels, *, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows into those to train and those to measure on, with each label's share in both.

    A label's only row is trained on. Numbers are split within ranks of ten neighbours each.

    Args:
        rows: of `read_labelled`.
        labels: theirs.
        share: of the rows that are held out, between 0 and 1.
        seed: decides which.

    Raises:
        DataError: there are too few rows.
    """
    groups = _groups(rows, labels)
    held = held_out_rows(groups, share=share, seed=seed)
    if not len(held) or len(held) == len(rows):
        raise DataError(f"{len(rows)} rows are too few to hold some out; give others with --dev")
    rest = np.setdiff1d(np.arange(len(rows)), held)
    return rows.select(rest), rows.select(held)


def held_out_rows(groups: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Rows to hold out, sorted: of each group its share, rounded so that their sum is the whole's; never all of one.

    Args:
        groups: `[N]`, the group of each row, from 0.
        share: between 0 and 1.
        seed: decides which rows.
    """
    rng = np.random.default_rng(seed)
    sizes = np.bincount(groups)
    wanted = sizes * share
    taken = np.minimum(np.floor(wanted), np.maximum(sizes - 1, 0)).astype(int)
    missing = max(1, round(len(groups) * share)) - int(taken.sum())
    for group in np.argsort(taken - wanted, kind="stable"):
        if missing > 0 and taken[group] < sizes[group] - 1:
            taken[group] += 1
            missing -= 1
    order = rng.permutation(len(groups))
    order = order[np.argsort(groups[order], kind="stable")]  # group by group
    ranks = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(order[ranks < np.repeat(taken, sizes)])


def with_labels(rows: Dataset, labels: Labels, path: str | Path) -> Dataset:
    """Rows with the column `label` as a model takes it: a class's number, a number, or a 0 or 1 for each class.

    Args:
        rows: of `read_labelled`.
        labels: those that the model has.
        path: where the rows are from, for messages.

    Raises:
        DataError: a row has another label; the message names both.
    """
    kind = {"classes": Value("int64"), "number": Value("float64"), "several": List(Value("float32"))}[labels.kind]
    features = Features({"first": Value("string"), "second": Value("string"), "label": kind})
    key = ["labels", _VERSION, fingerprint_of(rows), labels.kind, list(labels.names)]
    return cached_map(rows, _Label(labels, path), features, key=key, batch_size=_ROWS_PER_TABLE >> 2)


class _Label:
    """The step of `cached_map`."""

    def __init__(self, labels: Labels, path: str | Path) -> None:
        self.labels, self.path = labels, path
        self.places = {name: at for at, name in enumerate(labels.names)}

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Sequence[Any]]:
        found = [self._label(*row) for row in zip(batch["labels"], batch["number"], strict=True)]
        return {"first": batch["first"], "second": batch["second"], "label": found}

    def _label(self, given: list[str], number: int) -> Any:
        if self.labels.kind == "number":
            value = _number(given[0]) if len(given) == 1 else None
            if value is None:
                raise DataError(f"{self.path}, row {number}: the label must be a number; got {str(given[0])[:40]!r}")
            return value
        if self.labels.kind == "classes":
            return self._place(given[0], number)
        flags = [0.0] * len(self.places)
        for name in given:
            flags[self._place(name, number)] = 1.0
        return flags

    def _place(self, name: str, number: int) -> int:
        if name not in self.places:
            known = ", ".join(self.labels.names[:_MOST_SHOWN]) + (", ..." if len(self.places) > _MOST_SHOWN else "")
            near = did_you_mean(name, self.labels.names)
            raise DataError(
                f"{self.path}, row {number}: the label {name[:40]!r} is none of those trained on ({known}){near}"
            )
        return self.places[name]


def _usable(
    rows: Iterable[Row],
    texts: Sequence[str],
    label: Sequence[str],
    separator: str | None,
    left_out: LeftOut | None,
) -> Iterator[dict[str, Any]]:
    for row in rows:
        found, values = row.cells[: len(texts)], row.cells[len(texts) :]
        try:
            for column, text in zip(texts, found, strict=True):
                if text is None or not text.strip():
                    raise MalformedError("no_text", f"{row.where}: no text in {column!r}; {SKIPPING}")
            labels = _labels_in(row.where, label, values, separator)
        except MalformedError as problem:
            if left_out is None:
                raise
            left_out.add(problem)
            continue
        yield {"number": row.number, "first": found[0], "second": [*found, ""][1], "labels": labels}


def _labels_in(where: str, columns: Sequence[str], values: Sequence[Any], separator: str | None) -> list[str]:
    """The labels of a row as text."""
    if not columns:
        return []
    if len(columns) > 1:
        return [name for name, value in zip(columns, values, strict=True) if _flag(where, name, value)]
    (column,), (value,) = columns, values
    if isinstance(value, list):
        return list(dict.fromkeys(_plain(where, column, each) for each in value))
    if value is None or (isinstance(value, str) and not value.strip()):
        if separator is not None and value is not None:
            return []
        raise MalformedError("no_label", f"{where}: no label in {column!r}; {SKIPPING}")
    if separator is not None:
        parts = [part.strip() for part in _plain(where, column, value).split(separator)]
        return list(dict.fromkeys(part for part in parts if part))
    return [_plain(where, column, value)]


def _plain(where: str, column: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float)) and not (isinstance(value, float) and math.isnan(value)):
        return str(value).strip()
    what = "nothing" if value is None or isinstance(value, float) else type(value).__name__
    raise MalformedError("no_label", f"{where}: a label in {column!r} must be text or a number; got {what}; {SKIPPING}")


def _flag(where: str, column: str, value: Any) -> bool:
    said = "" if value is None else str(value).strip().lower().removesuffix(".0")
    if said not in (*_TRUE, *_FALSE):
        raise MalformedError("no_label", f"{where}: {column!r} must be 0 or 1; got {said[:40]!r}; {SKIPPING}")
    return said in _TRUE


def _tables(rows: Iterable[dict[str, Any]]) -> Iterator[pa.Table]:
    schema = _TAGS.arrow_schema
    held: list[dict[str, Any]] = []
    num_characters = 0
    for row in rows:
        held.append(row)
        num_characters += len(row["first"]) + len(row["second"])
        if len(held) == _ROWS_PER_TABLE or num_characters > _TABLE_CHARACTERS:
            yield pa.Table.from_pylist(held, schema=schema)
            held, num_characters = [], 0
    if held:
        yield pa.Table.from_pylist(held, schema=schema)


def _counts(rows: Dataset) -> Counter[str]:
    """How many rows have each label."""
    counts: Counter[str] = Counter()
    for batch in rows.select_columns("labels").iter(batch_size=_ROWS_PER_TABLE):
        counts.update(name for names in batch["labels"] for name in names)  # pyright: ignore
    return counts


def _has_lists(rows: Dataset) -> bool:
    return any(
        len(names) != 1
        for batch in rows.select_columns("labels").iter(batch_size=_ROWS_PER_TABLE)
        for names in batch["labels"]  # pyright: ignore
    )


def _kind_of(counts: Counter[str], *, several: bool) -> Kind:
    if several:
        return "several"
    if not all(_number(name) is not None for name in counts):
        return "classes"
    has_fraction = any(value is not None and value != int(value) for value in map(_number, counts))
    return "number" if has_fraction or len(counts) > MOST_WHOLE else "classes"


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    """By number where all are numbers, else by their letters."""
    listed = list(names)
    values = {name: _number(name) for name in listed}
    if all(value is not None for value in values.values()):
        return tuple(sorted(listed, key=lambda name: (values[name], name)))
    return tuple(sorted(listed))


def _check_classes(counts: Counter[str], num_rows: int, column: str, path: str | Path) -> None:
    if len(counts) < 2:
        only = next(iter(counts), "")
        raise DataError(f"{path}: every row has the label {only[:40]!r} in {column!r}: there is nothing to tell apart")
    if len(counts) > _MOST_CLASSES or (num_rows > _FEW_ROWS and len(counts) > num_rows / 2):
        raise DataError(
            f"{path}: the column {column!r} holds {len(counts):,} different labels in {num_rows:,} rows: more than "
            "classes have; --label-column names the right one"
        )


def _where(rows: Dataset, path: str | Path, label: str) -> str:
    for batch in rows.select_columns(["number", "labels"]).iter(batch_size=_ROWS_PER_TABLE):
        for number, names in zip(batch["number"], batch["labels"], strict=True):  # pyright: ignore
            if label in names:
                return f"{path}, row {number}"
    return str(path)


def _groups(rows: Dataset, labels: Labels) -> np.ndarray:
    """A group's number for each row: its label, its set of labels, or its rank's tenth."""
    given: list[list[str]] = list(rows["labels"])
    if labels.kind == "number":
        order = np.argsort([float(names[0]) for names in given], kind="stable")
        groups = np.empty(len(given), dtype=np.int64)
        groups[order] = np.arange(len(given)) // _NEIGHBOURS
        return groups
    places: dict[tuple[str, ...], int] = {}
    return np.array([places.setdefault(tuple(sorted(names)), len(places)) for names in given], dtype=np.int64)
