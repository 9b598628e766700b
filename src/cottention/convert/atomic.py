"""Writes a whole directory or nothing: beside the destination first, flushed to disk, then renamed into place.

with written_whole(Path("models/bert"), overwrite=False) as partial:
    model.save_pretrained(partial)
"""

from __future__ import annotations

import os
import platform
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cottention.errors import CheckpointError


@contextmanager
def written_whole(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a directory to write into; it becomes `destination` when the block ends without an exception.

    What was at `destination` stays untouched until the new content is complete on disk. A process that is killed
    leaves a hidden directory beside it, which the next call on the same machine clears up.

    Raises:
        CheckpointError: `destination` holds something and `overwrite` is not set, or it holds no model.
    """
    check_destination(destination, overwrite=overwrite)
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(destination, "partial")
    partial.mkdir()
    try:
        yield partial
        _open_to_readers(partial)
        _flush(partial)
        _put_in_place(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Clear up after killed calls, then refuse a destination that must not be replaced.

    Raises:
        CheckpointError: see `written_whole`.
    """
    _clear_leftovers(destination.absolute())
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; expected the directory to write")
    if not overwrite:
        raise CheckpointError(f"{destination} exists already; pass --overwrite (overwrite=True) to replace it")
    if not (destination / "config.json").is_file():
        # --overwrite replaces a model. A home directory named by mistake must survive it.
        raise CheckpointError(f"{destination} is not a model directory (no config.json): not replaced")


def _beside(destination: Path, what: str) -> Path:
    return destination.parent / f"{_leftover_prefix(destination, what)}{os.getpid()}"


def _leftover_prefix(destination: Path, what: str) -> str:
    # The machine's name, because process ids mean nothing to another machine on the same file system.
    return f".{destination.name}.{what}-{platform.node()}-"


def _clear_leftovers(destination: Path) -> None:
    if not destination.parent.is_dir():
        return
    for entry in list(destination.parent.iterdir()):
        for what in ("partial", "replaced"):
            process_id = entry.name.removeprefix(_leftover_prefix(destination, what))
            if process_id == entry.name or not process_id.isdigit() or _is_running(int(process_id)):
                continue
            if what == "replaced" and not destination.exists():
                # Killed between its two renames: what was there before is the only complete content.
                entry.rename(destination)
            else:
                shutil.rmtree(entry, ignore_errors=True)


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _open_to_readers(directory: Path) -> None:
    # safetensors makes its files readable by their owner alone; a model is for whoever may enter the directory.
    mode = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _flush(directory: Path) -> None:
    for path in [*(entry for entry in directory.rglob("*") if entry.is_file()), directory]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, destination: Path) -> None:
    replaced = _beside(destination, "replaced")
    if destination.exists() and any(destination.iterdir()):
        # Two renames: a directory cannot replace a full one. Both are complete on disk in between.
        destination.rename(replaced)
    try:
        partial.rename(destination)
    except OSError:
        if replaced.exists():
            replaced.rename(destination)
        raise
    _fsync(destination.parent)
    shutil.rmtree(replaced, ignore_errors=True)
