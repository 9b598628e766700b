"""Texts that commands read from files or stdin.

for line in read_lines("questions.txt"): ...
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from cottention.errors import DataError

_MOST_BYTES = 256 << 20


def text_of(word: str) -> str:
    """A text that was given on the command line, read as UTF-8 whatever the locale.

    Python keeps bytes that the locale does not know, in a POSIX locale all beyond ASCII, as lone surrogates.
    """
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        return word  # not UTF-8 either: whoever reads it says so


def read_text(name: str) -> str:
    """Read a UTF-8 file, or stdin for "-"; one newline at the very end is not part of the text.

    Raises:
        DataError: the file is not there, or is not UTF-8 text.
    """
    from cottention.data.encodings import other_kind, remedy_for

    shown = "stdin" if name == "-" else name
    try:
        content = _bytes_of(name, shown)
        if what := other_kind(content):
            raise DataError(f"{shown} is not plain text but {what}")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        remedy = "" if b"\0" in content else f"; {remedy_for(error, skipping='')}"
        raise DataError(f"{shown} is not UTF-8 text (byte {error.start}){remedy}") from error
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror}") from error
    if (at := text.find("\0")) >= 0:
        raise DataError(f"{shown} is a binary file, not text (zero byte at character {at})")
    # Editors and `echo` end a file with a newline, which nobody means as the end of a prompt.
    return text.removesuffix("\n").removesuffix("\r")


def _bytes_of(name: str, shown: str) -> bytes:
    """What a file, a pipe or stdin holds, as far as a prompt may go: a device has no end."""
    with contextlib.ExitStack() as stack:
        file = sys.stdin.buffer if name == "-" else stack.enter_context(Path(name).expanduser().open("rb"))
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise DataError(f"{shown} is larger than {_MOST_BYTES >> 20} MiB, which no text here may be")
    return content


def read_lines(name: str) -> list[str]:
    """Read the lines of a UTF-8 file, or of stdin for "-", that are not blank.

    Raises:
        DataError: see `read_text`, or there is no such line.
    """
    lines = [line.removesuffix("\r") for line in read_text(name).split("\n")]
    kept = [line for line in lines if line.strip()]
    if not kept:
        raise DataError(f"{'stdin' if name == '-' else name} holds no text")
    return kept


def read_json_lines(name: str, field: str) -> list[str]:
    """Read texts from the lines of a UTF-8 file, or of stdin for "-": JSON strings, or objects that have a field.

    Raises:
        DataError: see `read_lines`, or a line is neither.
    """
    shown = "stdin" if name == "-" else name
    texts = []
    for number, line in enumerate(read_text(name).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # or nested by thousands
            raise DataError(f"{shown}, line {number}: not JSON ({error})") from error
        text = row.get(field) if isinstance(row, dict) else row
        if not isinstance(text, str):
            raise DataError(f"{shown}, line {number}: expected a string or an object with the text {field!r}")
        texts.append(text)
    if not texts:
        raise DataError(f"{shown} holds no text")
    return texts
