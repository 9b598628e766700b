"""Vectors of a file's texts in every form, the same in all; an index finds what is nearest and knows its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cottention.cli.main import main
from cottention.errors import CheckpointError, DataError
from cottention.generation import embed_sentences, load_model_and_tokenizer
from cottention.generation.embedded_files import embed_file, search_file
from cottention.models import CottentionBertForPreTraining
from tests import tiny
from tests.models.helpers import bert_config, randomised

WORDS = ["the", "people", "of", "United", "States", "order", "form", "more", "perfect", "Union"]
TEXTS = [" ".join(WORDS[at % 10] for at in range(start, start + 1 + start % 5)) for start in range(30)]


def save(folder: Path, seed: int = 0, **settings: Any) -> Path:
    tokenizer = tiny.wordpiece_tokenizer()
    torch.manual_seed(seed)
    model = CottentionBertForPreTraining(bert_config(vocab_size=len(tokenizer), **settings))
    return tiny.save(folder, randomised(model, torch.float32) if not seed else model, tokenizer)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "notes.csv"
    path.write_text("number,note\n" + "".join(f"n{at},{text}\n" for at, text in enumerate(TEXTS)))
    return path


def test_every_form_holds_the_same_vectors(bert: Path, table: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(bert, "encoder")
    expected = embed_sentences(model, tokenizer, TEXTS).numpy()
    options: dict[str, Any] = {"text_column": "note", "id_column": "number", "batch_size": 2}  # windows of 16 texts
    for ending in ("npy", "jsonl", "parquet"):
        assert embed_file(bert, table, output=tmp_path / f"v.{ending}", **options) == 30
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["v.jsonl", "v.npy", "v.parquet"]
    array = np.load(tmp_path / "v.npy")
    assert array.dtype == np.float32
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    rows = pq.read_table(tmp_path / "v.parquet").to_pylist()
    for found in (array, [line["embedding"] for line in lines], [row["embedding"] for row in rows]):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for each in (lines, rows):
        assert [row["text"] for row in each] == TEXTS
        assert [row["id"] for row in each] == [f"n{at}" for at in range(30)]


def test_a_search_finds_what_is_nearest(bert: Path, table: Path, tmp_path: Path) -> None:
    index = tmp_path / "i.parquet"
    embed_file(bert, table, output=index, text_column="note", id_column="number")
    model, tokenizer = load_model_and_tokenizer(bert, "encoder")
    unit = embed_sentences(model, tokenizer, TEXTS, normalize=True)
    scores = (unit @ unit[7]).numpy()
    hits = search_file(index, TEXTS[7], top_k=4)
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores, reverse=True)[:4], abs=1e-5)
    assert (hits[0].text, hits[0].key, hits[0].row) == (TEXTS[7], "n7", 8)
    assert len(search_file(index, "order", top_k=100)) == 30
    embed_file(bert, table, output=index, text_column="note", keep_texts=False, normalize=True)
    assert [(hit.row, hit.text) for hit in search_file(index, TEXTS[7], top_k=1)] == [(8, None)]


def test_an_index_knows_its_model(bert: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = tmp_path / "i.parquet"
    embed_file(bert, table, output=index, text_column="note")
    other = save(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="was made by another model than"):
        search_file(index, "order", model=other)
    copy = save(tmp_path / "copy")  # the same weights elsewhere
    assert search_file(index, "order", model=copy)[0].score == search_file(index, "order")[0].score
    assert main(["search", "--index", str(index), "--top-k", "2", "order"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    pq.write_table(pq.read_table(index).replace_schema_metadata(None), tmp_path / "bare.parquet")
    with pytest.raises(DataError, match="does not say which model made its vectors"):
        search_file(tmp_path / "bare.parquet", "order")
    with pytest.raises(DataError, match="is no index, which is a "):
        search_file(table, "order")


def test_nothing_is_written_where_a_row_is_none(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "order"}\n{"text": 3}\n')
    for ending in ("npy", "jsonl", "parquet"):
        with pytest.raises(DataError, match="row 2: needs a text 'text'"):
            embed_file(bert, tmp_path / "t.jsonl", output=tmp_path / f"v.{ending}", batch_size=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.jsonl"]


def test_with_rotary_positions_documents_have_any_length(tmp_path: Path, log_lines: list[str]) -> None:
    bert = save(tmp_path / "bert", position_embedding_type="rotary", max_position_embeddings=16)
    (tmp_path / "t.txt").write_text("order " * 300 + "\n" + "order " * 300 + "people\n")
    embed_file(bert, tmp_path / "t.txt", output=tmp_path / "v.npy")
    one, two = np.load(tmp_path / "v.npy")
    assert np.abs(one - two).max() > 1e-6  # the last word was read
    assert not [line for line in log_lines if "cut" in line]
    embed_file(bert, tmp_path / "t.txt", output=tmp_path / "v.npy", max_length=16)
    one, two = np.load(tmp_path / "v.npy")
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert "2 of 2 texts are longer than 16 tokens and were cut" in log_lines
