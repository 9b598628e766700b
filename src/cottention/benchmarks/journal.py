"""What a long run has found so far, on disk: a line for each finished piece, so that an interruption loses at most one.

The file is named after what is measured and on what, so that a run that is started again finds its own and goes on,
and one with other settings, or after a change of the code that is measured, does not.

    with Journal.open(directory, {"settings": ..., "environment": ...}) as journal:
        for piece in journal.pieces("memory"): ...
        journal.add("memory", {...})
        journal.finish()                            # what it holds is in the report now
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from cottention.errors import CottentionError, SettingsError
from cottention.files import one_line, write_text
from cottention.locks import sole_writer
from cottention.logging import get_logger

_REPORTS = ("attention.json", "decode.json", "model.json", "gated_delta.json", "figures.json", "unfinished-*.jsonl")

_logger = get_logger(__name__)


class Journal:
    """Finished pieces of one run, by kind."""

    def __init__(self, path: Path | None, pieces: list[tuple[str, dict]]) -> None:
        self._path = path
        self._pieces = pieces
        self._file = None if path is None else path.open("a")

    @classmethod
    def open(cls, directory: Path, identity: dict) -> Journal:
        """The journal of this run in a directory: that of an earlier try, or a new one."""
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"unfinished-{digest}.jsonl"
        pieces = _read(path) if path.exists() else []
        if pieces:
            _logger.info("going on with %s: %d pieces are measured already", path, len(pieces))
        return cls(path, pieces)

    @classmethod
    def nowhere(cls) -> Journal:
        """One that is kept in memory alone."""
        return cls(None, [])

    def pieces(self, kind: str) -> list[dict]:
        """All that were added with this kind, now or by an earlier try."""
        return [piece for each, piece in self._pieces if each == kind]

    def add(self, kind: str, piece: dict) -> None:
        """Keep a piece; it is on disk when this returns."""
        self._pieces.append((kind, piece))
        if self._file is not None:
            try:
                self._file.write(_line(kind, piece))
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise CottentionError(f"cannot write {self._path}: {one_line(error)}") from error

    def finish(self) -> None:
        """Remove the file: the report holds everything."""
        self._pieces.clear()

    def __enter__(self) -> Journal:
        """Open until the end of the block."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the file, which waits for the next try unless it is finished or empty."""
        if self._file is not None and self._path is not None:
            self._file.close()
            if not self._pieces:
                self._path.unlink()


def _read(path: Path) -> list[tuple[str, dict]]:
    """The pieces that are as they were written; the others are taken out of the file, and measured again."""
    lines = path.read_bytes().splitlines(keepends=True)
    pieces = [piece for line in lines if (piece := _piece(line)) is not None]
    if len(pieces) < len(lines):
        write_text(path, "".join(_line(kind, piece) for kind, piece in pieces))
        # The machine may have stopped while the last one was written; before it, something else happened.
        if any(_piece(line) is None for line in lines[:-1]):
            _logger.warning("%s: %d damaged pieces are measured again", path, len(lines) - len(pieces))
    return pieces


def _line(kind: str, piece: dict) -> str:
    return json.dumps([kind, piece, _checksum(kind, piece)]) + "\n"


def _piece(line: bytes) -> tuple[str, dict] | None:
    try:
        kind, piece, checksum = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    is_whole = line.endswith(b"\n") and isinstance(piece, dict) and checksum == _checksum(kind, piece)
    return (kind, piece) if is_whole else None


def _checksum(kind: str, piece: dict) -> str:
    return hashlib.sha256(json.dumps([kind, piece]).encode()).hexdigest()[:16]


@contextmanager
def report_directory(directory: Path) -> Iterator[None]:
    """Be the only one who writes reports into a directory, before anything is measured.

    Raises:
        SettingsError: it holds something else than reports.
        InUseError: another process writes there.
        OSError: it cannot be written.
    """
    with sole_writer(directory):
        names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
        if names and not any(fnmatch(name, ours) for name in names for ours in _REPORTS):
            raise SettingsError(
                f"{directory} holds {names[0]} but no report of a benchmark; choose another --output-dir"
            )
        yield


def write_texts(texts: dict[str, str], directory: Path) -> list[Path]:
    """Write files, name -> text, each beside and then renamed: none is ever half there."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in texts.items():
        paths.append(directory / name)
        write_text(paths[-1], f"{text}\n")
    return paths
