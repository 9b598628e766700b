"""Copies of published checkpoints to break: from tests/fixtures, or from the shared reference numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

_FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "modules"


@pytest.fixture
def published(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Copy the published checkpoint of a name to a folder of the test's own, and say where."""

    def copy(name: str) -> Path:
        source = _FIXTURES / name
        if not (source / "config.json").is_file():
            source = request.getfixturevalue("oracle_dir") / "modules" / name
        target = tmp_path / f"published-{name}"
        target.mkdir()
        for entry in source.iterdir():
            if entry.suffix != ".npz" or "grads" not in entry.name:
                shutil.copyfile(entry, target / entry.name)
        return target

    return copy
