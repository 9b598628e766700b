"""Checkpoints that survive a crash: written beside, flushed to disk, renamed; read only after their checksums agree.

A checkpoint is a directory `checkpoint-STEP` whose MANIFEST.json lists every file with size and SHA-256. A directory
without a manifest, or with a file that differs from it, is damaged.

    with atomic_directory(folder / "checkpoint-200", sealed=True) as staging:
        ...write files into staging...
    newest = newest_intact_checkpoint(folder)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cottention.errors import CheckpointError
from cottention.logging import get_logger

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"checkpoint-[0-9]+")
_BLOCK_BYTES = 1 << 20

logger = get_logger(__name__)


@contextmanager
def atomic_directory(target: Path, *, sealed: bool) -> Iterator[Path]:
    """Give a new directory to write into, which becomes `target` when the block ends well, and vanishes otherwise.

    Whatever `target` was before is replaced. A crash at any moment leaves the old `target`, the new one or none, never
    a half-written one. The new directory already has its final name, below `staging_area(target.parent)`.

    Args:
        target: the directory to make.
        sealed: add a manifest, by which `damage` finds out later whether all is as it was written.
    """
    staging = staging_area(target.parent) / target.name
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if sealed:
            _write_manifest(staging)
        _flush_tree(staging)
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
        _flush(target.parent)
    finally:
        shutil.rmtree(staging.parent, ignore_errors=True)


def staging_area(folder: Path) -> Path:
    """Where directories on their way into `folder` are written."""
    return folder / ".writing"


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file in one step."""
    staging = path.with_name(f".writing-{path.name}")
    with staging.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)
    _flush(path.parent)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Report what keeps a file from being written (no space, no permission) in one line.

    Raises:
        CheckpointError: with the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from error
    except SafetensorError as error:
        raise _unwritable(folder, str(error)) from error
    except RuntimeError as error:
        # All that torch.save says about a full disk is where in its own code it noticed.
        if not any(sign in str(error) for sign in ("inline_container", "iostream error")):
            raise
        raise _unwritable(folder, "a file could not be written to its end, is the disk full?") from error


def _unwritable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"cannot write to {folder}: {reason}; what was saved before is intact")


def damage(folder: Path) -> str | None:
    """Say what is wrong with a sealed directory, in a few words; None when nothing is."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sealed = {folder / name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return f"{MANIFEST} cannot be read"
    for path, (num_bytes, digest) in sealed.items():
        name = path.relative_to(folder)
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != num_bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {num_bytes}"
        try:
            if _sha256(path) != digest:
                return f"{name} was changed after it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def newest_intact_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files are as they were written; report the damaged ones on the way.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("checkpoint %s is damaged (%s): trying the one before", path, problem)
    if checkpoints:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; --overwrite starts again")
    return None


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted save left behind."""
    for path in list_checkpoints(folder)[:-keep]:
        # Moved first, so that a crash while deleting leaves no checkpoint that looks damaged.
        doomed = staging_area(folder) / path.name
        doomed.parent.mkdir(exist_ok=True)
        path.rename(doomed)
    shutil.rmtree(staging_area(folder), ignore_errors=True)


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` updates."""
    return f"checkpoint-{step}"


def checkpoint_step(path: Path) -> int:
    """Updates that the checkpoint in a directory of this name has seen."""
    return int(path.name.rpartition("-")[2])


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def _flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """fsync a file or a directory: only then a rename cannot overtake the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
