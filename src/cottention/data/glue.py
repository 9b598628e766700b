r"""GLUE's tasks as rows: from the official TSV files (or slices of them) or from the Hub, checked row by row.

A file is UTF-8, tab-separated, without any quoting; lines end with "\n" alone. Columns are found by the names in the
first line; the files that come without one (CoLA, SST-2 by sentences) are known by their number of columns. Whatever
the source, the result has the same columns, memory-mapped:

    index     the row's name on the GLUE server (string)
    first     its text, or its first sentence
    second    its second sentence; "" in the tasks that have one text
    label     the class's number in `GlueTask.classes`, or STS-B's score; missing in test files

    task = glue_task("mrpc")
    train = load_glue(task, "glue/", "train")
"""

from __future__ import annotations

import codecs
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
from datasets import Dataset, Features, Value

from cottention.data.arrow_cache import cached_dataset
from cottention.data.encodings import other_kind, remedy_for
from cottention.data.glue_tasks import GlueTask
from cottention.data.malformed import MalformedError, described_malformed, leave_out, numbered_lines
from cottention.data.opening import decoded_chunks
from cottention.errors import DataError, did_you_mean, why_offline
from cottention.logging import get_logger

HUB = "hub"
"""The source that stands for GLUE on the Hugging Face Hub."""
_HUB_NAME = "nyu-mll/glue"
_VERSION = 1  # part of the cache key: raise it when the same files shall give other rows
_ROWS_PER_TABLE = 1 << 14
_CHUNK = 1 << 20
_LONGEST_LINE = 1 << 24  # bytes: a row of GLUE has some hundreds
_HEAD = 4 << 20  # bytes at the beginning of a file that show what encoding it is in
_SKIPPING = "--skip-malformed leaves such rows out"
_COMPRESSIONS = {"": None, ".gz": "gzip", ".zst": "zstd"}

logger = get_logger(__name__)


_FILE_NAMES = {  # of each split: in folders, then on the Hub
    "train": (("train",), "train"),
    "dev": (("dev", "validation"), "validation"),
    "dev_matched": (("dev_matched", "validation_matched"), "validation_matched"),
    "dev_mismatched": (("dev_mismatched", "validation_mismatched"), "validation_mismatched"),
    "test": (("test", "diagnostic"), "test"),
    "test_matched": (("test_matched",), "test_matched"),
    "test_mismatched": (("test_mismatched",), "test_mismatched"),
}


def load_glue(task: GlueTask, source: str | os.PathLike[str], split: str, *, skip_malformed: bool = False) -> Dataset:
    """Open one split of a task.

    Args:
        task: one of `GLUE_TASKS`, or `DIAGNOSTIC`.
        source: a folder with the tasks' folders, the task's own folder, "hub", or OWNER/NAME on the Hub.
        split: "train", or one of the task's dev_splits and test_splits.
        skip_malformed: leave out rows that lack columns or have too many, or are not UTF-8, and say how many; the
            official QQP file has some.

    Returns:
        Rows with the columns of the module's docstring.

    Raises:
        DataError: no such file, or something in it is wrong; one line that names file and line.
    """
    if not Path(source).expanduser().is_dir() and (source == HUB or _looks_like_hub(str(source))):
        return _from_hub(task, _HUB_NAME if source == HUB else str(source), split)
    path = find_glue_file(task, source, split)
    if path is None:
        names = " or ".join(f"{name}.tsv" for name in _FILE_NAMES[split][0])
        raise DataError(
            f"{task_folder(task, source)} has no {names} (also .gz, .zst), the {split} split of {task.title}"
        )
    state = path.stat()
    key = ["glue", _VERSION, task.name, split, str(path.resolve()), state.st_size, state.st_mtime_ns, skip_malformed]
    labelled = not split.startswith("test")
    tables = _tables(_rows(path, task, labelled, skip_malformed), task, labelled)
    dataset = cached_dataset(tables, _features(task, labelled), key=key)
    if not len(dataset):
        raise DataError(f"{path} holds no rows")
    return dataset


def has_split(task: GlueTask, source: str | os.PathLike[str], split: str) -> bool:
    """Whether a source has this split; the Hub has all of them."""
    if not Path(source).expanduser().is_dir() and (source == HUB or _looks_like_hub(str(source))):
        return True
    try:
        return find_glue_file(task, source, split) is not None
    except DataError:
        return False


def find_glue_file(task: GlueTask, source: str | os.PathLike[str], split: str) -> Path | None:
    """The file of a split, or None.

    Raises:
        DataError: the source has no folder for the task.
    """
    folder = task_folder(task, source)
    candidates = [folder / f"{name}.tsv{end}" for name in _FILE_NAMES[split][0] for end in _COMPRESSIONS]
    return next((path for path in candidates if path.is_file()), None)


def task_folder(task: GlueTask, source: str | os.PathLike[str]) -> Path:
    """The folder with a task's files: the one of its name in `source`, else `source` itself when it holds a split.

    Raises:
        DataError: there is none.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        raise DataError(f"no folder {source} with GLUE's files; `{HUB}` fetches them from the Hub")
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and _plain(entry.name) in task.folders:
            return entry
    splits = ("train", *task.dev_splits, *task.test_splits)
    names = {f"{name}.tsv{end}" for split in splits for name in _FILE_NAMES[split][0] for end in _COMPRESSIONS}
    if any((path / name).is_file() for name in names):
        return path
    raise DataError(f"{source} has no folder {task.title}, nor {task.title}'s files themselves")


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _looks_like_hub(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).parent.is_dir()


def _features(task: GlueTask, labelled: bool) -> Features:
    columns = {name: Value("string") for name in ("index", "first", "second")}
    if labelled:
        columns["label"] = Value("float64" if task.is_regression else "int64")
    return Features(columns)


def _tables(rows: Iterator[Sequence[Any]], task: GlueTask, labelled: bool) -> Iterator[pa.Table]:
    schema = _features(task, labelled).arrow_schema
    held: list[Sequence[Any]] = []
    for row in rows:
        held.append(row)
        if len(held) == _ROWS_PER_TABLE:
            yield _table(held, schema)
            held = []
    if held:
        yield _table(held, schema)


def _table(rows: list[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    columns = [list(column) for column in zip(*rows, strict=True)]
    return pa.table(columns[: len(schema)], names=schema.names)


def _rows(path: Path, task: GlueTask, labelled: bool, skip_malformed: bool) -> Iterator[Sequence[Any]]:
    """Yield (index, first, second, label) of every row."""
    layout: _Layout | None = None
    skipped: list[int] = []
    num_rows = 0
    malformed: Counter[str] | None = Counter() if skip_malformed else None
    for number, line in _lines(path, malformed):
        if not line:
            continue
        cells = line.split("\t")
        if layout is None:
            layout, is_header = _layout_of(path, cells, task, labelled)
            if is_header:
                continue
        if len(cells) != layout.num_columns:
            if not skip_malformed:
                raise DataError(
                    f"{path}, line {number}: {layout.num_columns} columns expected; got {len(cells)}; "
                    "--skip-malformed leaves such rows out"
                )
            skipped.append(number)
            continue
        where = f"{path}, line {number}"
        yield (
            str(num_rows) if layout.index is None else cells[layout.index],
            cells[layout.first],
            "" if layout.second is None else cells[layout.second],
            None if layout.label is None else _label(cells[layout.label], task, where),
        )
        num_rows += 1
    if skipped:
        logger.warning("%s: %d malformed rows are left out, first in line %d", path, len(skipped), skipped[0])
    if left_out := described_malformed(malformed or {}):
        logger.warning("%s: %s", path, left_out)


def _lines(path: Path, malformed: Counter[str] | None) -> Iterator[tuple[int, str]]:
    """Numbered lines without their end, one at a time."""
    compression = _COMPRESSIONS[path.suffix if path.suffix != ".tsv" else ""]
    try:
        chunks = decoded_chunks(path, compression, size=_CHUNK)
        # Only "\n" ends a line: some sentences hold other characters that Python takes for one.
        for number, line in numbered_lines(path, chunks, b"\n", _LONGEST_LINE, "one row per line expected", malformed):
            try:
                yield number, _decoded(path, number, line, compression)
            except MalformedError as fault:
                leave_out(fault, malformed)
    except OSError as error:
        raise DataError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from error


def _decoded(path: Path, number: int, line: bytes, compression: str | None) -> str:
    if number == 1:
        if what := other_kind(line):
            raise DataError(f"{path} is not plain text but {what}")
        line = line.removeprefix(codecs.BOM_UTF8)
    if b"\0" in line:
        raise MalformedError("zero_byte", f"{path}, line {number}: a zero byte; {_SKIPPING}")
    try:
        return line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        head = next(decoded_chunks(path, compression, size=_HEAD))
        message = f"{path} is not UTF-8 text: {error.reason} in line {number}; {remedy_for(error, head, _SKIPPING)}"
        raise MalformedError("bad_byte", message) from None


@dataclass(frozen=True)
class _Layout:
    """Where in a row everything stands."""

    num_columns: int
    first: int
    second: int | None
    label: int | None
    index: int | None


def _layout_of(path: Path, cells: list[str], task: GlueTask, labelled: bool) -> tuple[_Layout, bool]:
    """Find the columns, from the names in the first line or, when it has none, from the number of its cells."""
    wanted = {*task.first, *task.second, *task.label, "index"}
    is_header = not wanted.isdisjoint(cells) and not _has_a_label(cells, task)
    names: Sequence[str] = cells
    if not is_header:
        if len(cells) not in task.without_header:
            known = [f"{len(columns)} ({', '.join(columns)})" for columns in task.without_header.values()]
            without = f", or {' or '.join(known)} columns without names" if known else ""
            raise DataError(
                f"{path}, line 1: expected the columns' names, {task.first[0]!r} among them{without}; "
                f"got {len(cells)} columns, first {cells[0][:40]!r}"
            )
        names = task.without_header[len(cells)]
    layout = _Layout(
        num_columns=len(names),
        first=_column(path, names, task.first),
        second=_column(path, names, task.second) if task.second else None,
        label=_column(path, names, task.label) if labelled else None,
        index=next((names.index(name) for name in ("index", "id") if name in names), None),
    )
    return layout, is_header


def _has_a_label(cells: list[str], task: GlueTask) -> bool:
    """Whether a line is a row of a file without names: a sentence may be the word "sentence", a label is no name."""
    names = task.without_header.get(len(cells), ())
    return any(name in task.label and cell in task.classes for name, cell in zip(names, cells, strict=False))


def _column(path: Path, names: Sequence[str], wanted: Sequence[str]) -> int:
    for name in wanted:
        if name in names:
            return names.index(name)
    shown = ", ".join(map(repr, names))
    raise DataError(f"{path} has no column {wanted[0]!r}; it has {shown}{did_you_mean(wanted[0], names)}")


def _label(cell: str, task: GlueTask, where: str) -> float | int:
    if not task.is_regression:
        if cell in task.classes:
            return task.classes.index(cell)
        _refuse_label(cell, where, f"one of {', '.join(task.classes)}")
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        _refuse_label(cell, where, "a number from 0 to 5")
    return score


def _refuse_label(cell: str, where: str, expected: str) -> NoReturn:
    raise DataError(f"{where}: the label must be {expected}; got {cell[:40]!r}")


def _from_hub(task: GlueTask, name: str, split: str) -> Dataset:
    """The same columns, from the Hub's copy; -1 stands for a test's missing label there."""
    from datasets import load_dataset

    try:
        loaded: Any = load_dataset(name, task.name, split=_FILE_NAMES[split][1])
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"cannot fetch {task.title} from {name} on the Hugging Face Hub: {reason}{why_offline()}"
        ) from error
    names = loaded.column_names
    first, second = (
        next((column for column in wanted if column in names), None) for wanted in (task.first, task.second)
    )
    if first is None or (task.second and second is None):
        raise DataError(f"{name} has no column {task.first[0]!r} for {task.title}; it has {', '.join(names)}")
    index = loaded["idx"] if "idx" in names else range(len(loaded))
    columns: dict[str, Any] = {
        "index": [str(number) for number in index],
        "first": loaded[first],
        "second": [""] * len(loaded) if second is None else loaded[second],
    }
    labelled = not split.startswith("test")
    if labelled:
        columns["label"] = loaded["label"]
    return Dataset.from_dict({key: list(values) for key, values in columns.items()}, features=_features(task, labelled))
