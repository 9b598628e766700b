"""`--dry-run` of pretrain and finetune: figures that can be checked by counting, and no trace on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.cli.main import main
from cottention.data.glue_tasks import glue_task
from cottention.training.dry_run import dry_run, dry_run_finetuning
from cottention.training.finetune_settings import FinetuneSettings
from cottention.training.finetuning import build_classifier, task_run
from cottention.training.pretraining import build_model
from cottention.training.recipe_files import load_recipe, recipe_text, replace_settings
from tests import tiny
from tests.glue_files import write_glue
from tests.training.helpers import tiny_recipe
from tests.training.test_finetuning import save_bert


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


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), num_rows=20)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def _said(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["finetune", *map(str, words)]) == code
    return capsys.readouterr()


def test_figures_of_a_fine_tuning_are_those_of_its_rows(bert: Path, glue: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(batch_size=8, epochs=3, max_length=32)
    run = task_run(bert, task="mnli", data=glue, output_dir=tmp_path / "runs", settings=settings)
    found = dry_run_finetuning(run, seeds=[1, 2])
    model = build_classifier(bert, glue_task("mnli"), seed=0)
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    assert model.bert.pooler is not None
    head = [*model.classifier.parameters(), *model.bert.pooler.parameters()]
    assert found.parameters["head"] == sum(parameter.numel() for parameter in head)
    assert set(found.parameters) == {"embeddings", "attention", "feed-forward", "norms", "head"}
    assert found.state_bytes == 16 * found.total
    assert found.num_rows == {"train": 20, "dev_matched": 20, "dev_mismatched": 20}
    assert (found.steps, found.epochs, found.batch_size, found.num_seeds) == (8, 3, 8, 2)
    assert found.run_s == pytest.approx(2 * 8 * found.step_s)
    assert 0 < found.step_s < 100
    # A layer keeps at least its input and what its feed-forward part is wide, of every token, of which a pair has five.
    config = model.config
    width = config.hidden_size + config.intermediate_size
    assert found.activation_bytes > config.num_hidden_layers * width * 8 * 5 * 4
    assert _files(tmp_path) == []


def test_memory_of_a_fine_tuning_grows_with_its_batch(bert: Path, glue: Path, tmp_path: Path) -> None:
    def kept(batch_size: int) -> int:
        settings = FinetuneSettings(batch_size=batch_size, max_length=32)
        run = task_run(bert, task="rte", data=glue, output_dir=tmp_path, settings=settings)
        return dry_run_finetuning(run, seeds=[0]).activation_bytes

    assert kept(16) > 3 * kept(4)


def test_the_command_tells_of_tasks_and_writes_nothing(
    bert: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = ["--model", bert, "--data", glue, "--output-dir", tmp_path / "runs", "--seeds", "1,2", "--dry-run"]
    words += ["--task", "rte,cola", "--batch-size", 8, "--epochs", 1, "--max-length", 32]
    before = _files(bert)
    lines = _said(capsys, *words)[0].splitlines()
    starts = ["parameters", "memory", "training", "time", "nothing was written"]
    starts = ["rows of RTE", *starts, "rows of CoLA", *starts, "all tasks"]
    assert [line.split(":")[0] for line in lines] == starts
    assert lines[0] == "rows of RTE: train 20, dev 20"
    assert lines[3] == "training: 3 steps of 8 rows a seed (epochs: 1), 6 in all (seeds: 2)"
    rte, cola = json.loads(_said(capsys, *words, "--json")[0])
    assert (rte["title"], rte["steps"], rte["num_rows"]) == ("RTE", 3, {"train": 20, "dev": 20})
    assert rte["run_s"] == pytest.approx(6 * rte["step_s"])
    assert rte["total_parameters"] == sum(rte["parameters"].values()) == cola["total_parameters"]
    assert (_files(tmp_path), _files(bert)) == ([], before)


@pytest.mark.parametrize("kind", ["labels", "gpt", "words", "similarity"])
def test_rows_of_ones_own(kind: str, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"the people {n}", "other": "of the Union", "label": "ab"[n % 2]} for n in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    words: list[Any] = ["--model", bert, "--data", data, "--output-dir", tmp_path / "run", "--max-length", 32]
    if kind == "gpt":
        words[1] = tiny.save(tmp_path / "gpt", tiny.gpt(dtype=torch.float32, std=0.02), tiny.bpe_tokenizer())
    elif kind == "words":
        words[3] = tmp_path / "rows.conll"
        words[3].write_text("\n\n".join("the O\nUnion B-PLACE" for _ in range(40)))
    elif kind == "similarity":
        words += ["--objective", "similarity", "--text-pair-column", "other"]
    before = _files(tmp_path)
    found = json.loads(_said(capsys, *words, "--batch-size", 6, "--epochs", 2, "--dry-run", "--json")[0])
    assert (found["num_rows"], found["steps"]) == ({"train": 36, "dev": 4}, 12)
    assert found["total_parameters"] > 0 < found["activation_bytes"]
    assert "other" not in found["parameters"]
    assert _files(tmp_path) == before


def test_a_mistake_is_told_as_by_the_run(
    bert: Path, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nthe people,a\nof the Union\n")
    (tmp_path / "few.csv").write_text("text,label\nthe people,a\n")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/thesis.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/settings.yaml").write_text("model: another\n")
    (tmp_path / "other/metrics.json").write_text("{}")
    task: list[Any] = ["--model", bert, "--task", "rte", "--data", glue, "--output-dir", tmp_path / "run"]
    own: list[Any] = ["--model", bert, "--max-length", 32, "--output-dir", tmp_path / "run", "--data"]
    few = [*own, tmp_path / "few.csv"]
    before = _files(tmp_path)
    for words, sign in [
        ([*task, "--task", "snli"], "task must be one of"),
        ([*task, "--data", tmp_path], "RTE"),
        ([*task, "--max-length", 9999], "max_length must be at most"),
        ([*task, "--seeds", "1,1"], "seeds must be different numbers"),
        ([*task, "--model", tmp_path], "config.json"),
        ([*own, tmp_path / "none.csv"], "none.csv"),
        ([*own, tmp_path / "rows.csv"], "row 2"),
        (few, "label"),
        ([*few, "--label-column", "stars"], "stars"),
        ([*few, "--objective", "similarity", "--text-pair-column", "label"], "too few"),
        ([*few, "--output-dir", tmp_path / "thesis"], "is not empty"),
        ([*few, "--output-dir", tmp_path / "other"], "holds a run of other settings: model"),
        ([*few, "--output-dir", tmp_path / "few.csv"], "few.csv"),
    ]:
        out, real = _said(capsys, *words, code=2)
        assert sign in real.splitlines()[-1]
        assert _said(capsys, *words, "--dry-run", code=2) == (out, real), words
    assert _files(tmp_path) == before
