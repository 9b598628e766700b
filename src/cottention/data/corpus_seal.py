"""The seal of a corpus: SHA-256 of its shards, of its tokenizer's files and of the manifest that holds them.

A shard is read for this once on a machine, and again when its times, size or place have changed.

    check_manifest(folder, manifest)
    check_content(folder, manifest)             # DataError: shard-00000.arrow is damaged: it was changed after ...
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cottention.data.arrow_cache import datasets_cache
from cottention.errors import DataError
from cottention.seals import first_damage, sha256

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
_SEAL = "sha256"


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with its own hash."""
    return {**manifest, _SEAL: _hash(manifest)}


def is_sealed(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest has hashes; those of older versions have none."""
    return _SEAL in manifest


def check_size(path: Path, shard: Mapping[str, Any]) -> None:
    """Compare a shard with the size that its manifest gives.

    Raises:
        DataError: it has another, or is missing.
    """
    size = path.stat().st_size if path.is_file() else None
    if size != shard["bytes"]:
        what = "is missing" if size is None else f"has {size:,} bytes of {shard['bytes']:,}"
        raise DataError(f"{path} {what}; remove the directory and build the corpus again")


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare a manifest with its own hash.

    Raises:
        DataError: it was changed.
    """
    content = {name: value for name, value in manifest.items() if name != _SEAL}
    if manifest.keys() & {_SEAL, "tokenizer_files"} and manifest.get(_SEAL) != _hash(content):
        raise DataError(
            f"{folder / MANIFEST} was changed after it was written; remove the directory and build the corpus again"
        )


def check_content(folder: Path, manifest: Mapping[str, Any], *, afresh: bool = False) -> None:
    """Compare shards and tokenizer with their hashes; process 0 of a machine does it for all of them.

    Args:
        folder: the corpus.
        manifest: what it should be.
        afresh: read what was found whole before, too.

    Raises:
        DataError: a file is damaged; the first, with the remedy.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return
    files = [(folder / shard["name"], shard) for shard in manifest["shards"] if "sha256" in shard]
    files += [(folder / TOKENIZER / name, entry) for name, entry in manifest.get("tokenizer_files", {}).items()]
    hashes = [(path, entry["bytes"], entry["sha256"]) for path, entry in files]
    damaged = first_damage(hashes, remember=datasets_cache() / "cottention-intact", afresh=afresh)
    if damaged is not None:
        path, problem = damaged
        if path.parent == folder / TOKENIZER:
            raise DataError(
                f"{path.parent} is not the tokenizer that the tokens beside it were made with: {path.name} {problem}; "
                "tokenise the text again"
            )
        raise DataError(f"{path} is damaged: it {problem}; remove the directory and build the corpus again")


def tokenizer_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of a tokenizer's files, for the manifest."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
