"""Tables written once to disk, then memory-mapped: how corpora and windows stay out of RAM.

A producer yields Arrow tables of some megabytes; they are appended to one file in the datasets cache, under a name made
from everything that decides its content. The same request later maps the file that is there. `datasets` could write
such a file from a generator of rows; whole tables are quicker by far, and an error keeps its own type and message.
A file appears under its name only when it is complete (written beside, then renamed), so half of a corpus is never
taken for all of it, and two processes that build the same file do no harm. Behind Arrow's end mark stands a hash of
the content, which is compared before the file is used: a damaged one is written anew. What a killed run has written
beside is removed by another run a day later.

    dataset = cached_dataset(tables(), features, key=["corpus", 1, path])
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features
from datasets import config as datasets_config
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable

from cottention.bars import progress
from cottention.data.parallel import ordered_map
from cottention.errors import DataError
from cottention.files import WholeFile
from cottention.logging import get_logger
from cottention.seals import file_damage

_SEAL = b"cottention seal\n"  # the SHA-256 of all that is before it follows
_DIGEST_BYTES = 32
_ABANDONED_S = 24 * 3600  # a run that is alive writes every few seconds

logger = get_logger(__name__)


def cached_dataset(tables: Iterable[pa.Table], features: Features, *, key: Sequence[Any]) -> Dataset:
    """Write `tables` to the cache, unless the file of this key is there, and map it.

    Args:
        tables: what to write; not touched when the file exists. Each is cast to `features`.
        features: columns of the result.
        key: everything that decides the content, of plain types (paths, sizes, times, settings, a reader's version).

    Returns:
        A memory-mapped dataset with as many rows as came; its fingerprint follows from `key` alone.

    Raises:
        DataError: the cache cannot be used (no permission, no space).
    """
    fingerprint = Hasher.hash(list(key))
    path = datasets_cache() / "cottention" / f"{fingerprint}.arrow"
    dataset = _mapped(path)
    if dataset is None:
        _write(tables, features.arrow_schema, path)
        dataset = Dataset.from_file(str(path))
    # By default the fingerprint holds the file's time; the key says more and is the same on every machine and rank.
    dataset._fingerprint = fingerprint
    return dataset


def cached_map(
    dataset: Dataset,
    work: Callable[[dict[str, list]], Mapping[str, Sequence]],
    features: Features,
    *,
    key: Sequence[Any],
    batch_size: int,
    num_proc: int | None = None,
) -> Dataset:
    """What `Dataset.map` does in batches, in a file of this cache: its own ones are damaged without a word.

    Args:
        dataset: rows to work on; of one that lies in memory, the result does too.
        work: makes columns of columns; picklable where there are several processes.
        features: columns of the result.
        key: everything that decides the content, see `cached_dataset`.
        batch_size: rows given to `work` at a time.
        num_proc: processes; None or 1 works in this one.

    Raises:
        DataError: the cache cannot be used.
    """

    def tables() -> Iterator[pa.Table]:
        batches: Any = dataset.with_format(None).iter(batch_size)
        with progress("Tokenising", "row", total=len(dataset), delay=3, leave=False) as bar:
            for columns in ordered_map(work, batches, num_proc=num_proc):
                table = pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names})
                yield table
                bar.update(len(table))

    schema = features.arrow_schema
    if dataset.cache_files:
        return cached_dataset(tables(), features, key=key)
    table = pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in tables())])
    return Dataset(InMemoryTable(table), fingerprint=Hasher.hash(list(key)))


def datasets_cache() -> Path:
    """Where `datasets` keeps what it has made."""
    return Path(datasets_config.HF_DATASETS_CACHE)


@contextlib.contextmanager
def temporary_cache() -> Iterator[None]:
    """Keep what is made inside in a cache of its own, which goes at the end: nothing is left on the disk."""
    usual = datasets_config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as folder:
        datasets_config.HF_DATASETS_CACHE = Path(folder)
        try:
            yield
        finally:
            datasets_config.HF_DATASETS_CACHE = usual


def fingerprint_of(dataset: Dataset) -> str:
    """Name the dataset's content, for use in a key; `datasets` keeps it private although its own caches rest on it."""
    return dataset._fingerprint


@contextlib.contextmanager
def using_cache() -> Iterator[None]:
    """Turn an OSError inside into one line on the cache."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise DataError(
            f"cannot use the cache {datasets_config.HF_DATASETS_CACHE}: {reason}; HF_DATASETS_CACHE chooses another"
        ) from error


def _mapped(path: Path) -> Dataset | None:
    with using_cache():
        if not path.is_file():
            return None
        problem = _damage(path)
        if problem is None:
            try:
                return Dataset.from_file(str(path))
            except (pa.ArrowInvalid, OSError) as error:
                if isinstance(error, PermissionError):
                    raise
                problem = "cannot be mapped"
        logger.warning("%s is damaged (it %s) and is written anew", path, problem)
        return None


def _damage(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - len(_SEAL) - _DIGEST_BYTES))
        seal = file.read()
    if not seal.startswith(_SEAL):
        return "has no seal at its end"
    digest, remember = seal.removeprefix(_SEAL).hex(), datasets_cache() / "cottention-intact"
    return file_damage(path, size, digest, num_hashed=size - len(seal), remember=remember)


def _write(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    with using_cache():
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        file = WholeFile(path, partial=path.with_name(f"{path.stem}-{uuid.uuid4().hex}.partial"))
    try:
        with using_cache():
            writer = pa.ipc.new_stream(file, schema)
        # Producing and writing are kept apart, so that an unreadable source is not reported as an unwritable cache.
        for table in tables:
            with using_cache():
                writer.write_table(table.cast(schema))
        with using_cache():
            writer.close()
            file.write(_SEAL + bytes.fromhex(file.sha256))
            file.finish()
    finally:
        file.abandon()


def _remove_abandoned(folder: Path) -> None:
    for partial in folder.glob("*.partial"):
        with contextlib.suppress(OSError):  # another run may be quicker
            if time.time() - partial.stat().st_mtime > _ABANDONED_S:
                partial.unlink()
