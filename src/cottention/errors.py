"""What a user can do wrong, as exceptions whose message is one clear line.

The command line prints the message and exits with 2; library callers catch `CottentionError`, a ValueError.
Anything else that escapes is a bug and keeps its traceback.

    check_known_keys(given, known, "recipe section 'model'")
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable


class CottentionError(ValueError):
    """A user's mistake. The message is one line: what was expected, then what came."""


class CheckpointError(CottentionError, RuntimeError):
    """A model directory is missing, damaged, or of another kind than asked for.

    A RuntimeError too, which transformers raises for weights of another shape, and which scripts catch.
    """


class DataError(CottentionError):
    """A corpus or a file cannot be used as it is."""


class SettingsError(CottentionError):
    """A recipe, a flag or a config field has a value that makes no sense."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the known name closest to a misspelled one.

    Args:
        name: what was given.
        known: what would have been accepted.

    Returns:
        "; did you mean 'x'?", ready to end an error message, or "" when nothing is close.
    """
    # Case and the choice of - or _ are the commonest slips, so they cost nothing in the comparison.
    spelled = {_normalised(candidate): candidate for candidate in known}
    close = difflib.get_close_matches(_normalised(name), spelled, n=1, cutoff=0.6)
    return f"; did you mean {spelled[close[0]]!r}?" if close else ""


def check_known_keys(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse the first key that is not known.

    Args:
        given: the keys that came.
        known: the keys that are allowed.
        what: where they came from, as it should read in the message, e.g. "recipe section 'model'".

    Raises:
        SettingsError: a key is unknown; the message names it and suggests the closest known one.
    """
    allowed = list(known)
    for key in given:
        if key not in allowed:
            raise SettingsError(f"{what} has no key {key!r}{did_you_mean(key, allowed)}")


def why_offline() -> str:
    """What of the settings keeps the Hugging Face Hub from being asked, ready to end an error message; else ""."""
    names = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "0") not in ("", "0")]
    return f"; {names[0]} is set" if names else ""


def _normalised(name: str) -> str:
    return name.lower().replace("-", "_")
