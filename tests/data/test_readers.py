"""Files to rows: every format gives the same text, in blocks that join again, and damage gives one line."""

from __future__ import annotations

import gzip
import json
import os
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cottention.data import readers, train_tokenizer
from cottention.data.corpus import load_corpus
from cottention.data.readers import format_of, read_rows
from cottention.errors import DataError
from tests.data.helpers import joined, ordinary_user, refusal, write

TEXT = "Grüße, 世界 🎉\n\nzweiter  Absatz\n"


def rows_of(path: Path, split_by: str = "document", text_column: str = "text") -> list[tuple[str, bool]]:
    return list(read_rows(path, split_by=split_by, text_column=text_column))


def refused(path: Path, **options) -> str:
    with pytest.raises(DataError) as error:
        rows_of(path, **options)
    message = refusal(error)
    assert str(path) in message
    return message


def parquet(path: Path, column, name: str = "text", **options) -> Path:
    pq.write_table(pa.table({name: column}), path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ("text", None)),
        ("A.TXT", ("text", None)),
        ("v1.2.txt", ("text", None)),
        ("a.txt.gz", ("text", "gzip")),
        ("a.txt.ZST", ("text", "zstd")),
        ("a.jsonl", ("json", None)),
        ("a.json.gz", ("json", "gzip")),
        ("a.parquet", ("parquet", None)),
        ("a.parquet.gz", None),
        ("a.txt.bz2", None),
        ("a.gz", None),
        ("a.md", None),
        ("txt", None),
        (".txt", None),
        ("", None),
    ],
)
def test_the_name_tells_the_format(name, expected):
    assert format_of(Path(name)) == expected


def test_a_name_of_no_known_format_is_refused(tmp_path):
    message = refused(write(tmp_path / "notes.pdf", "text"))
    assert all(known in message for known in (".txt", ".jsonl", ".parquet", ".gz", ".zst"))


def _json_line(text: str | None, column: str = "text") -> bytes:
    return json.dumps({"id": 3, column: text}).encode() + b"\n"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.json.zst", "a.parquet"])
def test_every_format_gives_the_same_text(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet(path, [TEXT])
    else:
        content = _json_line(TEXT) if "json" in name else TEXT.encode()
        compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        write(path, compress(content))
    assert rows_of(path) == [(TEXT, True)]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_parts_one_behind_the_other_are_one_file(tmp_path, compress):
    path = tmp_path / ("a.txt.gz" if compress is gzip.compress else "a.txt.zst")
    write(path, compress(b"one ") + compress(b"") + compress(b"two"))
    assert rows_of(path) == [("one two", True)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 20])
def test_byte_order_mark_and_line_ends_are_normalised_wherever_a_chunk_ends(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    raw, clean = "ä\r\nb\rc\n\r\n€🎉", "ä\nb\nc\n\n€🎉"
    assert rows_of(write(tmp_path / "a.txt", b"\xef\xbb\xbf" + raw.encode())) == [(clean, True)]
    assert rows_of(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + _json_line(raw))) == [(clean, True)]
    assert rows_of(parquet(tmp_path / "a.parquet", [raw])) == [(clean, True)]


def test_only_a_leading_byte_order_mark_is_dropped(tmp_path):
    assert rows_of(write(tmp_path / "a.txt", "a\ufeffb")) == [("a\ufeffb", True)]


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b" \t\n\r\n  ", "\u2003\n".encode()])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl"])
def test_white_space_is_no_document(tmp_path, name, content):
    if name == "a.jsonl":
        content = content if b"\xe2" not in content else _json_line(content.decode())
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    assert rows_of(write(tmp_path / name, compress(content))) == []


def test_white_space_of_several_blocks_is_no_document(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK", 8)
    assert rows_of(write(tmp_path / "a.txt", " " * 100)) == []
    assert rows_of(write(tmp_path / "a.jsonl", _json_line(" " * 100)), split_by="paragraph") == []
    assert "".join(text for text, _ in rows_of(write(tmp_path / "a.txt", " " * 100 + "x"))).strip() == "x"


def test_rows_without_text_are_left_out(tmp_path):
    lines = b"\n".join([_json_line("one"), b"", b'{"text": null}', b'{"text": "  "}', _json_line("two")])
    assert rows_of(write(tmp_path / "a.jsonl", lines)) == [("one", True), ("two", True)]
    assert rows_of(parquet(tmp_path / "a.parquet", ["one", None, " ", "two"])) == [("one", True), ("two", True)]


def test_the_last_json_line_needs_no_line_end(tmp_path):
    content = (_json_line("one") + _json_line("two\u2028")).rstrip()
    assert rows_of(write(tmp_path / "a.jsonl", content)) == [("one", True), ("two\u2028", True)]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b"]),
        pa.array(["a", "b"], pa.large_string()),
        pa.array(["a", "b"], pa.string_view()),
        pa.array(["a", "b"]).dictionary_encode(),
    ],
    ids=["string", "large_string", "string_view", "dictionary"],
)
def test_every_kind_of_parquet_text_is_read(tmp_path, column):
    assert rows_of(parquet(tmp_path / "a.parquet", column)) == [("a", True), ("b", True)]


def test_parquet_row_groups_follow_each_other(tmp_path):
    texts = [f"text {number}" for number in range(1000)]
    path = parquet(tmp_path / "a.parquet", texts, row_group_size=300)
    assert joined(rows_of(path)) == texts


def test_another_column_can_hold_the_text(tmp_path):
    path = write(tmp_path / "a.jsonl", _json_line("one", "body"))
    assert rows_of(path, text_column="body") == [("one", True)]
    path = parquet(tmp_path / "a.parquet", ["one"], "a.b")
    assert rows_of(path, text_column="a.b") == [("one", True)]


def test_escaped_surrogates_become_characters(tmp_path):
    content = rb'{"text": "\ud83c\udf89 \ud800A\udc00"}'
    assert rows_of(write(tmp_path / "a.jsonl", content)) == [("🎉 \ufffdA\ufffd", True)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("split_by", "expected"),
    [
        ("document", ["\n a b\nc\n\n\n \t\nd  \n\n  e\n \n"]),
        ("paragraph", [" a b\nc", "d  ", "  e"]),
        ("line", [" a b", "c", "d  ", "  e"]),
    ],
)
def test_documents_are_files_or_rows_paragraphs_or_lines(tmp_path, name, split_by, expected):
    path, text = tmp_path / name, "\n a b\nc\n\n\n \t\nd  \n\n  e\n \n"
    if name == "a.parquet":
        parquet(path, [text])
    else:
        write(path, _json_line(text) if name == "a.jsonl" else text)
    assert rows_of(path, split_by) == [(document, True) for document in expected]


def _documents(text: str, split_by: str) -> list[str]:
    """What a document is, said again in the plainest way."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if split_by == "document":
        documents = [text]
    else:
        documents = [""]
        for line in text.split("\n"):
            if split_by == "line" or not line.strip(" \t"):
                documents.append("")
            if line.strip(" \t"):
                documents[-1] += f"\n{line}" if documents[-1] else line
    return [document for document in documents if document.strip()]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "bc", " ", "\n", "\n\n", "\t", "\r\n", "\r", "é", "🎉", "7", ".", "\u3000"])),
    st.sampled_from(["document", "paragraph", "line"]),
    st.sampled_from([8, 12, 1 << 18]),
    st.integers(1, 9),
)
def test_blocks_joined_are_the_documents_again(tmp_path_factory, pieces, split_by, block, chunk):
    text = "".join(pieces)
    assume(not re.search(r"\s{4}", text))  # white space as long as a block is dropped
    path = write(tmp_path_factory.getbasetemp() / "blocks.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK", block)
        patch.setattr(readers, "_CHUNK", chunk)
        rows = rows_of(path, split_by)
    assert joined(rows) == _documents(text, split_by)
    assert all(len(text) <= (2 * block if ends else block) for text, ends in rows)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
@pytest.mark.parametrize(
    "text",
    [
        "Fellow citizens: in 1790, the people's 12,345 votes (all) counted. ",
        "a table:     12    -     13     ;   \n\n\n    two words",
        "13:14,\n \n \n \n \n \n \n \n15\n",
    ],
    ids=["prose", "letters", "lines"],
)
def test_cutting_a_long_document_changes_no_token(tmp_path, monkeypatch, kind, text):
    path = write(tmp_path / "a.txt", "".join(text.replace("4", str(number)) for number in range(200)))
    tokenizer = train_tokenizer(load_corpus(path), kind=kind, vocab_size=400)
    whole = tokenizer.encode(path.read_text(), add_special_tokens=False)
    monkeypatch.setattr(readers, "BLOCK", 128)
    rows = rows_of(path)
    assert len(rows) > 10
    assert [token for text, _ in rows for token in tokenizer.encode(text, add_special_tokens=False)] == whole


def test_text_with_nowhere_to_cut_is_cut_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK", 16)
    rows = rows_of(write(tmp_path / "a.txt", "字" * 1000))
    assert joined(rows) == ["字" * 1000]
    assert max(len(text) for text, _ in rows) <= 32


DAMAGED = {
    "latin1": ("a.txt", b"caf\xe9 au lait", ["not UTF-8", "0xe9", "offset 3", "iconv"]),
    "latin1 behind a mark": ("a.txt", b"\xef\xbb\xbfab\xe9", ["0xe9", "offset 5"]),
    "cut character": ("a.txt", "ab€".encode()[:-1], ["not UTF-8", "offset 2"]),
    "zero byte": ("a.txt", b"abc\0def", ["binary", "offset 3"]),
    "UTF-16": ("a.txt", "hello".encode("utf-16"), ["UTF-16"]),
    "gzip by another name": ("a.txt", gzip.compress(b"hello"), ["gzip", ".gz"]),
    "zstd by another name": ("a.jsonl", zstandard.compress(b"hello"), ["zstd", ".zst"]),
    "parquet by another name": ("a.txt", b"PAR1....", ["parquet"]),
    "zip": ("a.txt", b"PK\x03\x04", ["zip archive"]),
    "no gzip": ("a.txt.gz", b"hello world", ["not valid compressed data"]),
    "no zstd": ("a.txt.zst", b"hello world", ["not valid compressed data"]),
    "cut gzip": ("a.txt.gz", gzip.compress(os.urandom(9000).hex().encode())[:5000], ["cut short"]),
    "cut zstd": ("a.jsonl.zst", zstandard.compress(os.urandom(9000).hex().encode())[:5000], ["cut short"]),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', ["line 3", "not JSON", "one object per line"]),
    "an array": ("a.json", b'[{"text": "a"}]', ["line 1", "a list"]),
    "written over lines": ("a.json", b'{\n"text": "a"\n}', ["line 1", "one object per line"]),
    "text alone": ("a.jsonl", b'"a"', ["line 1", "text"]),
    "no column": ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}', ["line 2", "no column 'text'", "did you mean 'txt'"]),
    "no columns": ("a.jsonl", b"{}", ["line 1", "it has none"]),
    "a number": ("a.jsonl", b'{"text": 3}', ["line 1", "must hold text", "a number"]),
    "latin1 JSON": ("a.jsonl", b'{"text": "caf\xe9"}', ["line 1", "not UTF-8", "0xe9"]),
    "deep JSON": ("a.jsonl", b'{"text":' + b"[" * 99_999 + b"]" * 99_999 + b"}", ["line 1", "recursion"]),
    "endless number": ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", ["line 1", "4300 digits"]),
    "no parquet": ("a.parquet", b"hello", ["not a whole parquet file"]),
    "empty parquet": ("a.parquet", b"", ["not a whole parquet file"]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_said_in_one_line_with_file_and_place(tmp_path, damage):
    name, content, expected = DAMAGED[damage]
    message = refused(write(tmp_path / name, content))
    assert [part for part in expected if part not in message] == [], message


def test_the_offset_of_a_bad_byte_counts_from_the_beginning_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 7)
    content = b"\xef\xbb\xbf" + "é".encode() * 50 + b"\xff" + b"x" * 50
    assert "offset 103;" in refused(write(tmp_path / "b.txt", content))
    assert refused(write(tmp_path / "c.txt", b"x" * 50 + b"\0")).endswith("offset 50")


def test_damaged_parquet_is_said_in_one_line(tmp_path):
    whole = parquet(tmp_path / "whole.parquet", ["some text"] * 50)
    assert "whole parquet" in refused(write(tmp_path / "cut.parquet", whole.read_bytes()[:-20]))
    assert "no column 'text'" in refused(parquet(tmp_path / "other.parquet", ["a"], "txt"))
    assert "int64" in refused(parquet(tmp_path / "number.parquet", [1]))
    assert "binary" in refused(parquet(tmp_path / "bytes.parquet", [b"a"]))
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "twice.parquet")
    assert "more than one column 'text'" in refused(tmp_path / "twice.parquet")


def test_parquet_text_that_is_no_utf8_is_named_by_its_row(tmp_path):
    offsets = pa.py_buffer(b"".join(number.to_bytes(4, "little") for number in [0, 1, 3]))
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff\xfe")])
    message = refused(parquet(tmp_path / "a.parquet", pa.concat_arrays([pa.array(["ok"] * 300), texts])))
    assert "row 302" in message
    assert "0xff" in message


def test_what_was_read_before_the_damage_is_not_lost(tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", b'{"text": "a"}\n{'), split_by="document", text_column="text")
    assert next(rows) == ("a", True)
    with pytest.raises(DataError, match="line 2"):
        next(rows)


@pytest.mark.parametrize("name", [b"caf\xe9.txt", b"caf\xe9.parquet", "世界 🎉.txt".encode()])
def test_a_name_need_not_be_utf8(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    if name.endswith(b".txt"):
        path.write_text("text")
    else:
        parquet(tmp_path / "a.parquet", ["text"]).rename(path)
    assert rows_of(path) == [("text", True)]
    assert load_corpus(path)[0]["text"] == "text"


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for name in ("missing.txt", "missing.txt.gz", "missing.jsonl", "missing.parquet"):
        assert refused(tmp_path / name).endswith(f"{name}: No such file or directory")
    (tmp_path / "folder.txt").mkdir()
    assert "cannot read" in refused(tmp_path / "folder.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_may_not_be_read_is_refused(public_path, name):
    path = write(public_path / name, "text")
    path.chmod(0)
    with ordinary_user():
        assert refused(path).endswith(": Permission denied")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst", "a.parquet"])
def test_a_huge_empty_file_is_refused_at_once(tmp_path, name):
    path = write(tmp_path / name, b"")
    os.truncate(path, 1 << 29)
    tracemalloc.start()
    try:
        refused(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_an_endless_json_line_is_refused_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_LONGEST_LINE", 4 << 20)
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n[' + b'"text", ' * (4 << 20))
    tracemalloc.start()
    try:
        assert "line 2: longer than 4 MiB" in refused(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", pytest.param("a.jsonl", marks=pytest.mark.slow), "a.parquet"])
def test_memory_stays_at_some_megabytes(tmp_path, name):
    path, text = tmp_path / name, os.urandom(1 << 19).hex()
    if name == "a.parquet":  # in one row group, of pages of a megabyte
        texts = [text[number * 16 :][:65_536] for number in range(600)]
        parquet(path, texts, use_dictionary=False, write_batch_size=8)
    else:
        content = b"\n".join([_json_line(text) if "json" in name else text.encode()] * 32)
        write(path, gzip.compress(content, 1) if name.endswith(".gz") else content)
    num_characters = most = 0
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for row, _ in read_rows(path, split_by="document", text_column="text"):
            num_characters += len(row)
            most = max(most, pa.total_allocated_bytes() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_characters >= 32 << 20
    assert peak + most < 12 << 20
