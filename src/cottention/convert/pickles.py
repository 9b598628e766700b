"""Looks through a pickled .bin before torch opens it: one that would unpack to more than it holds is refused.

torch writes its archives uncompressed, a small pickle that says how tensors lie in them beside the tensors. A
compressed entry may be gigabytes of zeros in three megabytes, entries may share their bytes, and sixty bytes of pickle
may ask for two gigabytes by calling `bytearray`, which torch's restricted unpickler lets pass.

    check_archive(path)       # or check_legacy(path), for the layout before 2020
    tensors = torch.load(path, weights_only=True)
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from cottention.errors import CheckpointError

_MOST_PICKLE_BYTES = 16 << 20  # of a checkpoint of 1.2 billion parameters it has 100,000
_MOST_ENTRIES = 1 << 16
_CALLS_FOR_MEMORY = ("bytearray",)
_LEGACY_PICKLES = 5  # magic number, version, system, tensors, keys of storages


def check_archive(path: Path) -> None:
    """Look through the zip layout.

    Raises:
        CheckpointError: it would unpack to more than it holds.
        zipfile.BadZipFile: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > _MOST_ENTRIES:
            raise CheckpointError(f"{path} must have at most {_MOST_ENTRIES:,} entries; got {len(entries):,}")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path}: {entry.filename[:80]!r} is compressed, which torch never does: "
                    f"{entry.compress_size:,} bytes would become {entry.file_size:,}: refused"
                )
        total, size = sum(entry.file_size for entry in entries), path.stat().st_size
        if total > size:
            raise CheckpointError(f"{path}: its entries are {total:,} bytes, more than the file's {size:,}: refused")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                if entry.file_size > _MOST_PICKLE_BYTES:
                    raise CheckpointError(_too_large(path))
                with archive.open(entry) as file:
                    _check_pickle(path, _Limited(file))


def check_legacy(path: Path) -> None:
    """Look through the pickles at the head of the layout before zip.

    Raises:
        CheckpointError: they would make more than they hold.
    """
    with path.open("rb") as file:
        limited = _Limited(file)
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(path, limited)


class _TooLargeError(Exception):
    """More was asked for than a pickle of tensors has."""


class _Limited:
    """A file of which no more is read than the pickles of a checkpoint have."""

    def __init__(self, file: Any) -> None:
        self.file: BinaryIO = file
        self.left = _MOST_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise _TooLargeError
        return self.file.read(size)

    def readline(self) -> bytes:
        line = self.file.readline(self.left + 1)
        self.left -= len(line)
        if self.left < 0:
            raise _TooLargeError
        return line


def _check_pickle(path: Path, file: _Limited) -> None:
    try:
        for _, argument, _ in pickletools.genops(file):  # pyright: ignore[reportArgumentType]
            if isinstance(argument, str) and argument.rpartition(" ")[2] in _CALLS_FOR_MEMORY:
                raise CheckpointError(f"{path} calls {argument.rpartition(' ')[2]}, which no tensor needs: refused")
    except _TooLargeError:
        raise CheckpointError(_too_large(path)) from None
    except CheckpointError:
        raise
    except (ValueError, KeyError, IndexError, OverflowError):
        return  # damaged: the unpickler says so


def _too_large(path: Path) -> str:
    return f"{path}: its pickle is larger than {_MOST_PICKLE_BYTES >> 20} MiB, which none of tensors is: refused"
