"""What every part of the package does with files: written whole or not at all, and told of in one line.

A file or a folder is written under another name beside its place, flushed to disk, renamed, and the folder around it
flushed: a crash at any moment leaves the old content or the new, never half of it. What is written is readable by whom
the umask says. Tidying up after an error never hides the error.

    write_text(run_dir / "recipe.yaml", text)
    with written_file("vectors.npy") as file:
        np.save(file, vectors)
    with written_directory(run_dir / "model") as staging:
        model.save_pretrained(staging)

Two writers of one file do each other no harm; a folder has one writer at a time (locks.py).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import os
import platform
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cottention.errors import CottentionError

IGNORE_INDEX = -100
"""The label of a position that has none, as in torch's and transformers' losses."""

_LONGEST_NAME = 255  # bytes, on every file system in use
_count = itertools.count()


def usable_cores() -> int:
    """The cores this process may use; in a container or a SLURM job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_line(what: BaseException | str, limit: int = 200) -> str:
    """A reason for a message that must stay one line.

    Args:
        what: a text: its lines are joined; an exception: the system's reason, or the first line of its text, or its
            type where it says nothing.
        limit: characters of an exception's text at most; it may quote whole files.
    """
    if isinstance(what, str):
        return " ".join(what.split())
    if isinstance(what, OSError) and what.errno and what.strerror:
        text = what.strerror
    else:
        text = next((line.strip() for line in str(what).splitlines() if line.strip()), type(what).__name__)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class WholeFile(io.RawIOBase):
    """A binary file that has another name until `finish`; `abandon` takes it away. Its content is hashed on the way.

    A link is followed. What is no regular file (a pipe, /dev/null) cannot be replaced and is written as it comes.
    """

    def __init__(self, path: str | os.PathLike[str], *, partial: Path | None = None) -> None:
        """Open it.

        Args:
            path: its name.
            partial: the name it has until then, where a folder has one writer; None: a new one beside it.

        Raises:
            OSError: it cannot be written there; its filename is `path`.
        """
        self.path = Path(os.path.realpath(path))
        self.num_bytes = 0
        self._given = os.fspath(path)
        self._digest = hashlib.sha256()
        self._partial: Path | None = None
        with _named(self._given):
            if _is_special(self.path):
                self._file = self.path.open("wb", buffering=0)
            else:
                self._partial = partial or _partial_name(self.path)
                self._file = self._partial.open("wb", buffering=0)

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._digest.hexdigest()

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes; all of them."""
        view = memoryview(data).cast("B")
        written = 0
        with _named(self._given):
            while written < len(view):  # the system may take less at a time, and tells a full disk at the next
                written += self._file.write(view[written:]) or 0
        self._digest.update(view)
        self.num_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written."""
        return self.num_bytes

    def finish(self) -> None:
        """Flush it to disk and give it its name.

        Raises:
            OSError: no space; what had the name before is intact.
        """
        with _named(self._given):
            if self._partial is None:
                self._file.close()
                return
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self.path)
            flush(self.path.parent)

    def abandon(self) -> None:
        """Take away what was written, if it has no name yet; raises nothing."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._partial is not None:
            with contextlib.suppress(OSError):
                self._partial.unlink()


@contextlib.contextmanager
def written_file(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Give a binary file, a `WholeFile`, to write, which gets its name when the block ends well and vanishes otherwise.

    Raises:
        OSError: it cannot be written; its filename is `path`.
    """
    file = WholeFile(path)
    try:
        yield file
        file.finish()
    finally:
        file.abandon()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a text file in one step.

    File names that are not UTF-8 reach Python as lone surrogates; they are written as backslash escapes, which JSON
    reads back.

    Raises:
        OSError: it cannot be written; its filename is `path`.
    """
    with written_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def written_directory(target: Path, *, staging: Path | None = None) -> Iterator[Path]:
    """Give a new directory to write into, which becomes `target` when the block ends well and vanishes otherwise.

    Whatever `target` was before is replaced, and stays until the new content is complete on disk. What a killed writer
    left, the next one on the same machine clears up.

    Args:
        target: the directory to make; the folder around it is made where it is missing.
        staging: where to write meanwhile, on the same file system, in a folder with one writer; None: beside it.

    Raises:
        OSError: it cannot be written.
    """
    target = target.absolute()
    settle(target)
    staging = staging or _beside(target, "partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        _open_to_readers(staging)
        _flush_tree(staging)
        _put_in_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def settle(target: Path) -> None:
    """Take away what killed writers of a directory left beside it, and bring back what one had moved aside."""
    if not target.parent.is_dir():
        return
    for what in ("partial", "replaced"):
        for left in _left_by_the_dead(target.parent, f".{target.name}.{what}-{platform.node()}-"):
            if what == "replaced" and not target.exists():
                # Killed between its two renames: what was there before is the only complete content.
                left.rename(target)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
    else:
        # Two renames: a directory cannot replace a full one. Both are complete on disk in between.
        replaced = _beside(target, "replaced")
        target.rename(replaced)
        try:
            staging.rename(target)
        except OSError:
            replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    flush(target.parent)


def check_writable(path: str | os.PathLike[str], what: str) -> None:
    """Find out that a file can be written, before the work that it is for.

    Args:
        path: where it will be.
        what: how a user named it, e.g. "--output".

    Raises:
        CottentionError: it cannot; one line with the reason.
    """
    name = os.fspath(path)
    check_name(name, what)
    try:
        if not _is_special(Path(name)):
            WholeFile(name).abandon()
        elif not os.access(name, os.W_OK):  # opening a pipe would be a first word to its reader
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise CottentionError(f"{what}: cannot write {name}: {one_line(error)}") from error


def check_name(name: str, what: str) -> None:
    """Refuse what no file can be called.

    Raises:
        CottentionError: the name is empty or holds a zero byte.
    """
    if not name:
        raise CottentionError(f"{what} must have a name; got ''")
    if "\0" in name:
        raise CottentionError(f"{what} must be a file name, which holds no zero byte; got {name!r}")


def flush(path: Path) -> None:
    """fsync a file or a directory: only then a rename cannot overtake the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def _open_to_readers(directory: Path) -> None:
    # safetensors makes its files readable by their owner alone; what is finished is for whoever may enter the folder.
    mode = stat.S_IMODE(directory.stat().st_mode) & 0o666
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _beside(target: Path, what: str) -> Path:
    # The machine's name, because process ids mean nothing to another machine on the same file system.
    return target.with_name(f".{target.name}.{what}-{platform.node()}-{os.getpid()}")


def _partial_name(path: Path) -> Path:
    """A new name beside a file; what processes that are dead have left of the same file is removed on the way."""
    room = _LONGEST_NAME - len(os.fsencode(f"..partial-{platform.node()}-{2**32}-{2**32}.partial"))
    prefix = f".{os.fsdecode(os.fsencode(path.name)[:room])}.partial-{platform.node()}-"
    for left in _left_by_the_dead(path.parent, prefix):
        with contextlib.suppress(OSError):
            left.unlink()
    return path.with_name(f"{prefix}{os.getpid()}-{next(_count)}.partial")


def _left_by_the_dead(folder: Path, prefix: str) -> list[Path]:
    """Entries of a folder that are named `prefix` and a process of this machine that is dead."""
    left = []
    for entry in folder.iterdir():
        process_id = entry.name.removeprefix(prefix).partition("-")[0] if entry.name.startswith(prefix) else ""
        if process_id.isdigit() and not _is_running(int(process_id)):
            left.append(entry)
    return left


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _is_special(path: Path) -> bool:
    """Whether a path is something else than a file, which cannot be replaced by one.

    Raises:
        OSError: it is a directory, or cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    return not stat.S_ISREG(mode)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Let the system's errors name the file that a user knows: not the partial one, nor none at all."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = path, None
        raise
