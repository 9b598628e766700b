"""One writer per output directory: a lock that every command takes on the directory that it writes.

The lock is the system's (flock) on a file `.lock`, so it ends with its process, however that dies: what a killed run or
a dead job has left stands in nobody's way. The file says who holds it. All processes of one torchrun are one writer:
the first holds the lock for them.

    with sole_writer(Path("runs/two")):         # makes the directory; takes it away again if it stays empty
        ...

NFS passes these locks to its server (Linux, NFSv3 with lockd and NFSv4) and Lustre does when mounted with -o flock;
mounts with local_lock or nolock keep them to one machine, where a second machine is not noticed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cottention.errors import CottentionError
from cottention.files import check_name
from cottention.logging import get_logger

LOCK = ".lock"
"""Name of the lock's file."""

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_held: dict[str, tuple[int, int]] = {}  # real path of a lock's file -> its descriptor, the thread that took it

logger = get_logger(__name__)


class InUseError(CottentionError):
    """Another process writes the same directory."""


@contextlib.contextmanager
def sole_writer(directory: Path, *, beside: bool = False, nested: bool = False) -> Iterator[None]:
    """Hold the lock of an output directory.

    Args:
        directory: made where it is missing, its parents too; those made here are removed again when they stay empty.
        beside: the lock lies beside the directory, which is not made: for one that appears only when it is complete.
        nested: do nothing where this thread holds the lock already.

    Raises:
        InUseError: another process, or another thread, holds it.
        OSError: the directory cannot be made or written.
    """
    check_name(os.fspath(directory), "the output directory")
    folder = directory.absolute().parent if beside else directory.absolute()
    lock = folder / (f".{directory.absolute().name}{LOCK}" if beside else LOCK)
    key = os.path.realpath(lock)
    if int(os.environ.get("RANK", "0")) > 0 or (nested and _held.get(key, (0, 0))[1] == threading.get_ident()):
        yield
        return
    made = _make(folder)
    try:
        descriptor = _locked(lock, directory)
        _held[key] = (descriptor, threading.get_ident())
        try:
            yield
        finally:
            if _held.pop(key, None) is not None:  # None in a forked process, which gives nothing back
                with contextlib.suppress(OSError):
                    lock.unlink()
                os.close(descriptor)
    finally:
        for one in made:
            with contextlib.suppress(OSError):
                one.rmdir()


def _make(folder: Path) -> list[Path]:
    """Make a directory and those around it; return the new ones, the innermost first."""
    missing = []
    for one in (folder, *folder.parents):
        if one.exists():
            break
        missing.append(one)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _locked(lock: Path, directory: Path) -> int:
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)  # which a writer that just ended may have taken away
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer that just ended may have removed the file that we opened: then this locks out nobody to come.
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                _sign(descriptor, directory)
                return descriptor
        except BlockingIOError:
            holder = _described(descriptor)
            os.close(descriptor)
            raise InUseError(f"{directory} is being written by {holder}; wait for it, or choose another") from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            logger.warning(
                "the file system of %s has no locks: nothing keeps a second writer out of %s", lock, directory
            )
            return descriptor
        os.close(descriptor)


def _sign(descriptor: int, directory: Path) -> None:
    """Write down who holds the lock, for those who are refused."""
    before = _content(descriptor)
    if before.get("host") not in (None, platform.node()):
        # It ended without tidying up. Whether it lives is for the system's lock to know, if that reaches so far.
        logger.warning(
            "%s was being written by process %s on host %s since %s, which left without a word; if it still runs, the "
            "file system does not pass locks between machines: stop one of the two",
            directory,
            before.get("pid"),
            before.get("host"),
            before.get("since"),
        )
    holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _described(descriptor: int) -> str:
    holder = _content(descriptor)
    if not {"pid", "host", "since"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on host {holder['host']} since {holder['since']}"


def _content(descriptor: int) -> dict[str, object]:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _forget() -> None:
    """A forked process holds nothing: else a worker that outlives its parent would keep the lock."""
    for descriptor, _thread in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
