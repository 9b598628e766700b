"""cottention data: text to corpora from the command line, figures for people and machines, one line for a mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import config as datasets_config

from cottention.cli.main import main
from cottention.data import load_tokenizer, open_corpus
from tests import tiny
from tests.subprocesses import run_python

TEXT = "The people came to the Union. They saw the States.\n\nCHAPTER\n\nIn order to form it, they stayed. It was done."


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a text, a BERT tokenizer and a GPT tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"body": "One row. And more."}\n{"body": "Another row. The last."}\n')
    tiny.wordpiece_tokenizer().save_pretrained("bert")
    tiny.bpe_tokenizer().save_pretrained("gpt")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["data", *words]) == code
    out, err = capsys.readouterr()
    if code:
        assert out == ""
        assert err.count("\n") == 1
        return err.removeprefix("cottention data: error: ").rstrip("\n")
    return out


def test_from_text_to_pairs(here, capsys):
    out = run(capsys, "build", "bert", "text.txt", "--output-dir", "sentences")
    assert out.startswith("sentences: bert-sentences, 1 rows in 1 shards (")
    assert "paragraphs dropped heading" in out
    assert "MB/s" in out
    flags = ["--tokenizer", "bert", "--max-length", "32", "--segments", "sentence", "--output-dir", "pairs", "--json"]
    report: dict[str, Any] = json.loads(run(capsys, "tokenize", "bert", "sentences", *flags))
    assert (report["kind"], report["rows"], report["counts"]["sentences"]) == ("bert-pairs", 2, 4)
    assert report["tokens_per_s"] > 0
    settings = open_corpus("pairs").manifest["settings"]
    assert (settings["max_length"], settings["segments"], settings["seed"]) == (32, "sentence", 0)
    assert json.loads(run(capsys, "tokenize", "bert", "sentences", *flags))["was_finished"]


def test_from_text_to_tokens(here, capsys):
    run(capsys, "build", "gpt", "rows.jsonl", "--text-column", "body", "--output-dir", "text")
    flags = ["--output-dir", "tokens", "--json"]
    report = json.loads(run(capsys, "tokenize", "gpt", "text", "--tokenizer", "gpt", *flags))
    assert (report["kind"], report["rows"], report["counts"]["documents"]) == ("gpt-tokens", 2, 2)
    flags = ["--tokenizer", "train", "--vocab-size", "270", "--split-by", "paragraph", "--output-dir", "straight"]
    run(capsys, "tokenize", "gpt", "text.txt", *flags)
    assert len(open_corpus("straight").dataset) == 3
    assert len(load_tokenizer("straight/tokenizer")) == 270
    run(capsys, "build", "gpt", "text.txt", "--max-document-chars", "0", "--output-dir", "all")
    assert open_corpus("all").manifest["settings"]["max_document_chars"] is None


def test_sentences_by_row(here, capsys):
    (here / "books.txt").write_text("one .\ntwo .\n\nthree .\nfour .\n")
    flags = ["--rows", "sentences", "--documents-by", "blank", "--output-dir", "books"]
    run(capsys, "build", "bert", "books.txt", *flags)
    assert open_corpus("books").dataset["sentences"][:] == [["one .", "two ."], ["three .", "four ."]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "say which: build, tokenize"),
        ("build", "say which: bert, gpt"),
        ("build bert", "missing sources, --output-dir"),
        ("build bert none.txt --output-dir x", "no such file or folder: none.txt"),
        ("build bert rows.jsonl --output-dir x", "rows.jsonl, line 1: no column 'text'; it has 'body'"),
        ("build bert wikipedia --output-dir x", "no file or folder wikipedia here, and the Hugging Face Hub cannot be"),
        ("build bert text.txt --output-dir gpt", "gpt is not empty (it holds"),
        ("build bert text.txt --rows lines --output-dir x", "must be one of documents, sentences; got 'lines'"),
        ("build bert text.txt --documents-by page --rows sentences --output-dir x", "documents_by must be one of file"),
        ("build bert text.txt --num-proc 0 --output-dir x", "num_proc must be at least 1; got 0"),
        ("build gpt text.txt --shard-size-mb 0 --output-dir x", "shard_size_mb must be at least 1; got 0"),
        ("build gpt text.txt --max-document-chars 5 --output-dir x", "nothing is left of the text: documents 1"),
        ("tokenize bert text.txt --tokenizer bert --output-dir x", "text.txt is a file, not a corpus directory"),
        ("tokenize bert gpt --tokenizer bert --output-dir x", "gpt is not a corpus directory"),
        ("tokenize gpt text.txt --tokenizer none --output-dir x", "no folder none here"),
        ("tokenize gpt text.txt --tokenizer bert --output-dir x", "the tokenizer has no eos_token"),
    ],
)
def test_a_mistake_is_one_line(here, capsys, words, message):
    assert message in run(capsys, *words.split(), code=2)
    assert not (here / "x").exists()


def test_help_loads_no_library():
    ran = run_python(
        "import json, sys; from cottention.cli.main import main\n"
        "for words in (['build', 'bert'], ['tokenize', 'gpt']): assert main(['data', *words, '--help']) == 0\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert "--documents-by" in ran.stdout
    assert {"datasets", "numpy", "pyarrow", "torch", "transformers"} & set(
        json.loads(ran.stdout.splitlines()[-1])
    ) == set()
