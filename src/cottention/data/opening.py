"""Files to bytes: regular files alone, uncompressed bit by bit, never more than a small file can honestly hold.

A device or a pipe has no end, so only regular files are opened. gzip files may have several members and, as tapes and
tar leave it, zero bytes behind the last; zstd files may have several frames, skippable ones among them, and windows up
to 2 GiB (`zstd --long=31`, as Reddit dumps are written), which need as much memory.

    for chunk in decoded_chunks(Path("dump.jsonl.zst"), "zstd", size=1 << 20): ...
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from cottention.errors import DataError

FREE_BYTES = 1 << 30
"""Decoded bytes below which nobody asks how well a file was compressed."""
MOST_DECODED_RATIO = 100
"""Decoded bytes per byte of a file at most. Text reaches 10, logs and templates 40; files that are made to fill memory
or disks, hundreds and more."""

_LARGEST_WINDOW = 1 << 31  # the largest that zstd writes
_PIECE = 1 << 11  # compressed bytes handed over at a time: at worst, 64 MiB come out of them
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_KERNEL_FOLDERS = (Path("/proc"), Path("/sys"))  # their files have no size, some of them no end

_COMPRESSION_ERRORS = (zlib.error, zstandard.ZstdError)


def irregular_kind(path: Path) -> str | None:
    """Say what lies there if it is no regular file ("a pipe (FIFO)"), None for one; links are followed.

    Raises:
        OSError: nothing lies there, or it cannot be looked at.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        return next((what for is_kind, what in _KINDS if is_kind(mode)), "no regular file")
    resolved = path.resolve()
    if any(folder in resolved.parents for folder in _KERNEL_FOLDERS):
        return "a file of the kernel's"
    return None


def check_regular(path: Path) -> None:
    """Refuse to read what is no regular file, before it is opened: a device or a pipe would be read for ever.

    Raises:
        DataError: it is something else, or not there.
    """
    try:
        kind = irregular_kind(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from error
    if kind is not None:
        target = f" (a link to {path.resolve()})" if path.is_symlink() else ""
        raise DataError(f"cannot read {path}{target}: it is {kind}, and only regular files are read")


def decoded_chunks(path: Path, compression: str | None, *, size: int) -> Iterator[bytes]:
    """Yield the uncompressed bytes of a file, `size` of them at a time.

    Args:
        path: a regular file.
        compression: "gzip", "zstd", or None.
        size: bytes of a chunk; the last may be shorter.

    Raises:
        DataError: it is no regular file, damaged, or decodes to far more than text of that size does.
        OSError: it cannot be opened or read.
    """
    check_regular(path)
    with path.open("rb") as file:
        if compression is None:
            while chunk := file.read(size):
                yield chunk
        else:
            yield from _gathered(_uncompressed(path, file, compression), size)


class DecodedLimit:
    """Counts what came out of a file, and refuses it when no honest text compresses that well.

    Args:
        path: the file.
        num_bytes: its size, or as much of it as was read; raise it as reading goes on.
    """

    def __init__(self, path: Path, num_bytes: int = 0) -> None:
        self.path, self.num_bytes, self.num_decoded = path, num_bytes, 0

    def add(self, num_decoded: int) -> None:
        """Count bytes that came out.

        Raises:
            DataError: they are too many.
        """
        self.num_decoded += num_decoded
        if self.num_decoded > FREE_BYTES and self.num_decoded > MOST_DECODED_RATIO * self.num_bytes:
            raise DataError(
                f"{self.path} is no text: {self.num_decoded:,} bytes came out of {self.num_bytes:,}, more than "
                f"{MOST_DECODED_RATIO} for one"
            )


def _uncompressed(path: Path, file: BinaryIO, compression: str) -> Iterator[bytes]:
    new_decoder, padding = _DECODERS[compression]
    limit = DecodedLimit(path)
    decoder: Any = None
    num_members = 0
    try:
        while piece := file.read(_PIECE):
            limit.num_bytes += len(piece)
            while piece:
                if decoder is None:
                    piece = piece.lstrip(padding) if num_members else piece
                    if not piece:
                        break
                    decoder = new_decoder()
                decoded = decoder.decompress(piece)
                limit.add(len(decoded))
                yield decoded
                piece = decoder.unused_data if decoder.eof else b""
                if decoder.eof:
                    decoder, num_members = None, num_members + 1
    except _COMPRESSION_ERRORS as error:
        behind = f" behind {num_members} good parts" if num_members else ""
        raise DataError(f"cannot read {path}: it is not valid compressed data{behind} ({error})") from error
    except MemoryError as error:
        raise DataError(
            f"cannot read {path}: there is not memory enough to uncompress it; a window as large as `zstd --long=31` "
            "makes needs 2 GiB: on a larger machine, recompress it without --long"
        ) from error
    if decoder is not None:
        raise DataError(f"cannot read {path}: the compressed file is cut short; fetch it again")


def _gathered(parts: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield the bytes of parts of any size in chunks of one."""
    held: list[bytes] = []
    num_held = 0
    for part in parts:
        held.append(part)
        num_held += len(part)
        if num_held >= size:
            joined = b"".join(held)
            whole = num_held - num_held % size
            yield from (joined[start : start + size] for start in range(0, whole, size))
            held, num_held = [joined[whole:]], num_held - whole
    if num_held:
        yield b"".join(held)


def _new_gzip() -> Any:
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: with gzip's header and checksum


def _new_zstd() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()


_DECODERS: dict[str, tuple[Callable[[], Any], bytes]] = {"gzip": (_new_gzip, b"\0"), "zstd": (_new_zstd, b"")}
"""What uncompresses one member or frame, and what may lie between two."""
