"""Mistakes that newcomers made, each told in one line that helps, and ways of writing that are simply taken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cottention
from cottention.cli import pretrain
from cottention.cli.main import main
from cottention.data import building
from cottention.errors import CheckpointError, DataError, SettingsError
from cottention.generation.loading import choose_device
from cottention.generation.source import resolve_directory
from cottention.stopping import Stopped
from tests.subprocesses import run_python


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err.partition(": error: ")[2].rstrip("\n")


def parsed(*words: str) -> Any:
    return pretrain.build_parser().parse_args(["gpt", *words]).gpt


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        (["--training.max-steps", "7"], "training.max_steps", 7),
        (["--training.max-steps=7"], "training.max_steps", 7),
        (["--training.max_steps", "7"], "training.max_steps", 7),
        (["--output_dir", "here"], "output_dir", "here"),
        (["--data.source", "a.txt", "b c.txt"], "data.source", ["a.txt", "b c.txt"]),
        (["--data.source", "a.txt"], "data.source", "a.txt"),
        (["--data.source", "[a.txt, b.txt]"], "data.source", ["a.txt", "b.txt"]),
        (["--data.validation", "1.txt", "2.txt", "--overwrite"], "data.validation", ["1.txt", "2.txt"]),
        (["--optimizer.betas", "0.9", "0.95"], "optimizer.betas", (0.9, 0.95)),
        (["--optimizer.betas", "[0.9,0.95]"], "optimizer.betas", (0.9, 0.95)),
    ],
)
def test_ways_of_writing_a_setting(words: list[str], key: str, expected: Any) -> None:
    value = parsed(*words)[key]
    assert (tuple(value) if isinstance(expected, tuple) else value) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pretrain --config quickstart_gpt", "say which first: cottention pretrain gpt --config quickstart_gpt"),
        ("pretrain --config=quickstart_bert", "say which first: cottention pretrain bert --config=quickstart_bert"),
        ("pretrain --training.max_steps 5 gpt", "say which first, before the options: gpt, bert"),
        ("pretrain", "say which: gpt, bert"),
        ("pretrain gtp", "arch must be one of gpt, bert; got 'gtp'; did you mean 'gpt'?"),
        ("pretrain gpt text.txt", "unexpected argument 'text.txt'"),
        (
            "pretrain gpt --training.maxsteps 5",
            "unknown option --training.maxsteps; did you mean '--training.max_steps'?",
        ),
        ("pretrain gpt --training.max_steps 5 6", "training.max_steps: expected int; got '[5, 6]'"),
        (
            "pretrain gpt --optimizer.betas 0.9",
            "optimizer.betas: expected a list of values such as [0.9, 0.95]; got '0.9'",
        ),
        ("pretrain gpt --print_shtab=bash", "unknown option --print_shtab"),
        ("generate --print_shtab=bash", "unknown option --print_shtab"),
        ("generate --print_config", "unknown option --print_config"),
        ("generate --model nowhere --prompt a --max-new-tokens -5", "max_new_tokens must be at least 1; got -5"),
        ("generate --model nowhere --prompt a --top-k 0", "top_k must be at least 1; got 0"),
        ("generate --model nowhere --prompt a --top-p 1.5", "top_p must be above 0 and at most 1; got 1.5"),
        ("generate --model nowhere --prompt a --temperature -1", "temperature must be 0 or more; got -1.0"),
        ("generate --model nowhere --prompt-file /dev/null", "/dev/null holds no text; --prompt '' starts a new one"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(words: str, message: str, capsys) -> None:
    assert refused(words.split(), capsys) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "device 'gpu' cannot be used here; there are cpu, cuda, cuda:1 and the like; did you mean 'cuda'?"),
        ("gpu:0", "device 'gpu:0' cannot be used here; there are cpu, cuda, cuda:1 and the like; did you mean 'cuda'?"),
        ("cpuu", "device 'cpuu' cannot be used here; there are cpu, cuda, cuda:1 and the like; did you mean 'cpu'?"),
        ("nonsense", "device 'nonsense' cannot be used here; there are cpu, cuda, cuda:1 and the like"),
    ],
)
def test_a_device_that_is_none_is_not_told_by_a_list_of_twenty(name: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        choose_device(name)
    assert str(caught.value) == message


def test_offline_says_why(monkeypatch, tmp_path: Path) -> None:
    from cottention.data import load_tokenizer

    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set$"):
        resolve_directory("nobody/such-a-model", file_patterns=["*.json"])
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set$"):
        load_tokenizer("nobody/such-a-tokenizer")


def test_what_stands_behind_next_can_be_pasted(tmp_path: Path) -> None:
    """A folder's name may have spaces."""
    from cottention.training.pretraining import PretrainResult

    model = tmp_path / "läuf 1" / "model"
    result = PretrainResult(run_dir=model.parent, model_dir=model, step=1, metrics={})
    line = pretrain._summary("gpt", result).splitlines()[-1]
    assert f"--model '{model}' --prompt" in line


def test_the_package_lists_what_it_has_and_says_where_the_rest_is() -> None:
    public = {name for name in dir(cottention) if not name.startswith("__")}
    assert public == {*cottention._SUBPACKAGES, *cottention.__all__} - {"__version__"}
    with pytest.raises(AttributeError, match=r"it is in cottention\.models"):
        _ = cottention.CottentionGPTConfig
    assert not hasattr(cottention, "CottentionBertModel")
    for name, home in (("CottentionGPTConfig", "models"), ("load_recipe", "training"), ("load_tokenizer", "data")):
        ran = run_python(f"from cottention import {name}", succeed=False)
        assert ran.stderr.splitlines()[-1].endswith(f"has no attribute {name!r}; it is in cottention.{home}")
    ran = run_python("from cottention import zzz", succeed=False)
    assert "cannot import name 'zzz' from 'cottention'" in ran.stderr
    run_python("""
        import cottention
        assert not hasattr(cottention, "CottentionGPTConfig")
        assert not {"torch", "transformers"} & set(sys.modules)
    """)


def test_a_summary_says_how_often_the_next_sentence_is_right(tmp_path: Path) -> None:
    from cottention.training.pretraining import PretrainResult

    metrics = {"val_loss": 5.0, "val_ppl": 148.41, "val_accuracy": 0.25, "val_nsp_accuracy": 0.7512}
    result = PretrainResult(run_dir=tmp_path, model_dir=tmp_path / "model", step=1, metrics=metrics)
    said = "25.0% of the masked tokens right, 75.1% of the next sentences told right"
    assert pretrain._summary("bert", result).splitlines()[1].endswith(said)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped(signal.SIGTERM), 143, "stopped by SIGTERM"),
    ],
)
def test_a_build_that_was_ended_says_how_it_goes_on(
    error: BaseException, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def end(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(building, "build_documents", end)
    (tmp_path / "text.txt").write_text("A text.")
    words = ["data", "build", "gpt", str(tmp_path / "text.txt"), "--output-dir", str(tmp_path / "corpus")]
    assert main(words) == code
    assert capsys.readouterr().err == f"cottention data: error: {said}; the same command goes on\n"


@pytest.mark.parametrize("rank", ["0", "x"])
def test_a_rank_that_is_no_number_is_the_first(rank: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "cottention", "nonsense"],
        env={**os.environ, "RANK": rank},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
