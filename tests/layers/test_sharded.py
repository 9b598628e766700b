"""The layer under fully sharded data parallelism, in real processes on the CPU with gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cottention.ops.native import is_available


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["naive", "chunk", "native", "triton"])
def test_a_sharded_layer_equals_a_whole_one(implementation: str) -> None:
    if implementation == "native" and not is_available():
        pytest.skip("the native library was not built")
    if implementation == "triton":
        pytest.importorskip("triton")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = subprocess.run(
        [*launcher, str(Path(__file__).with_name("sharded.py")), implementation],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(": same") == 2
