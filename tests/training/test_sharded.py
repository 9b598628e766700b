"""Checkpoints of sharded runs: on any processes a run goes on from them, and one process opens their weights.

Real processes with gloo, started once. The comparison of what goes on is the uninterrupted run, of one process where
others go on.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cottention.errors import CheckpointError
from cottention.generation import load_model_and_tokenizer
from cottention.models.shards import join_shards
from cottention.seals import damage
from cottention.training.checkpoints import newest_intact_checkpoint
from cottention.training.recipe_files import replace_settings
from cottention.training.sharded import read_shards
from tests.damage import zero_some
from tests.distributed.ranks import Ranks
from tests.training import parallel_checks
from tests.training.helpers import assert_same_run, steps_of, tiny_recipe, weights_of
from tests.training.test_distributed import torchrun
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


def is_alive(pid: str) -> bool:
    """Whether a process may have open files: any of its threads has not ended."""
    try:
        states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        return True  # one ended just now
    return any(state != "Z" for state in states)


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
    for strange in ({"model.nothing": torch.zeros(3)}, {"model.transformer.wte.weight": torch.zeros(3, 3)}):
        with pytest.raises(CheckpointError, match=r"shards is not of this model or damaged: .*(nothing|wte)"):
            read_shards(strange, checkpoint / "shards")
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


@pytest.mark.slow
def test_a_run_killed_while_shards_are_written_ends_like_one_that_never_was(
    ranks: Ranks, corpus: Path, tmp_path: Path
) -> None:
    settings = {"training.max_steps": 60, "training.save_every": 3}
    recipe = replace_settings(recipe_of(corpus, 0.1, shard=2), settings)
    run(ranks, recipe, tmp_path / "whole")
    words = torchrun(recipe, tmp_path / "killed")
    for _ in range(2):
        before = steps_of(tmp_path / "killed")
        with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + 240
            while not (steps_of(tmp_path / "killed") > before and (tmp_path / "killed/checkpoints/.writing").exists()):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.001)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert len(workers) == 2
            for pid in (process.pid, *map(int, workers)):  # the launcher first, which would start others
                os.kill(pid, signal.SIGKILL)
        while any(is_alive(pid) for pid in workers):  # until then they hold the lock
            assert time.monotonic() < until
            time.sleep(0.01)
        left = tmp_path / "killed" / "checkpoints"
        assert not [damage(path) for path in left.glob("checkpoint-*") if damage(path)]
    run(ranks, recipe, tmp_path / "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_a_sharded_run_that_a_signal_stopped_goes_on_in_one_process(corpus: Path, tmp_path: Path) -> None:
    # At a small rate, for rounding in float32 grows from step to step.
    settings = {"training.max_steps": 60, "training.save_every": 7, "optimizer.learning_rate": 1e-4}
    recipe = replace_settings(recipe_of(corpus, 0.0), settings)
    parallel_checks.run(None, recipe, str(tmp_path / "one"), torch.float32)
    words = torchrun(replace_settings(recipe, {"parallelism.shard": 2}), tmp_path / "stopped")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 240
        while not steps_of(tmp_path / "stopped"):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        process.terminate()
        _, err = process.communicate(timeout=120)
    assert err.count("SIGTERM: saving a checkpoint after this step") == 1, err
    stopped = tmp_path / "stopped"
    step = steps_of(stopped)[-1]
    assert 7 <= step < 60
    assert damage(stopped / "checkpoints" / f"checkpoint-{step}") is None
    parallel_checks.run(None, recipe, str(stopped), torch.float32)
    assert_same_curve(stopped, tmp_path / "one", 1e-5)


def test_what_keeps_shards_from_being_written_is_told_in_a_line(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ranks.run(parallel_checks.check_unwritable, str(tmp_path / "file" / "shards"), size=2)
