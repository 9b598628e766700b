"""cottention evaluate glue: the tables of runs, one model's scores, the files for the server, the mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from cottention.cli.evaluate_glue import _max_length
from cottention.cli.main import main
from cottention.data.glue_tasks import GLUE_TASKS
from cottention.training.finetune_settings import FinetuneSettings
from cottention.training.finetuning import finetune
from tests.glue_files import write_glue

SETTINGS = FinetuneSettings(max_length=32, epochs=1, batch_size=8)


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), num_rows=8)


@pytest.fixture(scope="module")
def run_dir(bert_dir: Path, glue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All nine tasks, fine-tuned."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    for task in GLUE_TASKS:
        finetune(bert_dir, task=task, data=glue, output_dir=folder, settings=SETTINGS)
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["evaluate", "glue", *map(str, words)]) == code
    return capsys.readouterr()


def mistake(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    out, err = run(capsys, *words, code=2)
    assert out == ""
    return err.splitlines()[-1].removeprefix("cottention evaluate: error: ")


def test_the_tables_of_runs(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "--runs", run_dir, run_dir / "rte", "--markdown", tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == out
    assert out.count("| published cosine") == 2
    assert out.count("| tiny (cosine, 1 seed)") == 2
    assert out.count("| rte (cosine, 1 seed)") == 2
    as_json = json.loads(run(capsys, "--runs", run_dir, "--json")[0])
    (found,) = as_json["runs"]
    expected = json.loads((run_dir / "rte/metrics.json").read_text())["best"]["score"]
    assert found["official"]["RTE"]["accuracy"] == expected
    assert len(found["official"]) == 10
    assert as_json["published"]["published cosine"]["RTE"] == 66.4


def test_one_model_scores_as_its_run_did(run_dir: Path, glue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "--model", run_dir / "mnli/model", "--task", "mnli", "--data", glue, "--json")
    splits = json.loads(out)["splits"]
    recorded = json.loads((run_dir / "mnli/metrics.json").read_text())["seeds"][0]["epochs"][0]["splits"]
    assert list(splits) == ["dev_matched", "dev_mismatched"]
    for split in splits:
        assert splits[split]["official"] == pytest.approx(recorded[split]["official"])
    # Rows are cut where the run cut them.
    assert [_max_length(Namespace(max_length=given), run_dir / "mnli") for given in (None, 7)] == [32, 7]
    out, _ = run(capsys, "--model", run_dir / "cola/model", "--task", "cola", "--data", glue)
    assert [line.split(" ")[0] for line in out.splitlines()] == ["dev", "dev"]
    assert "(official): mcc " in out
    assert "(as published): accuracy " in out


def test_the_files_for_the_server(
    run_dir: Path, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "--runs", run_dir, "--data", glue, "--submission", tmp_path / "sub")
    files = {path.name: path.read_text().splitlines() for path in (tmp_path / "sub").iterdir()}
    names = ["AX", "CoLA", "MNLI-m", "MNLI-mm", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B", "WNLI"]
    assert sorted(files) == [f"{name}.tsv" for name in names]
    for name, (header, *rows) in files.items():
        assert header == "index\tprediction"
        assert [row.split("\t")[0] for row in rows] == ["0", "1", "2", "3", "4"]
        predictions = {row.split("\t")[1] for row in rows}
        if name == "STS-B.tsv":
            assert all(0 <= float(value) <= 5 and len(value) == 5 for value in predictions)
        elif name in ("AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"):
            assert predictions <= {"entailment", "neutral", "contradiction"}
        elif name in ("QNLI.tsv", "RTE.tsv"):
            assert predictions <= {"entailment", "not_entailment"}
        else:
            assert predictions <= {"0", "1"}


def test_no_test_rows_no_file(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_glue(tmp_path / "glue", num_rows=8, tests=False)
    words = ["--model", run_dir / "rte/model", "--task", "rte", "--data", data, "--submission", tmp_path / "sub"]
    _, err = run(capsys, *words)
    assert f"RTE: no test rows in {data}, so nothing is written for the server" in err
    assert not (tmp_path / "sub").exists()


def test_mistakes(
    run_dir: Path, bert_dir: Path, glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mistake(capsys) == "give either --runs or --model with --task"
    assert mistake(capsys, "--runs", run_dir, "--model", bert_dir) == "give either --runs or --model with --task"
    assert mistake(capsys, "--model", bert_dir) == "--model needs --task"
    assert "task must be one of cola" in mistake(capsys, "--model", bert_dir, "--task", "snli")
    said = mistake(capsys, "--model", bert_dir, "--task", "rte", "--data", glue)
    assert said == f"{bert_dir} has no classifier; fine-tune it first: cottention finetune"
    said = mistake(capsys, "--model", run_dir / "mnli/model", "--task", "rte", "--data", glue)
    assert said == "RTE needs a model with 2 outputs; got 3"
    assert "holds no finished run" in mistake(capsys, "--runs", tmp_path)
    assert mistake(capsys, "--runs", run_dir, run_dir, "--submission", tmp_path) == "--submission needs one run; got 2"
    assert mistake(capsys, "--runs", run_dir, "--batch-size", 0) == "--batch-size must be at least 1; got 0"
    long = ["--model", run_dir / "rte/model", "--task", "rte", "--data", glue, "--max-length", 65]
    assert mistake(capsys, *long) == "max_length must be at most the model's 64 positions; got 65"
