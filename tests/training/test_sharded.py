"""Checkpoints of sharded runs: on any processes a run goes on from them, and one process opens their weights.

Real processes with gloo, started once. The comparison of what goes on is the uninterrupted run, of one process where
others go on.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cottention.errors import CheckpointError
from cottention.generation import load_model_and_tokenizer
from cottention.models.shards import join_shards
from cottention.training.checkpoints import newest_intact_checkpoint
from cottention.training.recipe_files import replace_settings
from tests.damage import zero_some
from tests.distributed.ranks import Ranks
from tests.training import parallel_checks
from tests.training.helpers import assert_same_run, steps_of, tiny_recipe, weights_of
from tests.training.test_parallel import BLOCK, assert_same_curve

SETTINGS: dict[str, Any] = {
    **BLOCK,
    "model__erase": True,
    "training__max_steps": 6,
    "training__save_every": 2,
    "training__log_every": 3,
    "training__save_total_limit": 9,
}


def recipe_of(corpus: Path, dropout: float, **parallelism: int) -> Any:
    recipe = tiny_recipe("gpt", corpus, model__dropout=dropout, **SETTINGS)
    return replace_settings(recipe, {f"parallelism.{name}": size for name, size in parallelism.items()})


def goes_on(ranks: Ranks, recipe: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Run on from the checkpoint that is there, rather than from the start, where it would be written anew."""
    [checkpoint] = (folder / "checkpoints").glob("checkpoint-*")
    before = (checkpoint / "MANIFEST.json").stat()
    run(ranks, recipe, folder, dtype)
    after = (checkpoint / "MANIFEST.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def run(ranks: Ranks, recipe: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    sizes = recipe.parallelism
    num = (sizes.data or 1) * sizes.shard * sizes.sequence
    if num == 1:
        parallel_checks.run(None, recipe, str(folder), dtype)
    else:
        ranks.run(parallel_checks.run, recipe, str(folder), dtype, size=num)


def as_stopped(run_dir: Path, copy: Path, step: int) -> Path:
    """A run as it was when it was killed behind the save of this step."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "model")
    for later in steps_of(copy):
        if later > step:
            shutil.rmtree(copy / "checkpoints" / f"checkpoint-{later}")
    return copy


def test_a_sharded_run_goes_on_exactly_and_its_checkpoints_open(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    recipe = recipe_of(corpus, 0.1, shard=2)
    run(ranks, recipe, tmp_path / "whole")
    assert steps_of(tmp_path / "whole") == [2, 4, 6]
    checkpoint = tmp_path / "whole" / "checkpoints" / "checkpoint-6"
    assert len(list((checkpoint / "shards").iterdir())) == 2
    assert not list(checkpoint.rglob("*.distcp"))
    goes_on(ranks, recipe, as_stopped(tmp_path / "whole", tmp_path / "stopped", 2))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")

    truth = weights_of(tmp_path / "whole" / "model")
    opened, _ = load_model_and_tokenizer(checkpoint, "causal-lm")
    for model in (opened, AutoModelForCausalLM.from_pretrained(checkpoint)):
        weights = model.state_dict()
        assert all(torch.equal(weights[name], truth[name]) for name in truth)
    opened.save_pretrained(tmp_path / "plain")
    assert weights_of(tmp_path / "plain").keys() == truth.keys()

    zero_some(checkpoint / "shards" / "shard-00002-model-00001-of-00001.safetensors", random.Random(0))
    with pytest.raises(CheckpointError, match="shard-00002"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    assert newest_intact_checkpoint(checkpoint.parent) == checkpoint.with_name("checkpoint-4")
    shutil.rmtree(tmp_path / "plain")
    shutil.copytree(checkpoint.with_name("checkpoint-4") / "shards", tmp_path / "plain")
    (tmp_path / "plain" / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="do not make it up; a file may be missing"):
        join_shards(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("written_by", [{}, {"shard": 2}, {"shard": 2, "sequence": 2}, {"data": 2, "shard": 2}])
def test_a_run_goes_on_on_other_processes(
    ranks: Ranks, written_by: dict[str, int], corpus: Path, tmp_path: Path
) -> None:
    """Model, optimizer, schedule and place in the text are those of the uninterrupted run."""
    one = recipe_of(corpus, 0.0)
    run(ranks, one, tmp_path / "one", torch.float64)
    run(ranks, recipe_of(corpus, 0.0, **written_by), tmp_path / "written", torch.float64)
    for number, sizes in enumerate([{}, {"data": 2}, {"shard": 2}, {"shard": 4}, {"shard": 2, "sequence": 2}]):
        stopped = as_stopped(tmp_path / "written", tmp_path / f"{number}", 2)
        goes_on(ranks, recipe_of(corpus, 0.0, **sizes), stopped, torch.float64)
        # What one process wrote is read as float32.
        assert_same_curve(stopped, tmp_path / "one", 1e-10 if written_by else 1e-5)


def test_what_keeps_shards_from_being_written_is_told_in_a_line(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ranks.run(parallel_checks.check_unwritable, str(tmp_path / "file" / "shards"), size=2)
