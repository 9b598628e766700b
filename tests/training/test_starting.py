"""Runs that start from a model that exists, and finished ones that go further."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.cli.main import main
from cottention.errors import CottentionError
from cottention.training.optimizer import linear_schedule
from cottention.training.pretraining import build_model, pretrain
from cottention.training.recipe_files import load_recipe, recipe_text, replace_settings
from cottention.training.starting import open_start
from tests.training.helpers import Run, metrics_of, steps_of


def starting_from(run: Run, **changes: Any) -> Any:
    """The run's recipe, from its own model on; changes as {"training.max_steps": 3}, with __ for the dot."""
    model = str(run.directory / "model")
    own = {"training.init_from": model, "data.tokenizer": model}
    return replace_settings(run.recipe, {**own, **{key.replace("__", "."): value for key, value in changes.items()}})


def test_a_model_starts_with_the_weights_of_the_one_that_is_named(finished: Run) -> None:
    recipe = starting_from(finished)
    start = open_start(recipe)
    assert start is not None
    model = build_model(recipe)
    start.hand_over(model)
    for name, weights in start.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weights, rtol=0, atol=0)
    assert open_start(finished.recipe) is None


def test_training_goes_on_where_the_model_was(finished_gpt: Run, tmp_path: Path) -> None:
    recipe = starting_from(finished_gpt, training__max_steps=2, optimizer__learning_rate=1e-6)
    result = pretrain(recipe, output_dir=tmp_path / "run")
    assert result.metrics["val_loss"] == pytest.approx(finished_gpt.result.metrics["val_loss"], abs=1e-3)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.n_embd": 32}, "model.n_embd must be 16, as in "),
        ({"model.n_layer": 3}, "model.n_layer must be 2, as in "),
        ({"model.attention_type": "softmax"}, "model.attention_type must be cosine, as in "),
        ({"model.rotary_dim": 2}, "model.rotary_dim must be 4, as in "),
        ({"model.decay": "learned"}, "model.decay must be none, as in "),
        ({"data.tokenizer": "train"}, "data.tokenizer must be that of "),
        ({"training.init_from": "nowhere"}, "no directory nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_read(
    change: dict[str, Any], message: str, finished_gpt: Run, tmp_path: Path
) -> None:
    recipe = replace_settings(starting_from(finished_gpt), change)
    with pytest.raises(CottentionError) as caught:
        pretrain(replace_settings(recipe, {"data.source": str(tmp_path / "missing.txt")}), output_dir=tmp_path / "run")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_other_tokenizer_and_the_other_architecture_are_refused(finished_gpt: Run, finished_bert: Run) -> None:
    recipe = starting_from(finished_gpt, data__tokenizer=str(finished_bert.directory / "model"))
    with pytest.raises(CottentionError, match=r"^data.tokenizer must have the tokens of .*/model, which the run"):
        open_start(recipe)
    recipe = starting_from(finished_gpt, training__init_from=str(finished_bert.directory / "model"))
    with pytest.raises(CottentionError, match=r" is a BERT, which fills masks; needed is a GPT"):
        open_start(recipe)


def test_a_finished_run_goes_further(finished_gpt: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(finished_gpt.directory, tmp_path / "run")
    longer = replace_settings(finished_gpt.recipe, {"training.max_steps": 28})
    result = pretrain(longer, output_dir=folder, extend=True)
    assert (result.step, result.model_dir) == (28, folder / "model")
    before, after = metrics_of(finished_gpt.directory), metrics_of(folder)
    assert after[: len(before)] == before
    assert steps_of(folder)[-1] == 28
    warmup = longer.num_warmup_steps
    for entry in after[len(before) :]:
        if "learning_rate" in entry:  # of the update that led to this step
            factor = linear_schedule(entry["step"] - 1, num_warmup_steps=warmup, num_steps=28)
            next_factor = linear_schedule(entry["step"], num_warmup_steps=warmup, num_steps=28)
            rates = [1e-2 * factor, 1e-2 * next_factor]
            assert any(entry["learning_rate"] == pytest.approx(rate) for rate in rates)
    old, new = (folder / name / "model.safetensors" for name in ("model-20", "model"))
    assert old.read_bytes() == (finished_gpt.directory / "model" / "model.safetensors").read_bytes()
    assert new.read_bytes() != old.read_bytes()
    again = pretrain(longer, output_dir=folder)  # without the word: it is finished
    assert again.step == 28


def test_the_first_update_of_a_longer_run_counts(finished_gpt: Run, tmp_path: Path) -> None:
    """The shorter line had ended at a rate of zero, by which one more update would change nothing."""
    folder = shutil.copytree(finished_gpt.directory, tmp_path / "run")
    pretrain(replace_settings(finished_gpt.recipe, {"training.max_steps": 21}), output_dir=folder, extend=True)
    old, new = (folder / name / "model.safetensors" for name in ("model-20", "model"))
    assert new.read_bytes() != old.read_bytes()


def test_what_cannot_go_further_is_one_line(finished_gpt: Run, finished_bert: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(finished_gpt.directory, tmp_path / "run")
    longer = replace_settings(finished_gpt.recipe, {"training.max_steps": 28})
    with pytest.raises(CottentionError, match=r"holds a run of another recipe: training.seed \(0 there, 1 now\)"):
        pretrain(replace_settings(longer, {"training.seed": 1}), output_dir=folder, extend=True)
    shorter = replace_settings(finished_gpt.recipe, {"training.max_steps": 10})
    with pytest.raises(CottentionError, match=r"training.max_steps \(20 there, 10 now\)"):
        pretrain(shorter, output_dir=folder, extend=True)
    by_the_clock = replace_settings(finished_gpt.recipe, {"training.minutes": 5.0})
    clocked = shutil.copytree(finished_gpt.directory, tmp_path / "clocked")
    (clocked / "recipe.yaml").write_text(recipe_text(by_the_clock))
    with pytest.raises(CottentionError, match=r"^--extend needs a run without training.minutes; got 5"):
        pretrain(replace_settings(by_the_clock, {"training.max_steps": 28}), output_dir=clocked, extend=True)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CottentionError, match=r"^--extend needs a checkpoint to go on from; .*/run has none"):
        pretrain(longer, output_dir=folder, extend=True)
    assert (folder / "model").is_dir()
    bert = shutil.copytree(finished_bert.directory, tmp_path / "bert")
    changes: dict[str, Any] = {"data.mlm_probability_start": 0.3}
    (bert / "recipe.yaml").write_text(recipe_text(replace_settings(finished_bert.recipe, changes)))
    changes["training.max_steps"] = 28
    with pytest.raises(CottentionError, match=r"^--extend needs a run without data.mlm_probability_start"):
        pretrain(replace_settings(finished_bert.recipe, changes), output_dir=bert, extend=True)


@pytest.mark.parametrize("flag", ["--init-from", "--init_from"])
def test_the_command_takes_the_tokenizer_along_and_a_dry_run_writes_nothing(
    flag: str, finished_gpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished_gpt.directory.parent)
    config = str(finished_gpt.directory / "recipe.yaml")
    words = ["pretrain", "gpt", "--config", config, flag, "run/model", "--output-dir", str(tmp_path / "new")]
    assert main([*words, "--dry-run"]) == 0
    assert "parameters: " in capsys.readouterr().out
    assert main([*words, "--dry-run", "--model.n_layer", "3"]) == 2
    assert "model.n_layer must be 2, as in " in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    assert main([*words, "--training.max-steps", "2"]) == 0
    recipe = load_recipe(tmp_path / "new" / "recipe.yaml")
    model = str(finished_gpt.directory.resolve() / "model")
    assert (recipe.training.init_from, recipe.data.tokenizer) == (model, model)
