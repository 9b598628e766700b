"""cottention finetune: tasks one after the other, settings from file and flags, the mistakes a user makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cottention.cli.finetune import build_parser
from cottention.cli.main import main
from cottention.training.finetune_settings import FinetuneSettings
from tests.glue_files import write_glue

QUICK = ["--max-length", 32, "--epochs", 1, "--batch-size", 8]


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), num_rows=8)


def run(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> tuple[str, str]:
    assert main(["finetune", *map(str, words)]) == code
    return capsys.readouterr()


def mistake(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    out, err = run(capsys, *words, code=2)
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("cottention finetune: error: ")]
    assert len(lines) == 1
    assert err.endswith(f"{lines[0]}\n")
    return lines[0].removeprefix("cottention finetune: error: ")


def test_tasks_are_trained_one_after_the_other(
    bert_dir: Path, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model", bert_dir, "--data", glue, "--output-dir", tmp_path]
    out, err = run(capsys, *where, "--task", "cola,mnli", "--seeds", "1,2", *QUICK)
    cola, mnli, following = out.splitlines()
    assert cola.startswith("cola: dev mcc ")
    assert cola.endswith(f": {tmp_path / 'cola/model'}")
    assert mnli.startswith("mnli: dev_matched accuracy ")
    assert "; dev_mismatched accuracy " in mnli
    assert following == f"next: cottention evaluate glue --runs {tmp_path}"
    assert "CoLA, seed 2, epoch 1 of 1: training loss " in err
    metrics = json.loads((tmp_path / "cola/metrics.json").read_text())
    assert [seed["seed"] for seed in metrics["seeds"]] == [1, 2]
    # Done already: nothing is trained again, and the result is the same.
    out, err = run(capsys, *where, "--task", "cola", "--seeds", "1,2", "--json", *QUICK)
    assert json.loads(out) == [metrics | {"model_dir": str(tmp_path / "cola/model")}]
    assert "CoLA, seed 1 is done already" in err


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("epochs: 7\nmax_grad_norm: 1.0\nfrom_scratch: true\n")
    words = ["--config", str(tmp_path / "mine.yaml"), "--model", "m", "--task", "cola", "--epochs", "2"]
    given = build_parser().parse_args(words)
    assert (given.epochs, given.max_grad_norm, given.from_scratch, given.batch_size) == (2, 1.0, True, 32)


def test_the_packaged_settings_are_the_defaults() -> None:
    given = build_parser().parse_args(["--config", "glue", "--model", "m", "--task", "cola"])
    defaults = FinetuneSettings().as_dict()
    assert {name: given[name] for name in defaults} == defaults
    assert (defaults["batch_size"], defaults["learning_rate"], defaults["epochs"], defaults["schedule"]) == (
        32,
        5e-5,
        4,
        "constant",
    )  # as published
    recipe = Path(__file__).parents[2] / "src/cottention/recipes/glue.yaml"
    assert yaml.safe_load(recipe.read_text()).items() <= defaults.items()


def test_mistakes(
    bert_dir: Path, gpt_dir: Path, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: Any, model: Path = bert_dir, task: str = "cola") -> str:
        return mistake(capsys, "--model", model, "--data", glue, "--output-dir", tmp_path / "o", "--task", task, *words)

    assert said(task="snli") == (
        "task must be one of cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli; got 'snli'; did you mean 'wnli'?"
    )
    assert said("--seeds", "one") == "--seeds must be numbers with commas between them; got 'one'"
    assert said("--epochs", "0") == "epochs must be positive; got 0"
    assert said("--ephocs", "2") == "unknown option --ephocs; did you mean '--epochs'?"
    assert said(*QUICK, model=gpt_dir) == f"{gpt_dir} is a GPT, which generates text; needed is a BERT"
    assert said("--config", "gleu") == "--config must be a file or `glue`; got 'gleu'"
    (tmp_path / "bad.yaml").write_text("epoch: 2\n")
    expected = f"{tmp_path / 'bad.yaml'} has no key 'epoch'; did you mean 'epochs'?"
    assert said("--config", tmp_path / "bad.yaml") == expected
    (tmp_path / "list.yaml").write_text("- 2\n")
    assert (
        said("--config", tmp_path / "list.yaml") == f"{tmp_path / 'list.yaml'} must hold `name: value` lines; got [2]"
    )
    assert said(model=bert_dir) == "max_length must be at most the model's 64 positions; got 128"
