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
from pathlib import Path

from cottention.logging import get_logger

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
            self._file.write(json.dumps([kind, piece]) + "\n")
            self._file.flush()

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
    pieces = []
    whole = path.read_text()
    for line in whole.splitlines(keepends=True):
        if not line.endswith("\n"):  # the machine stopped while it was written
            path.write_text(whole.removesuffix(line))
            break
        kind, piece = json.loads(line)
        pieces.append((kind, piece))
    return pieces


def write_texts(texts: dict[str, str], directory: Path) -> list[Path]:
    """Write files, name -> text, each beside and then renamed: none is ever half there."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in texts.items():
        beside = directory / f"{name}.partial"
        beside.write_text(f"{text}\n")
        paths.append(beside.replace(directory / name))
    return paths
