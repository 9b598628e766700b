"""Fetches transformers' own tests: those of the installed version, from its source distribution, to build/peers.

They are never part of this repository. `make test-peers` calls it before the tests:

    python -m tests.peers.unpack
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def unpacked_tests() -> Path:
    """Where the tests of the installed transformers are, or will be."""
    return REPOSITORY / "build" / "peers" / f"transformers-{version('transformers')}" / "tests"


def unpack() -> None:
    """Download and unpack them, unless they are there."""
    folder = unpacked_tests()
    if folder.is_dir():
        return
    root = folder.parent
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", scratch]
        source = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", root.name.replace("-", "==")]
        subprocess.run([*pip, *source], check=True)
        with tarfile.open(Path(scratch) / f"{root.name}.tar.gz") as archive:
            wanted = [member for member in archive if member.name.startswith(f"{root.name}/tests/")]
            archive.extractall(scratch, wanted, filter="data")
        # One of them reads it, and the distribution leaves it out.
        (Path(scratch) / root.name / "tests" / "__init__.py").touch()
        (Path(scratch) / root.name).rename(root)


if __name__ == "__main__":
    unpack()
