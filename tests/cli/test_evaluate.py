"""cottention evaluate perplexity: the library's figures, as a table or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.cli.main import main
from cottention.data import load_corpus
from cottention.evaluation import evaluate_perplexity
from cottention.generation import load_model_and_tokenizer
from tests import tiny


def run(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> tuple[str, str]:
    assert main(["evaluate", *map(str, words)]) == code
    return capsys.readouterr()


def mistake(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    out, err = run(capsys, *words, code=2)
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("cottention evaluate: error: ").rstrip("\n")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "held_out.txt").write_text("\n\n".join(tiny.TEXTS), encoding="utf-8")
    return tmp_path / "held_out.txt"


@pytest.mark.parametrize(
    ("flags", "corpus", "settings"),
    [
        ([], {}, {"context": 64}),
        (["--context", "7"], {}, {"context": 7}),
        (["--context", "7", "--stride", "3", "--batch-size", "2"], {}, {"context": 7, "stride": 3}),
        (["--context", "7", "--carry-state"], {}, {"context": 7, "carry_state": True}),
        (["--split-by", "paragraph"], {"split_by": "paragraph"}, {"context": 64}),
        (["--split-by", "line", "--device", "cpu"], {"split_by": "line"}, {"context": 64}),
    ],
)
def test_json_holds_what_the_library_finds(
    gpt_dir: Path, text: Path, capsys: pytest.CaptureFixture[str], flags: list[str], corpus: Any, settings: Any
) -> None:
    model, tokenizer = load_model_and_tokenizer(gpt_dir, "causal-lm")
    expected = evaluate_perplexity(model, tokenizer, load_corpus(text, **corpus), **settings).to_dict()
    out, _ = run(capsys, "perplexity", "--model", gpt_dir, "--data", text, "--json", *flags)
    found = json.loads(out)
    assert (found.pop("model"), found.pop("data")) == (str(gpt_dir), str(text))
    buckets = found.pop("by_position")
    assert buckets == [pytest.approx(bucket, rel=1e-6) for bucket in expected.pop("by_position")]
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_table_names_every_figure(gpt_dir: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["perplexity", "--model", gpt_dir, "--data", text]
    figures = json.loads(run(capsys, *flags, "--json")[0])
    out, _ = run(capsys, *flags)
    table, by_position = out.split("\n\n")
    lines = {line.split()[0]: line.split()[1] for line in table.splitlines()}
    assert set(lines) == set(figures) - {"model", "data", "by_position"}
    rows = [line.split() for line in by_position.splitlines()]
    assert rows[0] == ["position", "num_tokens", "nats_per_token", "perplexity"]
    assert [row[0] for row in rows[1:]] == ["0-63", "64-127"][: len(figures["by_position"])]
    assert rows[1][3] == f"{figures['by_position'][0]['perplexity']:,.4f}"
    assert lines["perplexity"] == f"{figures['perplexity']:,.4f}"
    assert lines["num_tokens"] == f"{figures['num_tokens']:,}"
    assert lines["carry_state"] == "no"


def test_a_column_of_jsonl_is_named(gpt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({"body": text}) for text in tiny.TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    flags = ["perplexity", "--model", gpt_dir, "--data", tmp_path / "rows.jsonl", "--json"]
    assert json.loads(run(capsys, *flags, "--text-column", "body")[0])["num_documents"] == 3
    assert "body" in mistake(capsys, *flags)


def test_a_diverged_model_has_no_figures_but_valid_json(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.gpt(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.bias[5] = float("nan")
    tiny.save(tmp_path / "model", model, tiny.bpe_tokenizer())
    out, _ = run(capsys, "perplexity", "--model", tmp_path / "model", "--data", text, "--json")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["perplexity"] is None
    assert found["by_position"][0]["perplexity"] is None
    assert "nan" in run(capsys, "perplexity", "--model", tmp_path / "model", "--data", text)[0]


def test_the_default_text_is_the_held_out_split(
    gpt_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(source: str, **_: Any) -> Any:
        asked.append(source)
        return [tiny.TEXTS[2]]

    monkeypatch.setattr("cottention.data.load_corpus", load, raising=False)
    for flags in ([], ["--data", "sotu"], ["--data", "sotu:test"]):
        found = json.loads(run(capsys, "perplexity", "--model", gpt_dir, "--json", *flags)[0])
        assert found["data"] == asked[-1]
    assert asked == ["sotu:validation", "sotu:validation", "sotu:test"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say which: perplexity, glue, harness"),
        (
            ["preplexity"],
            "score must be one of perplexity, glue, harness; got 'preplexity'; did you mean 'perplexity'?",
        ),
        (["perplexity"], "missing --model"),
        (["perplexity", "--model", "GPT", "--data", "TEXT", "--context", "0"], "context must be at least 1; got 0"),
        (
            ["perplexity", "--model", "GPT", "--data", "TEXT", "--batch-size", "0"],
            "batch_size must be at least 1; got 0",
        ),
        (
            ["perplexity", "--model", "GPT", "--data", "TEXT", "--context", "8", "--stride", "9"],
            "stride must be from 1 to the context of 8; got 9",
        ),
        (
            ["perplexity", "--model", "SOFTMAX", "--data", "TEXT", "--context", "65"],
            "a softmax model reads at most its 64 positions; got a context of 65",
        ),
        (
            ["perplexity", "--model", "SOFTMAX", "--data", "TEXT", "--carry-state"],
            "carry_state needs a cosine model, whose state has one size; got softmax",
        ),
        (["perplexity", "--model", "GPT", "--data", "no.txt"], "no such file or folder: no.txt"),
        (
            ["perplexity", "--model", "GPT", "--data", "TEXT", "--split-by", "word"],
            "--split-by must be one of document, paragraph, line; got 'word'",
        ),
        (["perplexity", "--model", "GPT", "--contxt", "8"], "unknown option --contxt; did you mean '--context'?"),
        (
            ["perplexity", "--model", "BERT", "--data", "TEXT"],
            "BERT is a BERT, which fills masks; needed is a GPT, which generates text",
        ),
    ],
)
def test_a_mistake_is_one_line_and_nothing_on_stdout(
    gpt_dir: Path,
    softmax_gpt_dir: Path,
    bert_dir: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    places = {"GPT": gpt_dir, "SOFTMAX": softmax_gpt_dir, "BERT": bert_dir, "TEXT": text}
    said = mistake(capsys, *[places.get(word, word) for word in words])
    assert said.replace(str(bert_dir), "BERT") == message


def test_text_without_text_is_one_line(gpt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    flags = ["perplexity", "--model", gpt_dir, "--data", tmp_path / "blank.txt"]
    assert mistake(capsys, *flags) == f"{tmp_path / 'blank.txt'} holds no text"
