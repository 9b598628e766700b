"""A run that was killed and started again ends as one that never was: same metrics, same weights, bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from cottention.training.pretraining import pretrain
from tests.training import victims
from tests.training.helpers import Run, assert_same_run, in_child, metrics_of, steps_of

KILLED = -signal.SIGKILL

# Checkpoints come every 3 steps, of 4 micro batches each. (moment, times it comes, exit code, checkpoints then)
FATES = [
    ("a micro batch is done", 7, KILLED, []),  # before the first checkpoint
    ("a micro batch is done", 18, KILLED, [3]),
    ("an update is done", 1, KILLED, [3]),
    ("a line of metrics is half written", 2, KILLED, [3]),
    ("weights are half written", 1, KILLED, [3]),
    ("an optimizer state is half written", 4, KILLED, [3, 6]),  # torch.save writes three files of each checkpoint
    ("a checkpoint waits for its manifest", 1, KILLED, [3, 6]),
    ("SIGTERM comes", 4, 128 + signal.SIGTERM, [6, 7]),
    ("a checkpoint waits for its new name", 1, KILLED, [6, 7]),
    ("a checkpoint has its name", 2, KILLED, [7, 9, 12]),
    ("old checkpoints are gone", 1, KILLED, [12, 15]),
    ("Ctrl-C comes", 5, 128 + signal.SIGINT, [15, 17]),
    ("the model is half written", 1, KILLED, [18, 20]),
    (None, 1, 0, [18, 20]),
]


BERT_FATES = [
    ("an update is done", 5, KILLED, [3]),
    ("a checkpoint waits for its manifest", 2, KILLED, [3, 6]),
    ("SIGTERM comes", 5, 128 + signal.SIGTERM, [6, 8]),
    ("a micro batch is done", 25, KILLED, [9, 12]),
    (None, 1, 0, [18, 20]),
]


@pytest.mark.parametrize("finished", [pytest.param("gpt", marks=pytest.mark.slow), "bert"], indirect=True)
def test_a_run_killed_at_every_kind_of_moment_ends_like_one_that_never_was(finished: Run, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    expected = metrics_of(finished.directory)
    # What is saved and when does not depend on the architecture; a BERT shows that its masking goes on too.
    fates = FATES if finished.recipe.arch == "gpt" else BERT_FATES
    num_passes = finished.recipe.training.max_steps * 8 / finished.num_windows
    assert num_passes > 2, "the run reads its text several times"
    for moment, count, exit_code, checkpoints in fates:
        assert in_child(victims.run, finished.recipe, run_dir, moment, count) == exit_code, moment
        assert steps_of(run_dir) == checkpoints, moment
        assert moment != "the model is half written" or (run_dir / "loss_curve.png").exists()
        if (run_dir / "metrics.jsonl").exists() and moment != "a line of metrics is half written":
            written = metrics_of(run_dir)
            assert written == expected[: len(written)], moment
    assert_same_run(run_dir, finished.directory)


@pytest.mark.parametrize("file", ["model.safetensors", pytest.param("optimizer.pt", marks=pytest.mark.slow)])
def test_a_full_disk_keeps_the_checkpoint_before(file: str, finished_gpt: Run, tmp_path: Path) -> None:
    run_dir, said = tmp_path / "run", tmp_path / "said"
    newest = finished_gpt.directory / "checkpoints" / "checkpoint-20"
    sizes = {path.name: path.stat().st_size for path in newest.iterdir()}
    assert (
        sizes["tokenizer.json"] < sizes["model.safetensors"] - 64 < sizes["model.safetensors"] < sizes["optimizer.pt"]
    )
    assert in_child(victims.run, finished_gpt.recipe, run_dir, "SIGTERM comes", 12) == 128 + signal.SIGTERM
    assert steps_of(run_dir) == [3]
    assert in_child(victims.run_on_a_full_disk, finished_gpt.recipe, run_dir, sizes[file] - 64, said) == 2
    line = said.read_text()
    assert line.startswith(f"cannot write to {run_dir / 'checkpoints'}: "), line
    assert line.endswith("; what was saved before is intact"), line
    assert "\n" not in line
    assert steps_of(run_dir) == [3]
    assert not (run_dir / "checkpoints" / ".writing").exists(), "what was half written takes no room"
    pretrain(finished_gpt.recipe, output_dir=run_dir)
    assert_same_run(run_dir, finished_gpt.directory)
