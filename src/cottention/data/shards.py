"""Corpora as directories: shards of memory-mapped Arrow and a manifest that says what is in them.

    corpus = open_corpus("corpora/wiki")
    corpus.kind, corpus.dataset[0], corpus.manifest["counts"]

    manifest.json         kind, settings (sources with their hashes among them), counts, shards; written last
    shard-00000.arrow     the format of `Dataset.from_file`; written beside, renamed when complete
    tokenizer/            where the rows are tokens

A directory without a manifest is no corpus. The manifest has the SHA-256 of shards, of the tokenizer's files and of
itself, which are compared when the corpus is opened; a shard is read for that once on a machine.

While a corpus is built it holds progress.json: the settings, and which shards are done after how many tasks. The same
command goes on from there, and its result is, byte for byte, that of a build never interrupted; another command does
not touch it. A lock keeps two builds out of one directory.

    with CorpusWriter(path, kind="bert-sentences", features=FEATURES, settings=settings) as writer:
        for table, counts in results_from(writer.num_tasks):
            writer.add(table, counts)
        writer.finish()
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, concatenate_datasets
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from cottention.data.corpus_seal import (
    MANIFEST,
    TOKENIZER,
    check_content,
    check_manifest,
    check_size,
    is_sealed,
    sealed,
    tokenizer_files,
)
from cottention.data.tokenizer_files import save_tokenizer
from cottention.errors import DataError, SettingsError, did_you_mean
from cottention.files import WholeFile, one_line, write_text
from cottention.locks import LOCK, sole_writer

KINDS = {
    "bert-sentences": "cottention data build bert",
    "bert-pairs": "cottention data tokenize bert",
    "gpt-text": "cottention data build gpt",
    "gpt-tokens": "cottention data tokenize gpt",
}
"""What a corpus directory can hold -> the command that makes one."""

FORMAT_VERSION = 1
SHARD_BYTES = 128 << 20
"""Size of a shard: what an interrupted build has to do again at most."""

_PROGRESS = "progress.json"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus on disk."""

    path: Path
    """Its directory."""
    kind: str
    """One of KINDS."""
    manifest: dict[str, Any]
    """Settings, counts, shards."""
    dataset: Dataset
    """All rows, memory-mapped, in their order."""

    @property
    def tokenizer_path(self) -> Path | None:
        """The directory of the tokenizer that made the tokens; None where there are none."""
        path = self.path / TOKENIZER
        return path if path.is_dir() else None


def is_corpus(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is the directory of a finished corpus."""
    return (Path(path).expanduser() / MANIFEST).is_file()


def kind_of(path: str | os.PathLike[str]) -> str:
    """The kind of a finished corpus, one of KINDS; nothing but its manifest is read.

    Raises:
        DataError: it is of another version of cottention.
    """
    folder = Path(path).expanduser()
    return _kind(folder, _read_json(folder / MANIFEST))


def _kind(folder: Path, manifest: Mapping[str, Any]) -> str:
    found = manifest.get("kind")
    if found not in KINDS or manifest.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{folder} is a corpus of another version of cottention; build it again")
    return found


def open_corpus(path: str | os.PathLike[str], *, kind: str | None = None) -> Corpus:
    """Open a corpus.

    Args:
        path: the directory that a `cottention data` command wrote.
        kind: one of KINDS that it must be.

    Raises:
        DataError: there is none, it is unfinished, damaged, or of another kind; one line with the remedy.
    """
    folder = Path(path).expanduser()
    if not is_corpus(folder):
        raise DataError(_no_corpus(folder))
    manifest = _read_json(folder / MANIFEST)
    found = _kind(folder, manifest)
    if kind is not None and found != kind:
        raise DataError(
            f"{folder} holds {found}, made by `{KINDS[found]}`; {kind} is needed here, made by `{KINDS[kind]}`"
        )
    try:
        shards = manifest["shards"]
        check_manifest(folder, manifest)
        if manifest.get("tokenizer_files") and not (folder / TOKENIZER).is_dir():
            raise DataError(f"{folder} has no tokenizer/; tokenise the text again")
        for shard in shards:
            check_size(folder / shard["name"], shard)
        check_content(folder, manifest)
        parts = [_mapped(folder / shard["name"], shard) for shard in shards]
    except KeyError as error:
        raise DataError(f"{folder / MANIFEST} is damaged: {error} is missing; build the corpus again") from error
    except (TypeError, AttributeError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged: {error}; build the corpus again") from error
    if not parts:
        raise DataError(f"{folder / MANIFEST} is damaged: it names no shards; build the corpus again")
    dataset = concatenate_datasets(parts)
    # By default a fingerprint holds the files' names and times; the manifest says more, and the same everywhere.
    dataset._fingerprint = Hasher.hash(["corpus", manifest])
    return Corpus(path=folder, kind=found, manifest=manifest, dataset=dataset)


def check_corpus(path: str | os.PathLike[str]) -> bool:
    """Read all of a corpus and compare it with its hashes; False where an older version wrote it without.

    Raises:
        DataError: it is damaged, see `open_corpus`.
    """
    folder = Path(path).expanduser()
    open_corpus(folder)
    manifest = _read_json(folder / MANIFEST)
    check_content(folder, manifest, afresh=True)
    return is_sealed(manifest)


def check_corpus_directory(directory: str | os.PathLike[str]) -> None:
    """Find out that a corpus can be written into a directory, before any text is read for it.

    Raises:
        DataError: it cannot be written, or holds something else.
        InUseError: another build is at work there.
    """
    folder = Path(directory)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(sole_writer(folder))
        except OSError as error:
            raise DataError(f"cannot write {folder}: {one_line(error)}") from error
        _refuse_strangers(folder)


def _refuse_strangers(folder: Path) -> None:
    strange = [entry.name for entry in folder.iterdir() if not _is_ours(entry.name)]
    if strange and not any((folder / name).is_file() for name in (MANIFEST, _PROGRESS)):
        raise DataError(f"{folder} is not empty (it holds {strange[0]!r}); choose another directory")


class CorpusWriter:
    """Writes a corpus directory, or goes on with one.

    Args:
        directory: to write; made where it is missing.
        kind: one of KINDS.
        features: columns of the rows.
        settings: everything that decides the rows, of JSON's types; a build goes on only under the same.
        overwrite: remove the corpus that is there, finished or not.
        shard_bytes: size at which a shard is complete.

    Raises:
        DataError: another build is at work there, the directory holds something else, or cannot be written.
        SettingsError: what is there was made under other settings.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        kind: str,
        features: Features,
        settings: Mapping[str, Any],
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        assert kind in KINDS
        self.directory = Path(directory).expanduser()
        self.schema = features.arrow_schema
        self.shard_bytes = shard_bytes
        self.header = {"kind": kind, "format_version": FORMAT_VERSION, "settings": dict(settings)}
        self.num_tasks = 0
        """Tasks whose rows are in finished shards: where to go on."""
        self.counts: Counter[str] = Counter()
        self.shards: list[dict[str, Any]] = []
        self.is_finished = False
        """The corpus is there already, complete."""
        self._tasks_added = 0
        self._counts_added: Counter[str] = Counter()
        self._shard: _Shard | None = None
        with contextlib.ExitStack() as held, self._writing():
            held.enter_context(sole_writer(self.directory))
            self._take_up(overwrite)
            self._held = held.pop_all()

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.abandon()
        self._held.close()

    @property
    def num_rows(self) -> int:
        """Rows in finished shards."""
        return sum(shard["rows"] for shard in self.shards)

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer of the rows is to be saved."""
        return self.directory / TOKENIZER

    def add(self, table: pa.Table, counts: Mapping[str, int]) -> None:
        """Append the rows of one task."""
        self._tasks_added += 1
        self._counts_added.update(counts)
        with self._writing():
            if len(table):
                if self._shard is None:
                    self._shard = _Shard(self.directory / f"shard-{len(self.shards):05d}.arrow", self.schema)
                self._shard.write(table)
            if self._shard is not None and self._shard.num_bytes >= self.shard_bytes:
                self._close_shard()

    def save(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Save the tokenizer of the rows."""
        with self._writing():
            save_tokenizer(tokenizer, self.tokenizer_path)

    def finish(self, *, note: Mapping[str, Any] | None = None) -> None:
        """Complete the last shard and write the manifest.

        Args:
            note: more that the manifest shall say.

        Raises:
            DataError: there are no rows; the directory is left as it was found.
        """
        if self._shard is None and not self.shards:
            raise DataError(f"nothing is left of the text: {described_counts(self._counts_added)}")
        with self._writing():
            self._close_shard()
            manifest = {**self.header, **(note or {}), "counts": dict(self.counts), "rows": self.num_rows}
            manifest |= {"shards": self.shards, "tokenizer_files": tokenizer_files(self.tokenizer_path)}
            _write_json(self.directory / MANIFEST, sealed(manifest))
            (self.directory / _PROGRESS).unlink(missing_ok=True)
        self.is_finished = True

    def _take_up(self, overwrite: bool) -> None:
        """Find what is there: nothing, an interrupted build, a corpus, or something that is none of our business."""
        if overwrite:
            self._remove()
        state = next((name for name in (MANIFEST, _PROGRESS) if (self.directory / name).is_file()), None)
        if state is None:
            _refuse_strangers(self.directory)
            return
        before = _read_json(self.directory / state)
        what = "holds a finished corpus" if state == MANIFEST else "holds an interrupted build"
        if difference := _difference(self.header, before):
            raise SettingsError(
                f"{self.directory} {what} with {difference}; choose another directory, or overwrite this one"
            )
        self.is_finished = state == MANIFEST
        try:
            self.counts = Counter(before["counts"])
            self._counts_added = Counter(before["counts"])
            self.shards = list(before["shards"])
            self.num_tasks = self._tasks_added = int(before.get("num_tasks", 0))
            for shard in self.shards:
                check_size(self.directory / shard["name"], shard)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.directory / state} is damaged: {error!r}; remove the directory and build the corpus again"
            ) from error

    def _remove(self) -> None:
        if not any((self.directory / name).is_file() for name in (MANIFEST, _PROGRESS)):
            return
        (self.directory / MANIFEST).unlink(missing_ok=True)  # first: from here on it is no corpus
        for path in self.directory.iterdir():
            if path.name == TOKENIZER:
                shutil.rmtree(path)
            elif _is_ours(path.name) and path.name != LOCK:
                path.unlink()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self.shards = [*self.shards, self._shard.finish()]
            self._shard = None
        self.counts, self.num_tasks = Counter(self._counts_added), self._tasks_added
        progress = {**self.header, "counts": dict(self.counts), "num_tasks": self.num_tasks, "shards": self.shards}
        _write_json(self.directory / _PROGRESS, progress)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"cannot write {self.directory}: {one_line(error)}") from error


class _Shard:
    """One file of Arrow, under another name until it is complete."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self.num_rows = 0
        self.num_bytes = 0
        self.file = WholeFile(path, partial=path.with_suffix(".partial"))
        self.writer = pa.ipc.new_stream(self.file, schema)

    def write(self, table: pa.Table) -> None:
        self.writer.write_table(table.cast(self.schema))
        self.num_rows += len(table)
        self.num_bytes = self.file.tell()

    def finish(self) -> dict[str, Any]:
        self.writer.close()
        self.file.finish()
        file = self.file
        return {"name": file.path.name, "rows": self.num_rows, "bytes": file.num_bytes, "sha256": file.sha256}

    def abandon(self) -> None:
        self.file.abandon()


def described_counts(counts: Mapping[str, int]) -> str:
    """Counts in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items() if count) or "it is empty"


def _no_corpus(folder: Path) -> str:
    if (folder / _PROGRESS).is_file():
        command = KINDS.get(_read_json(folder / _PROGRESS).get("kind", ""), "the command that began it")
        return f"{folder} is an unfinished corpus; run `{command}` again with the same settings, and it goes on"
    if folder.is_dir():
        return f"{folder} is not a corpus directory: it has no {MANIFEST}; `cottention data build` makes one"
    if folder.exists():
        return f"{folder} is a file, not a corpus directory; `cottention data build` makes one of it"
    near = (
        did_you_mean(folder.name, [entry.name for entry in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
    )
    return f"no such corpus directory: {folder}{near}"


def _mapped(path: Path, shard: Mapping[str, Any]) -> Dataset:
    try:
        dataset = Dataset.from_file(str(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is damaged; build the corpus again") from error
    if len(dataset) != shard["rows"]:
        raise DataError(f"{path} is damaged: it has {len(dataset):,} rows of {shard['rows']:,}; build the corpus again")
    return dataset


def _is_ours(name: str) -> bool:
    return name in (MANIFEST, _PROGRESS, LOCK, TOKENIZER) or name.startswith("shard-") or name.endswith(".partial")


def _difference(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Say in what two headers differ, or nothing."""
    for name in ("kind", "format_version"):
        if now[name] != before.get(name):
            return f"{name} {before.get(name)!r} instead of {now[name]!r}"
    old = before.get("settings", {})
    for name in [*now["settings"], *old]:
        mine, its = now["settings"].get(name), old.get(name)
        if mine != its:
            return f"other {name}" if isinstance(mine, (list, dict)) else f"{name} {its!r} instead of {mine!r}"
    return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged: {one_line(error)}; remove the directory and build the corpus again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: no JSON object; remove the directory and build the corpus again")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
