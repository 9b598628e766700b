"""`cottention chat` as a pipe drives it."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cottention.cli.main import main
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chat") / "gpt"
    return tiny.save(directory, tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer())


def _enter(monkeypatch: pytest.MonkeyPatch, lines: bytes) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(lines), isatty=lambda: False))


def _chat(model: Path, *more: str) -> int:
    return main(["chat", "--model", str(model), "--max-new-tokens", "4", "--temperature", "0", *more])


def test_each_line_is_answered_and_words_of_its_own_are_obeyed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    state = tmp_path / "talk.state"
    _enter(
        monkeypatch, f"We the people\n/state\n of the\n/save {state}\n/reset\nWe the people\n/quit\nnever\n".encode()
    )
    assert _chat(model) == 0
    out = capsys.readouterr().out.split("\n")
    assert len(out) == 4  # three answers, each with its line's end
    assert out[0] == out[2]
    assert state.is_file()
    _enter(monkeypatch, b" of the\n")
    assert _chat(model, "--load-state", str(state)) == 0


def test_a_mistake_in_a_turn_is_told_and_the_next_turn_works(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    _enter(monkeypatch, b"/svae x\n/save\nWe\n")
    assert _chat(model) == 0
    captured = capsys.readouterr()
    assert len(captured.out.split("\n")) == 2
    assert "no word '/svae' here" in captured.err
    assert "there is no state to save" in captured.err


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        (b"We \xff\n", (), "line 1 of stdin is not UTF-8"),
        (b"", ("--max-new-tokens", "0"), "max_new_tokens must be at least 1; got 0"),
        (b"", ("--read", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_cannot_be_is_one_line(
    lines: bytes,
    more: tuple[str, ...],
    message: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    _enter(monkeypatch, lines)
    assert _chat(model, *more) == 2
    assert message in capsys.readouterr().err
