"""The files of a corpus: one, all of known kind below a folder, or what matches a pattern; found without reading any.

It needs neither datasets nor torch, so that a command can say that there is no such text before it loads them.

    files_of("books/"), files_of("texts/*.txt")
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cottention.data.opening import check_regular, irregular_kind
from cottention.data.readers import FORMATS, format_of
from cottention.errors import DataError, did_you_mean
from cottention.logging import get_logger

_MOST_STARS = 32  # of a glob pattern
_MOST_DEEP_STARS = 4

Source = str | os.PathLike[str]
logger = get_logger(__name__)


def files_of(source: Source) -> list[Path]:
    """Find the files of a source: itself, all below a folder, or all that match a pattern.

    Raises:
        DataError: there is none.
    """
    if not os.fspath(source):
        raise DataError("no files were named as the corpus: a name is empty")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return _files_below(path)
        if path.exists():
            check_regular(path)
            return [path]
        if glob.has_magic(str(path)):
            _check_pattern(str(path))
            found = (Path(name) for name in glob.glob(str(path), recursive=True))
            files = sorted(file for file in found if file.is_file() and irregular_kind(file) is None)
            if files:
                return files
            raise DataError(f"no file matches {source}")
        raise DataError(f"no such file or folder: {source}{_suggestion(path)}")
    except OSError as error:
        raise DataError(f"cannot open {_shortened(error.filename or source)}: {error.strerror}") from error
    except RuntimeError as error:  # ~somebody
        raise DataError(f"cannot open {source}: {error}") from error


def _check_pattern(pattern: str) -> None:
    """Refuse patterns whose search would not end: each ** multiplies the folders that are gone through."""
    if pattern.count("*") > _MOST_STARS or pattern.count("**") > _MOST_DEEP_STARS:
        raise DataError(
            f"the pattern {_shortened(pattern)} must have at most {_MOST_STARS} stars, and {_MOST_DEEP_STARS} of **; "
            f"got {pattern.count('*')} and {pattern.count('**')}"
        )


def _shortened(name: str | os.PathLike[str]) -> str:
    shown = os.fspath(name)
    return shown if len(shown) <= 200 else f"{shown[:100]}... ({len(shown)} characters)"


def _suggestion(path: Path) -> str:
    if path.is_symlink():
        return f" (it is a link to {path.readlink()})"
    folder = path.parent
    if not folder.is_dir():
        return f" (there is no folder {folder})"
    return did_you_mean(path.name, [entry.name for entry in folder.iterdir()])


def _files_below(folder: Path) -> list[Path]:
    """All files of known kind below a folder, in the order of their paths; hidden ones are left out."""
    everything = list(_walk(folder, ()))
    kinds = {path: _kind_of(path) for path in everything}
    files = [path for path, kind in kinds.items() if kind is None]
    others = Counter(kind for kind in kinds.values() if kind is not None)
    summary = ", ".join(f"{count} x {suffix}" for suffix, count in others.most_common(5))
    if not files:
        found = f"; it holds {summary}" if summary else "; it is empty"
        raise DataError(f"no {', '.join(FORMATS)} files in the folder {folder}{found}")
    if others:
        logger.info("%s: %d text files; left out: %s", folder, len(files), summary)
    return files


def _kind_of(path: Path) -> str | None:
    """None for a text file, else what stands for it in a summary; a link to nothing is left for reading to refuse."""
    if not format_of(path):
        return path.suffix or "no suffix"
    return irregular_kind(path) if path.exists() else None


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Yield the files below a folder, through links too; not os.walk, which passes over what it cannot read."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that it is in
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, (*above, here))
        else:
            yield path
