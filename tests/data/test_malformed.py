"""Text that is not UTF-8, not JSON, not whole: the right remedy for each; where asked for, left out and counted."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cottention.cli.main import main
from cottention.data import readers
from cottention.data.building import build_documents, build_sentences, tokenize_text
from cottention.data.corpus import load_corpus
from cottention.data.glue import load_glue
from cottention.data.glue_tasks import glue_task
from cottention.data.malformed import PREFIX, REASONS, described_malformed
from cottention.data.readers import read_records, read_rows
from cottention.data.shards import open_corpus
from cottention.data.sources import ReadSettings
from cottention.errors import DataError
from tests.data.helpers import documents_of, joined, refusal, write

GERMAN = "Das Mädchen kam über die Brücke. Es war früh.\n"
DROP, CONVERT = "iconv -c -f utf-8 -t utf-8", "convert it first"
COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def refused(path: Path, split_by: str = "document") -> str:
    with pytest.raises(DataError) as error:
        list(read_rows(path, split_by=split_by, text_column="text"))
    return refusal(error)


REMEDIES = {  # content -> what must and must not be advised
    "one byte behind umlauts": (GERMAN.encode() * 50 + b"\xff" + GERMAN.encode(), DROP, CONVERT),
    "one byte before the first umlaut": (b"plain \xe4 " + GERMAN.encode(), DROP, CONVERT),
    "one byte, then umlauts a megabyte later": (
        b"a \xe4 b\n" + b"plain text\n" * 200_000 + GERMAN.encode() * 9,
        DROP,
        CONVERT,
    ),
    "several broken bytes": (b"\x80\n".join([GERMAN.encode()] * 9), DROP, CONVERT),
    "a character cut at the end": (GERMAN.encode() + "€".encode()[:2], DROP, CONVERT),
    "the only character cut at the end": (b"ab" + "€".encode()[:2], DROP, CONVERT),
    "a byte of no letter in ASCII": (b"plain text\nplain \xff text\n", DROP, CONVERT),
    "latin1": (GERMAN.encode("latin1") * 9, "iconv -f latin1 -t utf-8", DROP),
    "cp1252": ("“Grüße” – sagte er, früh.\n".encode("cp1252") * 9, "iconv -f cp1252 -t utf-8", DROP),
    "cp1251": ("Она шла через мост рано утром.\n".encode("cp1251") * 9, "iconv -f ENCODING", "iconv -f latin1"),
    "Shift-JIS": ("橋を渡って早く来た。\n".encode("shift_jis") * 9, "iconv -f ENCODING", "iconv -f latin1"),
    "GB18030": ("她很早就过了桥。\n".encode("gb18030") * 9, "iconv -f ENCODING", "iconv -f latin1"),
    "UTF-16 with a mark": (GERMAN.encode("utf-16"), "iconv -f utf-16 -t utf-8", DROP),
    "UTF-16 without a mark": (GERMAN.encode("utf-16-le"), "iconv -f utf-16le -t utf-8", DROP),
    "UTF-16 of the other order": (GERMAN.encode("utf-16-be"), "iconv -f utf-16be -t utf-8", DROP),
    "UTF-32": (GERMAN.encode("utf-32"), "iconv -f utf-32 -t utf-8", "utf-16"),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("case", REMEDIES)
def test_a_wrong_encoding_and_a_broken_byte_have_their_own_remedies(tmp_path, case, suffix):
    content, advised, not_advised = REMEDIES[case]
    message = refused(write(tmp_path / f"a.txt{suffix}", COMPRESSORS[suffix](content)))
    assert advised in message
    assert not_advised not in message


def test_one_byte_in_ascii_text_may_be_either_and_both_are_said(tmp_path):
    message = refused(write(tmp_path / "a.txt", b"caf\xe9 au lait"))
    assert "iconv -f latin1 -t utf-8" in message
    assert DROP in message


@pytest.mark.skipif(shutil.which("iconv") is None, reason="iconv is not installed")
@pytest.mark.parametrize("case", ["one byte behind umlauts", "several broken bytes", "latin1", "cp1252"])
def test_the_remedy_gives_the_text_back(tmp_path, case):
    content, command, _ = REMEDIES[case]
    path = write(tmp_path / "a.txt", content)
    assert command in refused(path)
    done = subprocess.run(
        [*command.split(), str(path)], capture_output=True, check=False
    )  # -c still says so by its code
    mended = joined(read_rows(write(tmp_path / "b.txt", done.stdout), split_by="document", text_column="text"))[0]
    assert "Ã" not in mended
    assert mended.count("ü") == (content.count("ü".encode()) or content.count("ü".encode("latin1")))


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_bad_byte_inside_json_gets_the_remedy_of_its_file(tmp_path, suffix):
    def row(text: str) -> bytes:
        return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"

    broken = row("plain").replace(b"plain", b"pl\xe4in")
    path = write(tmp_path / f"a.jsonl{suffix}", COMPRESSORS[suffix](row(GERMAN) * 3 + broken + row(GERMAN)))
    message = refused(path)
    assert "line 4" in message
    assert DROP in message
    assert CONVERT not in message
    latin1 = COMPRESSORS[suffix]((row(GERMAN) * 3).decode().encode("latin1"))
    message = refused(write(tmp_path / f"b.jsonl{suffix}", latin1))
    assert "iconv -f latin1" in message
    assert DROP not in message


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_bad_byte_in_a_glue_file_gets_the_remedy_of_its_file(tmp_path, suffix):
    rows = "sentence\tlabel\n" + "".join(f"{GERMAN.strip()}\t{number % 2}\n" for number in range(9))
    broken = rows.encode().replace("früh.\t1".encode(), b"fr\xffh.\t1", 1)
    write(tmp_path / "broken" / f"train.tsv{suffix}", COMPRESSORS[suffix](broken))
    write(tmp_path / "latin1" / f"train.tsv{suffix}", COMPRESSORS[suffix](rows.encode("latin1")))
    write(tmp_path / "utf16" / f"train.tsv{suffix}", COMPRESSORS[suffix](rows.encode("utf-16")))
    said = {}
    for folder in ("broken", "latin1", "utf16"):
        with pytest.raises(DataError) as error:
            load_glue(glue_task("sst2"), tmp_path / folder, "train")
        said[folder] = refusal(error)
    assert "line 3" in said["broken"]
    assert DROP in said["broken"]
    assert "--skip-malformed" in said["broken"]
    assert CONVERT not in said["broken"]
    assert "iconv -f latin1" in said["latin1"]
    assert "iconv -f utf-16" in said["utf16"]
    kept = load_glue(glue_task("sst2"), tmp_path / "broken", "train", skip_malformed=True)
    assert len(kept) == 8
    assert kept["label"] == [0, 0, 1, 0, 1, 0, 1, 0]


def test_a_cola_row_that_is_the_word_sentence_is_no_header(tmp_path):
    write(tmp_path / "train.tsv", "gj04\t1\t\tsentence\ngj04\t0\t*\tlabel\n")
    rows = load_glue(glue_task("cola"), tmp_path, "train")
    assert rows["first"] == ["sentence", "label"]
    assert rows["label"] == [1, 0]
    write(tmp_path / "named" / "train.tsv", "source\tlabel\tmark\tsentence\ngj04\t1\t\tA row.\n")
    assert load_glue(glue_task("cola"), tmp_path / "named", "train")["first"] == ["A row."]
    write(tmp_path / "sst2" / "train.tsv", "sentence\t0\nanother\t1\n")
    assert load_glue(glue_task("sst2"), tmp_path / "sst2", "train")["first"] == ["sentence", "another"]
    write(tmp_path / "qqp" / "train.tsv", "question1\tquestion2\t0\na\tb\t1\n")
    assert load_glue(glue_task("qqp"), tmp_path / "qqp", "train")["second"] == ["question2", "b"]


GOOD = [b'{"text": "one"}', '{"text": "zwei: ü"}'.encode(), b'{"text": "three"}']
BAD = {
    "bad_byte": b'{"text": "b\xffd"}',
    "zero_byte": b'{"text": "b\0d"}',
    "broken_json": b'{"text": "cut',
    "no_object": b'["text"]',
    "missing_column": b'{"txt": "b"}',
    "no_text": b'{"text": 3}',
    "too_long": b'{"text": "' + b"x" * (2 << 20) + b'"}',
    "too_many_values": b'{"text": "b", "n": ' + b"[" * 99_999 + b"]" * 99_999 + b"}",
}


@pytest.mark.parametrize("chunk", [999, 1 << 20])
@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("reason", BAD)
def test_one_bad_row_of_json_is_left_out_and_counted(tmp_path, monkeypatch, reason, suffix, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    monkeypatch.setattr(readers, "_LONGEST_LINE", 1 << 20)
    content = b"\n".join([GOOD[0], BAD[reason], GOOD[1], BAD[reason], GOOD[2]])
    path = write(tmp_path / f"a.jsonl{suffix}", COMPRESSORS[suffix](content))
    with pytest.raises(DataError):
        list(read_rows(path, split_by="document", text_column="text"))
    counts: Counter[str] = Counter()
    rows = list(read_rows(path, split_by="document", text_column="text", malformed=counts))
    assert rows == [("one", True), ("zwei: ü", True), ("three", True)]
    assert counts == {PREFIX + reason: 2}


def test_a_zero_byte_in_text_is_told_from_a_binary_file(tmp_path):
    message = refused(write(tmp_path / "a.txt", GERMAN.encode() * 9 + b"\0" + GERMAN.encode() * 9))
    assert "text that is damaged" in message
    assert "--skip-malformed" in message
    assert "damaged" not in refused(write(tmp_path / "b.txt", bytes(range(256)) * 9))


def test_every_reason_has_words():
    assert set(BAD) == set(REASONS)
    counts = {PREFIX + "bad_byte": 1200, PREFIX + "broken_json": 1, "documents": 3}
    expected = "left out 1,201 malformed lines or rows: 1,200 with a byte that is not UTF-8, 1 of broken JSON"
    assert described_malformed(counts) == expected
    assert described_malformed({"documents": 3}) is None


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize("split_by", ["document", "line"])
def test_a_bad_line_of_text_is_left_out_and_its_neighbours_stay(tmp_path, monkeypatch, split_by, chunk, newline):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    lines = ["eins ü", "BAD", "zwei €", "", "ZERO", "drei", "BAD"]
    content = newline.join(lines).encode().replace(b"BAD", b"b\xfcd").replace(b"ZERO", b"\0")
    counts: Counter[str] = Counter()
    path = write(tmp_path / "a.txt", content)
    rows = joined(read_rows(path, split_by=split_by, text_column="text", malformed=counts))
    kept = ["eins ü", "zwei €", "", "drei"]
    assert [row.strip() for row in rows] == ([row for row in kept if row] if split_by == "line" else ["\n".join(kept)])
    assert counts == {"malformed_bad_byte": 2, "malformed_zero_byte": 1}


def _read(path: Path, malformed: Counter[str] | None) -> tuple[list[str] | None, str]:
    try:
        return joined(read_rows(path, split_by="line", text_column="text", malformed=malformed)), ""
    except DataError as error:
        return None, str(error)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.integers(1, 9), st.sampled_from([".txt", ".jsonl", ".txt.gz", ".jsonl.zst"]))
def test_whatever_the_bytes_are_they_are_read_or_counted_or_refused_in_one_line(tmp_path_factory, content, chunk, name):
    path = tmp_path_factory.getbasetemp() / f"fuzz{name}"
    write(path, COMPRESSORS["." + name.split(".")[2] if name.count(".") == 2 else ""](content))
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK", chunk)
        read_whole, message = _read(path, None)
        kept, refusal_of_the_file = _read(path, counts)
    assert "\n" not in message + refusal_of_the_file
    if refusal_of_the_file:  # another kind of file
        return
    if read_whole is not None:
        assert kept == read_whole
        assert not counts


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["ü", "a", "\n", "€", " ", "🎉", "\r\n"]), max_size=40),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_good_text_is_the_same_with_and_without_leaving_out(tmp_path_factory, pieces, chunk, part):
    path = write(tmp_path_factory.getbasetemp() / "good.txt", "".join(pieces))
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK", chunk)
        patch.setattr(readers, "_PART", part)
        whole = list(read_rows(path, split_by="document", text_column="text"))
        kept = list(read_rows(path, split_by="document", text_column="text", malformed=counts))
    assert kept == whole
    assert not counts


def test_a_line_too_long_for_a_sentence_is_refused_or_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK", 1 << 16)
    monkeypatch.setattr(readers, "_LONGEST_TEXT_LINE", 1 << 20)
    path = write(tmp_path / "a.txt", b"one\n" + b"x" * (3 << 20) + b"\ntwo\n")
    with pytest.raises(DataError, match="line 2: longer than 1 MiB"):
        list(read_records(path, text_column="text"))
    counts: Counter[str] = Counter()
    rows = [text for text, _ in read_records(path, text_column="text", malformed=counts)]
    assert rows == ["one", "two"]
    assert counts == {"malformed_too_long": 1}


def test_parquet_rows_that_are_not_utf8_are_left_out(tmp_path):
    offsets = pa.py_buffer(b"".join(number.to_bytes(4, "little") for number in [0, 1, 3]))
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff\xfe")])
    pq.write_table(pa.table({"text": pa.concat_arrays([pa.array(["ok", "ok"]), texts])}), tmp_path / "a.parquet")
    counts: Counter[str] = Counter()
    rows = joined(read_rows(tmp_path / "a.parquet", split_by="document", text_column="text", malformed=counts))
    assert rows == ["ok", "ok", "a"]
    assert counts == {"malformed_bad_byte": 1}


def _mixed(folder: Path) -> Path:
    """1,000 rows of JSON, of which four are bad, and a text with one bad line."""
    rows = [
        json.dumps({"text": f"Sentence {number} of the text. It has a second one, ü."}).encode()
        for number in range(1000)
    ]
    rows[10], rows[500], rows[700], rows[999] = b'{"text": "cut', b'{"text": "\xff"}', b'{"txt": ""}', b'{"text": "\0"}'
    write(folder / "a.jsonl", b"\n".join(rows))
    write(folder / "b.txt", GERMAN.encode() * 20 + b"Ein b\xfcses Byte.\n" + GERMAN.encode() * 20)
    return folder


COUNTS = {"malformed_bad_byte": 2, "malformed_broken_json": 1, "malformed_missing_column": 1, "malformed_zero_byte": 1}


def test_builds_leave_out_and_count_alike_in_any_number_of_processes(tmp_path, caplog):
    source = _mixed(tmp_path / "texts")
    with pytest.raises(DataError, match="zero byte at offset"):
        build_documents(source, tmp_path / "refused")
    reading = ReadSettings(skip_malformed=True)
    with caplog.at_level(logging.WARNING):
        report = build_documents(source, tmp_path / "text", reading=reading)
    assert caplog.text.count("left out 5 malformed lines or rows: ") == 1
    manifest = open_corpus(tmp_path / "text", kind="gpt-text").manifest
    for counts in (report.counts, manifest["counts"]):
        assert {name: count for name, count in counts.items() if name.startswith(PREFIX)} == COUNTS
    assert manifest["settings"]["skip_malformed"] is True
    assert report.counts["documents"] == 997
    assert "Ein b" not in documents_of(open_corpus(tmp_path / "text", kind="gpt-text").dataset)[-1]
    made = []
    for num_proc in (1, 2):
        report = build_sentences(source, tmp_path / f"{num_proc}", reading=reading, num_proc=num_proc)
        assert {name: count for name, count in report.counts.items() if name.startswith(PREFIX)} == COUNTS
        made.append([(shard.name, shard.read_bytes()) for shard in sorted((tmp_path / f"{num_proc}").rglob("*.arrow"))])
    assert made[0]
    assert made[0] == made[1]


def test_a_build_that_leaves_nothing_out_is_the_same_corpus_with_the_switch(tmp_path, caplog):
    write(tmp_path / "a.txt", GERMAN * 5)
    plain = build_documents(tmp_path / "a.txt", tmp_path / "plain")
    with caplog.at_level(logging.WARNING):
        switched = build_documents(tmp_path / "a.txt", tmp_path / "switched", reading=ReadSettings(skip_malformed=True))
    assert plain.counts == switched.counts
    assert "malformed" not in caplog.text
    assert "skip_malformed" not in open_corpus(tmp_path / "plain", kind="gpt-text").manifest["settings"]


def test_an_interrupted_build_counts_every_bad_row_once(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", b"\n".join([json.dumps({"text": "words " * 9_000}).encode(), b"{"] * 40))
    reading, options = ReadSettings(skip_malformed=True), {"max_document_chars": None, "shard_bytes": 1 << 19}
    whole = build_documents(source, tmp_path / "whole", reading=reading, **options)
    from cottention.data import building

    original, calls = building._document_table, []

    def killed(rows):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(rows)

    monkeypatch.setattr(building, "_document_table", killed)
    with pytest.raises(KeyboardInterrupt):
        build_documents(source, tmp_path / "again", reading=reading, **options)
    monkeypatch.undo()
    again = build_documents(source, tmp_path / "again", reading=reading, **options)
    assert again.counts == whole.counts
    assert again.counts["malformed_broken_json"] == 40


def test_load_corpus_says_what_it_left_out_on_every_call(tmp_path, caplog):
    source = _mixed(tmp_path / "texts")
    with pytest.raises(DataError):
        load_corpus(source)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(load_corpus(source, skip_malformed=True)) == 997
        assert caplog.text.count("left out 5 malformed lines or rows") == 1


def test_a_file_of_nothing_else_says_why_there_is_no_text(tmp_path):
    write(tmp_path / "a.jsonl", b'{"txt": "a"}\n' * 3)
    with pytest.raises(DataError, match="no text; left out 3 malformed lines or rows: 3 without the column"):
        load_corpus(tmp_path / "a.jsonl", skip_malformed=True)


def test_the_commands_have_the_switch(tmp_path, capsys):
    source = _mixed(tmp_path / "texts")
    command = ["data", "build", "gpt", str(source), "--output-dir", str(tmp_path / "corpus")]
    assert main(command) == 2
    assert "zero byte at offset" in capsys.readouterr().err
    assert main([*command, "--skip-malformed", "--overwrite"]) == 0
    printed = capsys.readouterr()
    assert "malformed bad byte" in printed.out
    assert printed.err.count("left out 5 malformed lines or rows") == 1
    command = ["data", "tokenize", "gpt", str(source), "--tokenizer", "train", "--vocab-size", "400"]
    assert main([*command, "--skip-malformed", "--output-dir", str(tmp_path / "tokens")]) == 0
    assert open_corpus(tmp_path / "tokens", kind="gpt-tokens").manifest["counts"]["malformed_bad_byte"] == 2


def test_tokenising_from_text_leaves_out_the_same(tmp_path):
    source = _mixed(tmp_path / "texts")
    with pytest.raises(DataError):
        tokenize_text(source, tmp_path / "tokens", None, vocab_size=400)
