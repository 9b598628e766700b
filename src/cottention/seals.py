"""Seals: a list of files with size and SHA-256, by which damage to what is finished is found where it is opened.

MANIFEST.json lies in the directory that it is about:

    {"config.json": {"bytes": 512, "sha256": "..."}, "model.safetensors": {...}}

A checkpoint's names all its files. A model's names config and weights, and the tokenizer where training or a conversion
wrote it too; cards, generation settings and whatever a user adds are nobody's business. `save_pretrained` of our models
writes the seal anew. A directory without one opens as it always did.

    seal(folder, model_files(folder))
    check_model(folder)                         # CheckpointError: model.safetensors was changed after it was written
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from cottention.errors import CheckpointError
from cottention.files import one_line, usable_cores
from cottention.logging import get_logger

MANIFEST = "MANIFEST.json"
RECORD_SEAL = "sha256"  # the name, in a JSON object, of the hash of the rest
SHARDS = "shards"
"""The folder for weights in parts, as training on several processes saves them."""
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", f"{SHARDS}/*.safetensors")
TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json")

# People edit a config by hand, and every save_pretrained of a tokenizer writes its own a little differently.
_OFTEN_EDITED = ("config.json", "tokenizer_config.json")

_BLOCK_BYTES = 1 << 20
_SETTLED_S = 2.0  # file systems keep times to a second at worst: a file changed since may have the times of before
_intact: set[tuple[Any, ...]] = set()  # files seen whole by this process

logger = get_logger(__name__)


def seal(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write down what a directory holds.

    Args:
        folder: the directory.
        names: files in it; None: all, to the bottom.

    Raises:
        OSError: it cannot be written.
    """
    if names is None:
        names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    paths = {name: folder / name for name in sorted(names) if name != MANIFEST}
    entries = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in paths.items()}
    partial = folder / f".{MANIFEST}.{os.getpid()}.partial"
    partial.write_text(json.dumps(entries, indent=1), encoding="utf-8")
    partial.replace(folder / MANIFEST)


def model_files(folder: Path, *, tokenizer: bool) -> list[str]:
    """What the seal of a model is about, of the files that are there."""
    return [entry.name for entry in folder.iterdir() if _is_of_model(entry.name, tokenizer)]


def _is_of_model(name: str, tokenizer: bool) -> bool:
    return any(fnmatch(name, pattern) for pattern in ("config.json", *WEIGHTS, *(TOKENIZER if tokenizer else ())))


def damage(folder: Path) -> str | None:
    """Say what is wrong with a sealed directory, in a few words; None when nothing is."""
    entries = _entries(folder)
    if isinstance(entries, str):
        return entries
    for name, (num_bytes, digest) in entries.items():
        problem = file_damage(folder / name, num_bytes, digest, afresh=True)
        if problem is not None:
            return f"{name} {problem}"
    return None


def check_model(folder: Path, *, tokenizer: bool = False, edits: bool = True) -> None:
    """Compare a model with its seal, where it has one; a file is read once in a process.

    Args:
        folder: a directory of `save_pretrained`.
        tokenizer: whether its tokenizer is opened too.
        edits: whether a user may have edited config.json and tokenizer_config.json; a change is a warning then.

    Raises:
        CheckpointError: a file is damaged; one line that names it.
    """
    if not (folder / MANIFEST).is_file():
        return
    entries = _entries(folder)
    if isinstance(entries, str):
        raise CheckpointError(f"{folder / MANIFEST} is damaged; remove it to open the model unchecked")
    for name, (num_bytes, digest) in entries.items():
        path = folder / name
        problem = file_damage(path, num_bytes, digest) if _is_of_model(name, tokenizer) else None
        if problem is not None and edits and name in _OFTEN_EDITED and path.is_file():
            logger.warning("%s %s", path, problem)
        elif problem is not None:
            raise CheckpointError(
                f"{path} {problem}: it is damaged, or another program wrote it; if that was meant, remove "
                f"{folder / MANIFEST}"
            )


def missing_parts(folder: Path) -> list[str]:
    """What a model directory lacks to be one: files that its seal names, config, weights; nothing of it is read."""
    entries = _entries(folder)
    names = () if isinstance(entries, str) else entries
    lost = [name for name in ("config.json", *names) if not (folder / name).is_file()]
    has_weights = folder.is_dir() and any(any(folder.glob(pattern)) for pattern in WEIGHTS)
    return list(dict.fromkeys(lost if has_weights else [*lost, WEIGHTS[0]]))


def file_damage(
    path: Path,
    num_bytes: int,
    digest: str,
    *,
    num_hashed: int | None = None,
    remember: Path | None = None,
    afresh: bool = False,
) -> str | None:
    """Say what is wrong with a file, in a few words; None when it is as it was written.

    Args:
        path: the file.
        num_bytes: its size.
        digest: its SHA-256.
        num_hashed: bytes that the hash is of; None: all.
        remember: a folder in which to note what was found whole, so that a large file is read once on a machine, not
            once in a process; it is read again when its times, size or place have changed.
        afresh: read it in any case.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read: {one_line(error)}"
    if not stat.S_ISREG(status.st_mode):
        return "is no file"
    if status.st_size != num_bytes:
        return f"has {status.st_size} bytes instead of {num_bytes}"
    identity = (os.path.realpath(path), status.st_ino, num_bytes, status.st_mtime_ns, status.st_ctime_ns, digest)
    note = None if remember is None else remember / hashlib.sha256(repr(identity).encode()).hexdigest()
    if not afresh and (identity in _intact or (note is not None and note.exists())):
        return None
    try:
        if sha256(path, num_hashed) != digest:
            return "was changed after it was written"
    except OSError as error:
        return f"cannot be read: {one_line(error)}"
    if time.time() - status.st_ctime > _SETTLED_S:
        _intact.add(identity)
        _note(note)
    return None


def first_damage(
    files: Iterable[tuple[Path, int, str]], *, remember: Path | None = None, afresh: bool = False
) -> tuple[Path, str] | None:
    """The first of many files that is damaged, and how; read on all cores. The rest as for `file_damage`."""
    listed = list(files)
    with ThreadPoolExecutor(max(1, min(usable_cores(), len(listed)))) as pool:
        problems = pool.map(lambda file: file_damage(*file, remember=remember, afresh=afresh), listed)
        return next(((file[0], problem) for file, problem in zip(listed, problems, strict=True) if problem), None)


def sha256(path: Path, num_bytes: int | None = None) -> str:
    """Of a file's content, or of its first bytes."""
    digest = hashlib.sha256()
    left = path.stat().st_size if num_bytes is None else num_bytes
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, _BLOCK_BYTES))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def sealed_record(record: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the hash of what else is in it, for a file that is written anew in one go."""
    content = {name: value for name, value in record.items() if name != RECORD_SEAL}
    text = json.dumps(content, sort_keys=True)
    return {**content, RECORD_SEAL: hashlib.sha256(text.encode()).hexdigest()}


def is_intact_record(record: dict[str, Any]) -> bool:
    """Whether a JSON object is as `sealed_record` left it, however it is laid out; one without a hash is."""
    return RECORD_SEAL not in record or sealed_record(record)[RECORD_SEAL] == record[RECORD_SEAL]


def _entries(folder: Path) -> dict[str, tuple[int, str]] | str:
    """The files of a seal with size and hash, or what is wrong with it."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in content.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return f"{MANIFEST} cannot be read"
    outside = [name for name in entries if Path(name).is_absolute() or ".." in Path(name).parts]
    return f"{MANIFEST} names a file outside, {outside[0]}" if outside else entries


def _note(note: Path | None) -> None:
    if note is not None:
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
        except OSError as error:  # the next process reads the file once more
            logger.debug("%s: %s", note, one_line(error))
