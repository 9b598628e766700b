"""`pretrain --dry-run`: figures that can be checked by counting, and no trace on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cottention.cli.main import main
from cottention.training.dry_run import dry_run
from cottention.training.pretraining import build_model
from cottention.training.recipe_files import load_recipe, recipe_text, replace_settings
from tests.training.helpers import tiny_recipe


@pytest.mark.parametrize("arch", ["gpt", "bert"])
def test_figures_are_those_of_the_recipe(arch: str, corpus: Path) -> None:
    recipe = tiny_recipe(arch, corpus)
    found = dry_run(recipe)
    model = build_model(recipe)
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    assert found.parameters["feed-forward"] == sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if ("mlp" in name or "intermediate" in name or ("output" in name and "attention" not in name))
        and "LayerNorm" not in name
    )
    assert set(found.parameters) == {"embeddings", "attention", "feed-forward", "norms", "head"}
    assert found.state_bytes == 16 * found.total
    assert (found.steps, found.tokens) == (20, 20 * 8 * 32)
    assert found.run_s == pytest.approx(20 * found.step_s)
    assert 0 < found.step_s < 100


def test_memory_of_a_micro_batch_grows_with_it_and_checkpointing_saves_most_of_it(corpus: Path) -> None:
    recipe = tiny_recipe("gpt", corpus)
    kept = dry_run(recipe).activation_bytes
    assert dry_run(replace_settings(recipe, {"training.micro_batch_size": 8})).activation_bytes == 4 * kept
    assert dry_run(replace_settings(recipe, {"training.gradient_checkpointing": True})).activation_bytes < kept / 2
    # A block keeps at least its input and what its feed-forward part is wide, of every token.
    assert kept > 2 * 2 * 32 * (16 + 32) * 4


def test_longer_windows_at_the_end_are_counted(corpus: Path) -> None:
    recipe = tiny_recipe("bert", corpus)
    longer = replace_settings(
        recipe, {"model.max_position_embeddings": 64, "data.long_sequence_length": 64, "data.long_fraction": 0.5}
    )
    assert dry_run(longer).tokens == 8 * 32 * (10 + 2 * 10)


def test_a_run_by_the_clock_has_the_steps_that_fit(corpus: Path) -> None:
    found = dry_run(replace_settings(tiny_recipe("gpt", corpus), {"training.minutes": 2.0}))
    assert found.run_s == pytest.approx(120, abs=found.step_s)
    assert found.tokens == found.steps * 8 * 32


def test_the_command_prints_and_writes_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(tiny_recipe("gpt", corpus)))
    words = ["pretrain", "gpt", "--config", str(recipe), "--output-dir", str(tmp_path / "run"), "--dry-run"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split(":")[0] for line in lines]
    assert starts == ["parameters", "memory", "training", "time", "nothing was written"]
    assert lines[2] == "training: 20 steps, 5,120 tokens at most"
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_parameters"] == dry_run(load_recipe(recipe)).total
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]
    assert main([*words, "--data.source", str(tmp_path / "none.txt")]) == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert main(words) == 2
    assert "holds thesis.txt but no recipe.yaml" in capsys.readouterr().err
