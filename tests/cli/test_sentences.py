"""cottention next-sentence and cottention embed: files in, JSON lines or an array out, in order; clear mistakes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cottention.cli.main import main
from cottention.generation import embed_sentences, load_model_and_tokenizer, score_next_sentences
from cottention.models import CottentionBertForPreTraining
from tests import tiny
from tests.models.helpers import bert_config, randomised

PAIRS = [("the people", "of the United States"), ("Union", "order"), ("a more perfect Union", "the")]
TEXTS = [f"{first} {second}" for first, second in PAIRS]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny.wordpiece_tokenizer()
    model = randomised(CottentionBertForPreTraining(bert_config(vocab_size=len(tokenizer))), torch.float32)
    return tiny.save(tmp_path_factory.mktemp("models") / "nsp", model, tokenizer)


def run(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> str:
    capsys.readouterr()
    assert main([*map(str, words)]) == code
    return capsys.readouterr().out


def mistake(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.partition("error: ")[2].rstrip("\n")


def test_pairs_from_arguments_tsv_json_lines_and_stdin(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model_and_tokenizer(bert, "next-sentence")
    scores = score_next_sentences(model, tokenizer, PAIRS)
    expected = [
        {"first": first, "second": second, "follows": pytest.approx(score)}
        for (first, second), score in zip(PAIRS, scores, strict=True)
    ]
    tsv = "".join(f"{first}\t{second}\n" for first, second in PAIRS)
    (tmp_path / "pairs.tsv").write_text(tsv)
    lines = [json.dumps({"first": first, "second": second}) for first, second in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(tsv.encode())))
    for source in (tmp_path / "pairs.tsv", tmp_path / "pairs.jsonl", "-"):
        out = run(capsys, "next-sentence", "--model", bert, "--file", source, "--batch-size", 2)
        assert [json.loads(line) for line in out.splitlines()] == expected
    assert json.loads(run(capsys, "next-sentence", "--model", bert, *PAIRS[0])) == expected[0]


def test_vectors_as_json_lines_and_as_an_array(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model_and_tokenizer(bert, "encoder")
    expected = embed_sentences(model, tokenizer, TEXTS, normalize=True).numpy()
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    out = run(capsys, "embed", "--model", bert, tmp_path / "texts.txt", "--normalize", "--batch-size", 2)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, rtol=1e-5, atol=1e-6)
    words = ["embed", "--model", bert, tmp_path / "texts.jsonl", "--text-column", "body", "--normalize"]
    assert run(capsys, *words, "--output", tmp_path / "vectors.npy") == ""
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, rtol=1e-5, atol=1e-6)


def test_mistakes(bert: Path, bert_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.txt").write_text("a\tb\nonly one\n")
    (tmp_path / "bad.jsonl").write_text('{"first": "a"}\n')
    (tmp_path / "cut.jsonl").write_text('{"text": "a\n')
    score = ["next-sentence", "--model", bert]
    assert mistake(capsys, *score) == "give either two SENTENCEs or --file FILE (- reads stdin)"
    assert mistake(capsys, *score, "one") == "give two SENTENCEs; got 1"
    said = mistake(capsys, *score, "--file", tmp_path / "bad.txt")
    assert said == f"{tmp_path / 'bad.txt'}, pair 2: two sentences with a tab between expected; got 1"
    said = mistake(capsys, *score, "--file", tmp_path / "bad.jsonl")
    assert said == f"{tmp_path / 'bad.jsonl'}, pair 1: needs the texts 'first' and 'second'; it has first"
    said = mistake(capsys, *score, "--file", tmp_path / "cut.jsonl")
    assert said == f"{tmp_path / 'cut.jsonl'}, pair 1: not JSON"
    said = mistake(capsys, "next-sentence", "--model", bert_dir, "a", "b")
    assert said == f"{bert_dir} has no next-sentence head; pretrain with model.next_sentence_head"
    embed = ["embed", "--model", bert]
    assert mistake(capsys, *embed, tmp_path / "bad.jsonl") == f"{tmp_path / 'bad.jsonl'}, row 1: needs a text 'text'"
    assert mistake(capsys, *embed, tmp_path / "cut.jsonl") == f"{tmp_path / 'cut.jsonl'}, row 1: not JSON"
    said = mistake(capsys, *embed, tmp_path / "bad.txt", "--output", "vectors.txt")
    assert said == "--output must end in .npy; got 'vectors.txt'"
    assert "cannot be read" in mistake(capsys, *embed, tmp_path / "none.txt")


def test_the_end_of_an_embedding_says_how_many_texts_were_written(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("the people\n")
    capsys.readouterr()
    assert main(["embed", "--model", str(bert), str(tmp_path / "texts.txt"), "--output", str(tmp_path / "a.npy")]) == 0
    assert capsys.readouterr().err.endswith(f"1 text embedded: {tmp_path / 'a.npy'}\n")
