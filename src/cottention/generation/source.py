"""Finds the directory that a user means by a path or a Hub name.

A name is a Hub name only when it looks like OWNER/NAME and nothing local explains it; the Hub is asked once, without
retries, and only for the files named, so that a wrong path or a missing network costs a second, not half a minute.

    directory = resolve_directory("runs/gpt", file_patterns=["*.json", "*.safetensors"])
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cottention.errors import CheckpointError, did_you_mean, why_offline
from cottention.files import one_line

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A machine behind a firewall answers nothing at all; the libraries' own default is 10 s per attempt.
_HUB_TIMEOUT_S = 5.0


def resolve_directory(source: str | Path, *, file_patterns: Sequence[str], revision: str | None = None) -> Path:
    """Return a local directory for a path or a Hub name; a Hub name is downloaded to the usual cache.

    Args:
        source: a directory, or OWNER/NAME on the Hugging Face Hub.
        file_patterns: what to fetch from the Hub; nothing else is downloaded.
        revision: branch, tag or commit on the Hub; not allowed with a directory.

    Returns:
        The directory, as given, or its snapshot in the Hub's cache (whose last part is the commit).

    Raises:
        CheckpointError: nothing there, a file instead of a directory, or the Hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} needs a Hub name; {source} is a directory")
        return path
    if path.exists():
        raise CheckpointError(f"{source} is a file; expected a model directory")
    if _is_hub_name(str(source)):
        return _download(str(source), file_patterns, revision)
    raise CheckpointError(f"no directory {source}{_similar_directory(path)}")


def _is_hub_name(name: str) -> bool:
    # runs/gtp with a folder `runs` here is a misspelled path, not somebody's repository.
    return _HUB_NAME.fullmatch(name) is not None and not Path(name).parent.is_dir()


def _similar_directory(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return f" (nor {path.parent})"
    return did_you_mean(path.name, names)


def _download(name: str, file_patterns: Sequence[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    where = f"{name} at {revision}" if revision else name
    try:
        snapshot = snapshot_download(
            name, revision=revision, allow_patterns=list(file_patterns), etag_timeout=_HUB_TIMEOUT_S
        )
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"no directory {name} here, and the Hugging Face Hub cannot be reached (nor is {where} in its local cache)"
            f"{why_offline()}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise CheckpointError(f"no directory {name} here, and the Hub answers {status} for {where}") from error
    except (HFValidationError, OSError) as error:
        raise CheckpointError(f"cannot fetch {where} from the Hugging Face Hub: {one_line(error)}") from error
    return Path(snapshot)
