"""Tables of one's own: every kind to the same rows, and every fault told by its row or left out and counted."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from cottention.data.tables import LeftOut, check_table, read_table
from cottention.errors import DataError

ROWS = [("Fine, really.", "1"), ('He said "no".\nTwice.', "0"), ("naïve 東京 🙂", "1")]


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def cells(path: Path, **options: Any) -> list[list[Any]]:
    return [row.cells for row in read_table(path, **{"texts": ["text"], "values": ["label"], **options})]


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_table(path, **{"texts": ["text"], "values": ["label"], **options}))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path}", "F")


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame({"id": range(3), "text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]})


def test_every_kind_gives_the_rows_that_another_library_wrote(tmp_path: Path, frame: pd.DataFrame) -> None:
    expected = [list(row) for row in ROWS]
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.csv.gz", index=False)
    frame.to_csv(tmp_path / "b.csv", index=False, sep=";", encoding="utf-8-sig", lineterminator="\r\n")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.csv.gz", "b.csv", "a.jsonl", "a.parquet"):
        assert cells(tmp_path / name) == expected, name
    one_line = frame.assign(text=frame.text.str.replace("\n", " "))
    one_line.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    assert [text for text, _ in cells(tmp_path / "a.tsv")] == [text.replace("\n", " ") for text, _ in ROWS]


def test_quotes_of_a_tsv_that_does_not_quote_are_text(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", 'text\tlabel\n"Go," he said\t1\nhe said "go"\t0\n"quoted ""so"""\t1\n')
    assert [text for text, _ in cells(path)] == ['"Go," he said', 'he said "go"', 'quoted "so"']


def test_rows_are_numbered_as_people_count_them(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'text,label\n"a\nb",1\n\nc,0\n')
    assert [row.where.removeprefix(str(path)) for row in read_table(path, texts=["text"])] == [
        ", row 1 (line 2)",
        ", row 2 (line 5)",
    ]


def test_faults_of_a_csv(tmp_path: Path) -> None:
    def said(text: str | bytes, **options: Any) -> str:
        return refusal(written(tmp_path / "a.csv", text), **options)

    assert said("") == "F holds no rows"
    assert said("text,label\n") == "F holds no rows"
    assert said("Text,label\na,1\n") == "F: no column 'text'; it has 'Text', 'label'; did you mean 'Text'?"
    assert said("text,label,text\na,1,b\n") == "F: more than one column 'text'"
    assert said("text,label\na,1\nb,c,2\n") == (
        "F, row 2 (line 3): 2 cells expected, as the first line has names; got 3; --skip-malformed leaves such rows out"
    )
    assert said('text,label\na,1\n"b,2\nc,3\n') == (
        "F, row 2 (line 3): a quote is opened and not closed up to the end of the file"
    )
    assert said('text,label\n"a,1\nb,"2"\n').startswith(
        "F, row 1 (line 2): a quote is opened there, and what closes it"
    )
    assert said('text,label\n"a"b,1\n').startswith(
        "F, row 1 (line 2): behind a quote that ends a cell stands more text"
    )
    assert said("text,label\na,1\ncaf\xe9 au lait,0\n".encode("latin1")).startswith("F, line 3: not UTF-8 (byte 0xe9)")
    assert said(b"text,label\na\0b,1\n").startswith("F, line 2: a zero byte at column 2")
    assert "UTF-16" in said("text,label\na,1\n".encode("utf-16"))
    assert (
        said("text,label\n" + "a" * (1 << 24) + "b,1\n") == "F, line 2: longer than 16 MiB; one row per line expected"
    )
    assert said("text,label\na,1\n", values=["text"]) == "the column 'text' is asked for twice"


def test_a_quote_that_may_have_swallowed_rows_is_refused_even_where_rows_may_be_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", 'text,label\na,1\n"b,2\nc,3\n')
    assert "not closed" in refusal(path, left_out=LeftOut())


def test_rows_are_left_out_and_counted(tmp_path: Path, log_lines: list[str]) -> None:
    path = written(tmp_path / "a.csv", b'text,label\na,1\nb\nc\xff,0\n"d"e,1\nf,0\n')
    left_out = LeftOut()
    assert cells(path, left_out=left_out) == [["a", "1"], ["f", "0"]]
    assert left_out.count == 3
    left_out.report(path)
    assert f"{path}: 3 malformed rows are left out; the first: {path}, row 2 (line 3): 2 cells" in "\n".join(log_lines)


def test_faults_of_json_and_parquet(tmp_path: Path) -> None:
    def said(*lines: Any) -> str:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        return refusal(written(tmp_path / "a.jsonl", text))

    good = {"text": "a", "label": 1}
    assert (
        said(good, '{"text": "a')
        == "F, line 2: not JSON (Unterminated string starting at at column 10); one object per line expected"
    )
    assert said(good, [1]) == "F, line 2: one JSON object per line expected; got a list"
    assert said(good, {"text": 3}) == "F, line 2: the column 'text' must hold text; got a number"
    assert (
        said({"text": "a", "labels": 1})
        == "F, line 1: no column 'label'; it has 'text', 'labels'; did you mean 'labels'?"
    )
    pd.DataFrame({"text": [1, 2], "label": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet") == "F: the column 'text' must hold text; got int64"
    assert "it is not a whole parquet file" in refusal(written(tmp_path / "b.parquet", "PAR1 and nothing"))


def test_lists_come_from_json_and_parquet(tmp_path: Path) -> None:
    labels = [["x", "y"], [], ["y"]]
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": labels})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    for name in ("a.parquet", "a.jsonl"):
        assert [label for _, label in cells(tmp_path / name)] == labels


def test_lines_of_text_and_of_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one\r\n\ntwo,3"
    path = written(tmp_path / "a.txt", gzip.compress(text.encode()))
    path = path.rename(tmp_path / "a.txt.gz")
    assert [row.cells for row in read_table(path, texts=["text"])] == [["one"], [None], ["two,3"]]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(text.encode()))))  # type: ignore
    assert [row.cells for row in read_table("-", texts=["text"])] == [["one"], [None], ["two,3"]]
    assert refusal(path) == "F is a text file and has no column 'label'"


def test_what_is_no_table(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(DataError) as caught:
            check_table(path, what="--data")
        return str(caught.value)

    written(tmp_path / "train.csv", "text\na\n")
    assert said(tmp_path / "trian.csv") == f"--data: no such file: {tmp_path / 'trian.csv'}; did you mean 'train.csv'?"
    assert said(tmp_path).startswith(f"--data: {tmp_path} is a folder; a file of rows is expected")
    assert "cannot tell the format of" in refusal(written(tmp_path / "a.xlsx", "PK"))
