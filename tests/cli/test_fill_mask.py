"""cottention fill-mask: candidates for every mask, as text or as one JSON object a line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cottention.cli.main import main
from cottention.generation import fill_mask, load_model_and_tokenizer

TEXTS = ["The [MASK] of the United States", "for [MASK] [MASK] 東京"]


def run(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> tuple[str, str]:
    assert main(["fill-mask", *map(str, words)]) == code
    return capsys.readouterr()


def mistake(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    out, err = run(capsys, *words, code=2)
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("cottention fill-mask: error: ").rstrip("\n")


@pytest.fixture(scope="module")
def expected(bert_dir: Path) -> Any:
    """What the library finds, for the texts and a number of candidates."""
    model, tokenizer = load_model_and_tokenizer(bert_dir, "masked-lm")
    return lambda top_k: fill_mask(model, tokenizer, TEXTS, top_k)


def test_texts_are_shown_filled_with_candidates_below(
    bert_dir: Path, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = run(capsys, "--model", bert_dir, "--top-k", 2, *TEXTS)
    lines = []
    for filled in expected(2):
        lines.append(filled.best_text)
        for number, (first, second) in enumerate(filled.masks, start=1):
            shown = f"{first.token} {first.probability:.3f}, {second.token} {second.probability:.3f}"
            lines.append(f"  mask {number}: {shown}")
    assert out.splitlines() == lines
    assert "2 texts in " in err
    assert out == run(capsys, "--model", bert_dir, "--top-k", 2, "--batch-size", 1, "--device", "cpu", *TEXTS)[0]


def test_a_file_in_and_json_lines_out(
    bert_dir: Path,
    expected: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = f"{TEXTS[0]}\r\n\n{TEXTS[1]}\n"
    (tmp_path / "texts.txt").write_text(content, encoding="utf-8")
    out, _ = run(capsys, "--model", bert_dir, "--file", tmp_path / "texts.txt", "--json")
    assert [json.loads(line) for line in out.splitlines()] == [
        json.loads(json.dumps(filled.to_dict())) for filled in expected(5)
    ]
    assert "東京" in out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert run(capsys, "--model", bert_dir, "--file", "-", "--json")[0] == out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a [MASK]"], "missing --model"),
        (["--model", "BERT"], "give either TEXT or --file FILE (- reads stdin)"),
        (["--model", "BERT", "a [MASK]", "--file", "-"], "give either TEXT or --file FILE (- reads stdin)"),
        (["--model", "BERT", "The people"], "the text has no [MASK] to fill; got 'The people'"),
        (["--model", "BERT", "[MASK]", "The people"], "text 2 has no [MASK] to fill; got 'The people'"),
        (["--model", "BERT", "[MASK] " + "a " * 62], "the text has 65 tokens; this model has 64 positions"),
        (["--model", "BERT", "[MASK]\udcff"], "the text is not valid Unicode text (character 6)"),
        (["--model", "BERT", "[MASK]", "--top-k", "0"], "top_k must be from 1 to the vocabulary's 60; got 0"),
        (["--model", "BERT", "[MASK]", "--top-k", "few"], "top_k: expected int; got 'few'"),
        (["--model", "BERT", "[MASK]", "--topk", "3"], "unknown option --topk; did you mean '--top-k'?"),
        (["--model", "BERT", "--file", "no.txt"], "no.txt cannot be read: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_on_stdout(
    bert_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert mistake(capsys, *[str(bert_dir) if word == "BERT" else word for word in words]) == message


def test_a_wrong_model_is_one_line(gpt_dir: Path, bert_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(capsys, "--model", gpt_dir, "[MASK]") == (
        f"{gpt_dir} is a GPT, which generates text; needed is a BERT, which fills masks"
    )
    assert mistake(capsys, "--model", bert_dir.parent, "[MASK]").endswith(f"it holds the model {bert_dir}")
    assert "did you mean 'bert'?" in mistake(capsys, "--model", bert_dir.parent / "brt", "[MASK]")
