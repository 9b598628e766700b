"""What every test shares: one thread, no network, one seed, and the folders with reference numbers.

`shared_dir` and `oracle_dir` are the `shared` folder beside the repository (or $COTTENTION_SHARED); a test that asks
for one is skipped with a clear reason where it is missing.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch or a Hugging Face library is imported: tests run several to a machine, and never ask the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

# Thousands of tests and three large libraries: what there is before the first test never becomes garbage, and to look
# through it costs half a second each time, which transformers' Trainer asks for at the end of every run.
gc.disable()

_REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """From here on only what is made by tests is looked through."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _nothing_waits_for_the_disk() -> Iterator[None]:
    """No test switches the power off; a small run writes a hundred files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with corpora and reference numbers beside the repository; skips where it is missing."""
    folder = Path(os.environ.get("COTTENTION_SHARED") or _REPOSITORY.parent / "shared")
    if not folder.is_dir():
        pytest.skip("needs the folder `shared` beside the repository (or $COTTENTION_SHARED)")
    return folder


@pytest.fixture(scope="session")
def oracle_dir(shared_dir: Path) -> Path:
    """The original code's numbers, shared/oracle; skips where they are missing."""
    folder = shared_dir / "oracle"
    if not folder.is_dir():
        pytest.skip("needs the reference numbers in shared/oracle")
    return folder


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """What the package logs, from INFO on; its level and handlers may have been set by a command."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("cottention")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
