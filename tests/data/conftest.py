"""A cache of the test's own, and a folder that an ordinary user may enter."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import config as datasets_config


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The datasets cache of this test: empty, and not the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def public_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for everybody, with the cache inside; pytest's own is closed to all but its owner."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", folder / "cache")
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o777)
    shutil.rmtree(folder)
