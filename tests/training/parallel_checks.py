"""What `test_parallel.py` runs on every rank: whole runs by a recipe, in processes that are there already."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cottention.errors import CheckpointError
from cottention.training.pretraining import pretrain
from cottention.training.recipe import Recipe
from cottention.training.sharded import Saving


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Models are made in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(_group: dist.ProcessGroup | None, recipe: Recipe, folder: str, dtype: torch.dtype, **options: Any) -> None:
    """Pretrain in all processes of the world, or in this one."""
    warnings.simplefilter("default")  # torch's own, of FSDP2 on a CPU
    logging.getLogger("cottention").setLevel(logging.ERROR)
    with default_dtype(dtype):
        pretrain(recipe, output_dir=Path(folder), **options)


def check_unwritable(group: dist.ProcessGroup, folder: str) -> None:
    """Shards cannot be written: what ends a save is told, and so is whoever waits."""
    told: list[Any] = []
    saving = Saving()
    saving.begin({"model.x": torch.zeros(3)}, Path(folder), group)
    with ExitStack() as ending:
        ending.push(lambda kind, *_: told.append(kind))
        saving.goes_on(ending)
    with pytest.raises(CheckpointError, match=r"cannot write to .*shards: .*Not a directory.*saved before is intact"):
        saving.wait()
    assert told
    assert told[0] is not None
    saving.wait()  # told once
