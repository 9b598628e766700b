"""Tables written once to disk, then memory-mapped: how corpora and windows stay out of RAM.

A producer yields Arrow tables of some megabytes; they are appended to one file in the datasets cache, under a name made
from everything that decides its content. The same request later maps the file that is there. `datasets` could write
such a file from a generator of rows; whole tables are quicker by far, and an error keeps its own type and message.
A file appears under its name only when it is complete (written beside, then renamed), so a killed run leaves no half of
a corpus behind, and two processes that build the same file do no harm.

    dataset = cached_dataset(tables(), features, key=["corpus", 1, path])
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features
from datasets import config as datasets_config
from datasets.fingerprint import Hasher

from cottention.errors import DataError


def cached_dataset(tables: Iterable[pa.Table], features: Features, *, key: Sequence[Any]) -> Dataset:
    """Write `tables` to the cache, unless the file of this key is there, and map it.

    Args:
        tables: what to write; not touched when the file exists. Each is cast to `features`.
        features: columns of the result.
        key: everything that decides the content, of plain types (paths, sizes, times, settings, a reader's version).

    Returns:
        A memory-mapped dataset with as many rows as came; its fingerprint follows from `key` alone.

    Raises:
        DataError: the cache cannot be written (no permission, no space).
    """
    fingerprint = Hasher.hash(list(key))
    path = Path(datasets_config.HF_DATASETS_CACHE) / "cottention" / f"{fingerprint}.arrow"
    if not path.is_file():
        _write(tables, features.arrow_schema, path)
    dataset = Dataset.from_file(str(path))
    # By default the fingerprint holds the file's time; the key says more and is the same on every machine and rank.
    dataset._fingerprint = fingerprint
    return dataset


def fingerprint_of(dataset: Dataset) -> str:
    """Name the dataset's content, for use in a key; `datasets` keeps it private although its own caches rest on it."""
    return dataset._fingerprint


def _write(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    with _writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            with _writing_to(path.parent):
                writer = pa.ipc.new_stream(file, schema)
            # Producing and writing are kept apart, so that an unreadable source is not reported as an unwritable cache.
            for table in tables:
                with _writing_to(path.parent):
                    writer.write_table(table.cast(schema))
            with _writing_to(path.parent):
                writer.close()
                file.flush()
                os.fsync(file.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _writing_to(folder: Path):
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write to the cache {folder}: {reason}; HF_DATASETS_CACHE chooses another") from error
