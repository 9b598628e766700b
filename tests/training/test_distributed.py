"""Two processes train as one does: the same examples in the same steps, the same losses, one run directory.

Real processes under torchrun, on the CPU with gloo. Dropout is off where one process is compared with two: each process
drops out other units. Sums over processes add up in another order than sums over micro batches, hence the tolerances.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cottention.training.pretraining import pretrain
from cottention.training.recipe_files import recipe_text
from tests.training.helpers import assert_same_run, metrics_of, steps_of, tiny_recipe, weights_of
from tests.training.test_pair_training import SEED, pair_recipe, stories  # noqa: F401

pytestmark = pytest.mark.slow


def torchrun(recipe: Any, run_dir: Path, num_processes: int = 2) -> list[str]:
    """The words that start a run in several processes."""
    folder = run_dir.parent
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    words = ["pretrain", recipe.arch, "--config", str(folder / "recipe.yaml"), "--output-dir", str(run_dir), "--json"]
    return [*launcher, "-m", "cottention", *words]


def losses_of(run_dir: Path) -> list[float]:
    """Training and held-out losses, in their order."""
    return [line["loss" if "loss" in line else "val_loss"] for line in metrics_of(run_dir)]


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("gpt", {"data__reset_at_documents": True}),
        ("gpt", {"data__carry_state": True}),
        ("gpt", {"data__mode": "document"}),
        ("bert", {"model__next_sentence_head": True, "training__gradient_checkpointing": True}),
    ],
)
def test_two_processes_give_the_losses_of_one(arch: str, changes: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(arch, corpus, model__dropout=0.0, training__max_steps=12, **changes)
    pretrain(recipe, output_dir=tmp_path / "one")
    ran = subprocess.run(torchrun(recipe, tmp_path / "two"), capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)  # one process prints
    assert result["step"] == 12
    assert ran.stderr.count("32 tokens to train on") == 1
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [(line["step"], line["tokens"]) for line in two] == [(line["step"], line["tokens"]) for line in one]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-6)
    norms = [[line["grad_norm"] for line in lines if "loss" in line] for lines in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert steps_of(tmp_path / "two") == [9, 12]
    assert weights_of(tmp_path / "two" / "model").keys() == weights_of(tmp_path / "one" / "model").keys()


def test_two_processes_train_on_pairs_of_both_lengths_as_one_does(
    stories: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Of a long step's passes the gradients are exchanged once."""
    recipe = pair_recipe(stories, model__dropout=0.0, training__max_steps=12, training__seed=SEED)
    pretrain(recipe, output_dir=tmp_path / "one")
    ran = subprocess.run(torchrun(recipe, tmp_path / "two"), capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    one, two = (metrics_of(tmp_path / name) for name in ("one", "two"))
    assert [line["tokens"] for line in two] == [line["tokens"] for line in one]
    for name in ("loss", "mlm_loss", "nsp_loss", "val_mlm_loss", "val_nsp_loss"):
        ours, truth = ([line[name] for line in lines if name in line] for lines in (two, one))
        assert len(ours) > 1
        assert ours == pytest.approx(truth, rel=1e-6), name
    norms = [[line["grad_norm"] for line in lines if "loss" in line] for lines in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_signal_stops_all_processes_after_one_step_and_they_go_on_exactly(corpus: Path, tmp_path: Path) -> None:
    # A step of the log between checkpoints: each process has its share of the loss since the last line to restore, and
    # the states of its own lanes.
    settings = {"training__max_steps": 120, "training__save_every": 7, "training__log_every": 10}
    recipe = tiny_recipe("gpt", corpus, data__carry_state=True, data__carry_lanes=16, **settings)
    subprocess.run(torchrun(recipe, tmp_path / "whole"), capture_output=True, check=True, timeout=300)
    words = torchrun(recipe, tmp_path / "stopped")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 240
        while len(losses_of(tmp_path / "stopped") if (tmp_path / "stopped" / "metrics.jsonl").exists() else []) < 3:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGTERM)  # torchrun hands it to its processes, one after the other
        _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    stopped = steps_of(tmp_path / "stopped")[-1]
    assert 10 <= stopped < 120, err
    assert err.count("SIGTERM: saving a checkpoint after this step") == 1, err
    subprocess.run(torchrun(recipe, tmp_path / "stopped"), capture_output=True, check=True, timeout=300)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_micro_batches_are_divided_among_the_processes_and_a_run_goes_on_with_others(
    corpus: Path, tmp_path: Path
) -> None:
    """As in the packaged small recipes, whose step is one micro batch: two processes take half of it each."""
    settings = {"model__dropout": 0.0, "training__max_steps": 12, "training__global_batch_size": 6}
    recipe = tiny_recipe("gpt", corpus, training__micro_batch_size=6, **settings)
    pretrain(recipe, output_dir=tmp_path / "one")
    ran = subprocess.run(torchrun(recipe, tmp_path / "two"), capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("micro batches of 3 windows on each of 2 processes (training.micro_batch_size: 6)") == 1
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-6)
    assert "micro_batch_size: 6" in (tmp_path / "two" / "recipe.yaml").read_text()


def test_a_mistake_in_two_processes_ends_both(corpus: Path, tmp_path: Path) -> None:
    mistakes = [
        (tiny_recipe("gpt", tmp_path / "missing.txt"), "no such file or folder"),
        (
            tiny_recipe("gpt", corpus, training__global_batch_size=5, training__micro_batch_size=5),
            "training.global_batch_size must be a multiple of the 2 processes; got 5",
        ),
    ]
    for recipe, message in mistakes:
        ran = subprocess.run(
            torchrun(recipe, tmp_path / "run"), capture_output=True, text=True, check=False, timeout=120
        )
        assert ran.returncode != 0
        said = [line for line in ran.stderr.splitlines() if line.startswith("cottention")]
        lines = [line for line in said if line != "cottention FAILED"]  # torchrun's headline: the module and this word
        assert len(lines) == 1, ran.stderr
        assert lines[0].startswith(f"cottention pretrain: error: {message}")
        before, own, report = ran.stderr.partition("Traceback")
        assert own, "torchrun's"
        assert "Traceback" not in report, "torchrun's own is the only one"
        assert lines[0] in report, "and it ends with the line"
