"""A run directory has one writer and holds nothing else; what is finished is whole, or made again, or refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cottention.errors import CheckpointError, CottentionError, SettingsError
from cottention.locks import sole_writer
from cottention.seals import MANIFEST, seal
from cottention.training.checkpoints import PARTS, newest_intact_checkpoint
from cottention.training.pretraining import pretrain
from cottention.training.recipe_files import recipe_text
from tests.damage import HARMS
from tests.forks import start_fork
from tests.training.conftest import Run
from tests.training.helpers import tiny_recipe


@pytest.fixture
def copied(finished_gpt: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_gpt.directory, tmp_path / "run"))


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_in_one_directory_touches_nothing(finished_gpt: Run, copied: Path) -> None:
    shutil.rmtree(copied / "model")
    held = f"import sys; from pathlib import Path; from cottention.locks import *\nwith sole_writer(Path({str(copied)!r})):\n print(1, flush=True); sys.stdin.read()"  # noqa: E501
    with start_fork("-c", held) as first:
        first.stdout.readline()
        before = everything_in(copied)
        for overwrite in (False, True):
            with pytest.raises(CottentionError, match=f"{copied} is being written by process {first.pid} on host "):
                pretrain(finished_gpt.recipe, output_dir=copied, overwrite=overwrite)
        assert everything_in(copied) == before
        first.kill()
    assert pretrain(finished_gpt.recipe, output_dir=copied).step == 20
    assert not (copied / ".lock").exists()


@pytest.mark.parametrize("names", [["emma.txt"], ["config.json", "model.safetensors"], ["thesis"], ["a.log", "b.txt"]])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_no_run_directory(
    names: list[str], overwrite: bool, corpus: Path, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / "texts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text("mine")
    before = everything_in(tmp_path)
    with pytest.raises(SettingsError, match=r"texts holds \S+ but no recipe\.yaml; choose another --output-dir"):
        pretrain(tiny_recipe("gpt", corpus), output_dir=tmp_path / "texts", overwrite=overwrite)
    assert everything_in(tmp_path) == before


def test_what_shells_and_schedulers_put_into_a_run_directory_is_no_obstacle(corpus: Path, tmp_path: Path) -> None:
    for name in ("slurm-17.out", "train.log", ".nfs0001"):
        (tmp_path / name).write_text("a line")
    assert pretrain(tiny_recipe("gpt", corpus, training__max_steps=1), output_dir=tmp_path).step == 1


@pytest.mark.parametrize(
    "change",
    [
        {"data.source": "/nowhere/text.txt"},
        {"data.tokenizer": "/nowhere/tokenizer"},
        {"model.vocab_size": 100},
        {"data.sequence_length": 100_000},
    ],
)
def test_a_mistake_leaves_no_directory(change: dict[str, Any], finished_gpt: Run, tmp_path: Path) -> None:
    from cottention.training.recipe_files import replace_settings

    with pytest.raises(CottentionError):
        pretrain(replace_settings(finished_gpt.recipe, change), output_dir=tmp_path / "runs" / "e1")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_does_not_fit_is_refused_before_any_text_is_read(
    finished_gpt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cottention.training import documents, text
    from cottention.training.recipe_files import replace_settings

    def read(*_args: object, **_options: object) -> None:
        raise AssertionError("text was read")

    monkeypatch.setattr(text, "open_documents", read)
    monkeypatch.setattr(text, "open_pairs", read)
    monkeypatch.setattr(documents, "load_corpus", read)
    folder = tmp_path / "tokenizer"
    shutil.copytree(finished_gpt.directory / "tokenizer", folder)
    recipe = replace_settings(finished_gpt.recipe, {"data.tokenizer": str(folder), "model.vocab_size": 288})
    with pytest.raises(SettingsError, match=r"model\.vocab_size must be at least"):
        pretrain(recipe, output_dir=tmp_path / "run")
    path = folder / "tokenizer_config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if "eos" not in name}
    path.write_text(json.dumps(config))
    with pytest.raises(SettingsError, match="the tokenizer has no end-of-text token"):
        pretrain(replace_settings(finished_gpt.recipe, {"data.tokenizer": str(folder)}), output_dir=tmp_path / "run")
    bert = tiny_recipe("bert", tmp_path / "never.txt", data__tokenizer=str(folder), model__vocab_size=512)
    with pytest.raises(SettingsError, match=r"the tokenizer has no cls_token, sep_token"):
        pretrain(bert, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "lost", ["model.safetensors", "config.json", pytest.param("tokenizer.json", marks=pytest.mark.slow)]
)
def test_a_run_that_lost_a_part_of_its_model_makes_it_again(
    lost: str, finished_gpt: Run, copied: Path, log_lines: list[str]
) -> None:
    whole = everything_in(copied / "model")
    (copied / "model" / lost).unlink()
    pretrain(finished_gpt.recipe, output_dir=copied)
    assert f"{copied / 'model'} lacks {lost}: it is made again" in log_lines
    assert everything_in(copied / "model") == whole


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_run_whose_model_was_changed_is_not_finished(
    harm: Callable[[Path, random.Random], None], name: str, finished_gpt: Run, copied: Path
) -> None:
    harm(copied / "model" / name, random.Random(0))
    with pytest.raises(
        CheckpointError, match=rf"{name} .*; without {copied / 'model'} the same command makes it again"
    ):
        pretrain(finished_gpt.recipe, output_dir=copied)


def test_a_run_without_its_model_makes_the_same_again(finished_gpt: Run, copied: Path) -> None:
    shutil.rmtree(copied / "model")
    pretrain(finished_gpt.recipe, output_dir=copied)
    assert everything_in(copied / "model") == everything_in(finished_gpt.directory / "model")


def test_a_model_is_readable_by_whom_the_umask_says(finished_gpt: Run) -> None:
    for path in finished_gpt.directory.rglob("*"):
        expected = 0o777 if path.is_dir() else 0o666
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE(path.stat().st_mode) == expected & ~umask, path


@pytest.mark.parametrize(
    "part",
    ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "run_state.json"],
)
def test_a_checkpoint_without_a_part_is_not_gone_on_from(part: str, copied: Path, log_lines: list[str]) -> None:
    before, newest = sorted((copied / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))[-2:]
    (newest / part).unlink()
    seal(newest)  # as if it had never had it
    assert newest_intact_checkpoint(copied / "checkpoints", PARTS) == before
    problem = "is not that of step" if part == "trainer_state.json" else "is missing"
    assert f"({part} {problem}" in log_lines[0]


@pytest.mark.parametrize("content", ["{}", "[]", '{"global_step": 3}', "[" * 100_000])
def test_a_trainer_state_of_another_step_is_not_gone_on_from(content: str, copied: Path) -> None:
    before, newest = sorted((copied / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))[-2:]
    (newest / "trainer_state.json").write_text(content)
    seal(newest)
    assert newest_intact_checkpoint(copied / "checkpoints", PARTS) == before


def test_a_run_state_of_a_fine_tuning_is_one_line(finished_gpt: Run, copied: Path) -> None:
    shutil.rmtree(copied / "model")
    newest = max((copied / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    (newest / "run_state.json").write_text('{"epochs": [], "loss_sum": 0, "rows": "x"}')
    seal(newest)
    with pytest.raises(CheckpointError, match=rf"{newest}/run_state\.json is damaged: no \w+; remove that checkpoint"):
        pretrain(finished_gpt.recipe, output_dir=copied)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"])
def test_every_signal_that_asks_to_end_saves_first(name: str, corpus: Path, tmp_path: Path) -> None:
    from cottention.training.trainer import PretrainingTrainer

    original, steps = PretrainingTrainer.training_step, []

    def signalled(*args: Any, **options: Any) -> Any:
        steps.append(0)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.Signals[name])
        return original(*args, **options)

    recipe = tiny_recipe("gpt", corpus, training__max_steps=9)
    # Shells start what runs in the background deaf to some of these.
    found = signal.signal(signal.Signals[name], signal.SIG_DFL)
    before = signal.getsignal(signal.Signals[name])
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PretrainingTrainer, "training_step", signalled)
            result = pretrain(recipe, output_dir=tmp_path / "run")
        after = signal.getsignal(signal.Signals[name])
    finally:
        signal.signal(signal.Signals[name], found)
    assert result.exit_code == 128 + signal.Signals[name]
    assert 0 < result.step < 9
    assert newest_intact_checkpoint(tmp_path / "run" / "checkpoints", PARTS) is not None
    assert after == before


def test_what_nohup_made_a_run_ignore_stays_ignored() -> None:
    from cottention.stopping import handlers

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in handlers()
        assert signal.SIGUSR1 in handlers()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in handlers()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_resumed_run_writes_the_same_model_directory(finished_gpt: Run, copied: Path) -> None:
    shutil.rmtree(copied / "model")
    shutil.rmtree(max((copied / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1])))
    pretrain(finished_gpt.recipe, output_dir=copied)
    found, expected = everything_in(copied / "model"), everything_in(finished_gpt.directory / "model")
    for files in (found, expected):
        del files["README.md"], files[MANIFEST]  # the card has seconds
    assert found == expected


def test_damaged_lines_of_metrics_are_said(finished_gpt: Run, copied: Path, log_lines: list[str]) -> None:
    path = copied / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = [b"\xff\xfe\n", b'{"step": 4, "loss": "x"}\n', b"[" * 100_000 + b"\n"]
    path.write_bytes(b"".join([lines[0], *damaged, *lines[1:]]))
    shutil.rmtree(copied / "model")
    pretrain(finished_gpt.recipe, output_dir=copied)
    assert f"{path}: 3 of {len(lines) + 3} lines are damaged and left out" in log_lines
    assert path.read_bytes() == b"".join(lines)


def test_a_recipe_of_the_users_own_may_lie_in_the_run_directory(corpus: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("gpt", corpus, training__max_steps=1)
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe))
    assert pretrain(recipe, output_dir=tmp_path).step == 1


def test_a_run_may_be_begun_inside_a_lock_of_its_own(corpus: Path, tmp_path: Path) -> None:
    with sole_writer(tmp_path / "run"):
        assert pretrain(tiny_recipe("gpt", corpus, training__max_steps=1), output_dir=tmp_path / "run").step == 1
