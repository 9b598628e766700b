"""JSON that came from elsewhere: a plain file of bounded size and depth, of the shape that is asked for, or one line.

json.loads alone ends in RecursionError for nested brackets, makes sixty bytes of three, and waits for ever at a FIFO; a
value of another type than expected shows later, as an exception that names no file.

    config = read_json_object(directory / "config.json")
    step = typed(config, "step", int, "run_state.json")
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from cottention.errors import CheckpointError, CottentionError

LARGEST_JSON = 16 << 20
"""Bytes of a file that describes something; parsed, the worst of them takes twenty times as much."""
LARGEST_TABLE = 64 << 20
"""Bytes of a file with an entry per token or tensor: vocabularies, indices of weights."""

_KINDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number", float: "a number"}


def parse_json(text: str | bytes, where: str, error: type[CottentionError] = CheckpointError) -> Any:
    """Parse JSON.

    Args:
        text: UTF-8.
        where: what it was read from, for the message.
        error: what is raised.
    """
    try:
        # By itself it would take bytes for UTF-16 where they look like it.
        return json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise error(f"{where} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as problem:
        raise error(f"{where} cannot be read as JSON: {problem}") from problem


def read_json(path: Path, *, limit: int = LARGEST_JSON, error: type[CottentionError] = CheckpointError) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        limit: bytes that it may have.
        error: what is raised.

    Raises:
        CottentionError: missing, no plain file, too large, not JSON.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO or a terminal would wait
            raise error(f"{path} cannot be read as JSON: it is no plain file")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError as problem:
        raise error(f"{path.parent} has no {path.name}") from problem
    except OSError as problem:
        raise error(f"{path} cannot be read as JSON: {problem.strerror}") from problem
    if len(content) > limit:
        raise error(f"{path} cannot be read as JSON: it has more than {limit >> 20} MiB")
    return parse_json(content, str(path), error)


def read_json_object(
    path: Path, *, limit: int = LARGEST_JSON, error: type[CottentionError] = CheckpointError
) -> dict[str, Any]:
    """Read a JSON file that must hold an object; see `read_json`."""
    content = read_json(path, limit=limit, error=error)
    if not isinstance(content, dict):
        raise error(f"{path} must hold a JSON object; got {kind_of(content)}")
    return content


def typed(
    content: dict[str, Any], name: str, kind: type, where: str, error: type[CottentionError] = CheckpointError
) -> Any:
    """Return a field of an object, which must be there and of this type; a whole number is a number too.

    Raises:
        CottentionError: it is missing, or of another type.
    """
    if name not in content:
        raise error(f"{where} lacks {name!r}")
    value = content[name]
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise error(f"{where}: {name} must be {_KINDS[kind]}; got {kind_of(value)}")
    return value


def kind_of(value: object) -> str:
    """What a value of JSON is: the type of a list or an object, any other value itself."""
    if isinstance(value, (dict, list)):
        return type(value).__name__
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
