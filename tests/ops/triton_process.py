"""Runs the tests that Triton's interpreter needs a process for, and shows what failed in it.

Triton patches itself when it interprets a kernel, and decides when it is imported whether it does: the other tests of
a worker must see neither.

    run_interpreted("interpreted_triton.py", "not slow")
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent


def run_interpreted(file: str, marks: str, *, select: str = "") -> None:
    """Run the tests of a file beside this one in a process that interprets Triton kernels."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        marks,
        "-k",
        select,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, str(_FOLDER / file)],
        cwd=_FOLDER.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr
    assert " passed" in ran.stdout
