"""A fine-tuning that somebody or something has changed: one line, or made good; and one writer."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cottention.cli.main import main
from cottention.errors import CottentionError, DataError, SettingsError
from cottention.evaluation.glue_table import read_glue_run
from cottention.locks import sole_writer
from cottention.training import finetuning
from cottention.training.finetuning import FinetuneResult, finetune
from tests.damage import HARMS
from tests.glue_files import write_glue
from tests.training.test_finetuning import SETTINGS, save_bert


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"), num_rows=20)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def done(pretrained: Path, glue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    run(pretrained, glue, folder)
    return folder


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copied"))


def run(pretrained: Path | str, glue: Path | str, output: Path, **changes: Any) -> FinetuneResult:
    return finetune(pretrained, task="rte", data=glue, output_dir=output, **{"settings": SETTINGS, **changes})


def refused(*args: Any, **options: Any) -> str:
    with pytest.raises(CottentionError) as caught:
        run(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["metrics.json", "settings.yaml"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"{}", b"\xff\xfe", b"[" * 5000, b'{"best": 1, "seeds": [1]}']
)
def test_a_damaged_record_is_one_line(name: str, content: bytes, pretrained: Path, glue: Path, copied: Path) -> None:
    (copied / "rte" / name).write_bytes(content)
    said = refused(pretrained, glue, copied)
    assert "--overwrite starts" in said or "--overwrite to start again" in said or "JSON" in said, said


def test_a_digit_that_was_flipped_in_the_scores_is_one_line(
    pretrained: Path, glue: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "rte" / "metrics.json"
    written = path.read_text()
    path.write_text(json.dumps(json.loads(written)))  # laid out otherwise, and the same
    assert len(run(pretrained, glue, copied).metrics["seeds"]) == 1
    digit = re.search(r'"seed": (\d)', written)
    assert digit is not None
    path.write_text(f"{written[: digit.start(1)]}{(int(digit[1]) + 1) % 10}{written[digit.end(1) :]}")
    assert f"{path} was changed after it was written; choose another" in refused(pretrained, glue, copied)
    with pytest.raises(DataError, match=r"metrics\.json was changed after it was written"):
        read_glue_run(copied)
    assert main(["doctor", "--model", str(copied)]) == 1
    assert f"problem: {path}: was changed after it was written" in capsys.readouterr().out


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_model_is_one_line(harm: Any, pretrained: Path, glue: Path, copied: Path) -> None:
    harm(copied / "rte" / "model" / "model.safetensors", random.Random(0))
    assert "model.safetensors was changed after it was written" in refused(pretrained, glue, copied)
    (copied / "rte" / "model" / "model.safetensors").unlink()
    assert "model lacks model.safetensors; choose another" in refused(pretrained, glue, copied)


def test_a_damaged_result_is_written_again_and_a_damaged_best_model_refused(
    pretrained: Path, glue: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "_take_in", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(pretrained, glue, tmp_path)
    seed_dir = tmp_path / "rte" / "seed-0"
    weights = (seed_dir / "best" / "model.safetensors").read_bytes()
    HARMS[0](seed_dir / "best" / "model.safetensors", random.Random(0))
    assert f"{seed_dir}/best is damaged (model.safetensors was changed" in refused(pretrained, glue, tmp_path)
    (seed_dir / "best" / "model.safetensors").write_bytes(weights)
    for content in ("", "{", "[]", '{"seed": 0, "best_epoch": 9, "epochs": []}'):
        (seed_dir / "result.json").write_text(content)
        with monkeypatch.context() as patch:
            patch.setattr(finetuning, "_take_in", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(pretrained, glue, tmp_path)
    metrics = run(pretrained, glue, tmp_path).metrics
    assert metrics == json.loads((done / "rte" / "metrics.json").read_text())


def test_a_run_is_gone_on_with_from_another_place(pretrained: Path, glue: Path, copied: Path, monkeypatch: Any) -> None:
    expected = run(pretrained, f"{glue}/", copied).metrics
    monkeypatch.chdir(glue.parent)
    assert run(pretrained, glue.name, copied).metrics == expected
    assert run(os.path.relpath(pretrained), glue, copied).metrics == expected
    assert refused(pretrained, "nothere", copied).startswith("no folder nothere with GLUE's files")


def test_a_second_fine_tuning_in_one_directory_is_refused(pretrained: Path, glue: Path, tmp_path: Path) -> None:
    with sole_writer(tmp_path / "rte"):
        assert "rte is being written by process" in refused(pretrained, glue, tmp_path)
    with pytest.raises(SettingsError):
        run(pretrained, glue, tmp_path, seeds=[])
    assert list(tmp_path.iterdir()) == []
