"""Memory measured in forks of a process that has imported torch, where how the process begins is not the question."""

from __future__ import annotations

import json
import os
from typing import IO

import pytest

from cottention.benchmarks import memory_process
from cottention.benchmarks.memory import MALLOC_ENVIRONMENT
from tests.forks import Fork, start_fork


def measure_in_forks(patch: pytest.MonkeyPatch) -> None:
    """From now on."""
    patch.setattr(memory_process, "_start_child", _start_child)


def _start_child(job: dict, stderr: IO[bytes]) -> Fork:
    environment = {**os.environ, **MALLOC_ENVIRONMENT}
    child = start_fork("-m", memory_process.__name__, env=environment, stderr=stderr)
    child.stdin.write(json.dumps(job))
    child.stdin.close()
    return child
