"""Sources that are odd or made to do harm: each is read, or refused in one line, quickly and in little memory."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cottention.cli.main import main
from cottention.data import json_rows, opening
from cottention.data.building import build_documents, build_sentences
from cottention.data.corpus import load_corpus
from cottention.data.glue import load_glue
from cottention.data.glue_tasks import glue_task
from cottention.data.readers import read_rows
from cottention.data.shards import open_corpus
from cottention.data.sources import ReadSettings, TextSource
from cottention.errors import CottentionError, DataError
from tests.data.helpers import documents_of, joined, refusal, write

TEXT = "Some text of two lines.\nThe second one.\n"
ROW = json.dumps({"text": TEXT}).encode() + b"\n"


def documents(path: Path) -> list[str]:
    return joined(read_rows(path, split_by="document", text_column="text"))


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        documents(path)
    return refusal(error)


def long_window(content: bytes) -> bytes:
    """What `zstd --long=31` makes of a stream: a frame that asks for a window of 2 GiB."""
    settings = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return compressor.compress(content) + compressor.flush()


SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"hello"
WHOLE = {
    "padded gzip": (".gz", gzip.compress(ROW) + b"\0" * 10_000),
    "padded members": (".gz", gzip.compress(ROW[:9]) + gzip.compress(ROW[9:]) + b"\0" * 512),
    "padding between members": (".gz", gzip.compress(ROW[:9]) + b"\0" * 512 + gzip.compress(ROW[9:])),
    "an empty member": (".gz", gzip.compress(b"") + gzip.compress(ROW) + gzip.compress(b"")),
    "window of 2 GiB": (".zst", long_window(ROW)),
    "a long window behind a short one": (".zst", zstandard.compress(ROW[:9]) + long_window(ROW[9:])),
    "skippable frames": (
        ".zst",
        SKIPPABLE + zstandard.compress(ROW[:9]) + SKIPPABLE + zstandard.compress(ROW[9:]) + SKIPPABLE,
    ),
    "an empty frame": (".zst", zstandard.compress(b"") + zstandard.compress(ROW)),
}


@pytest.mark.parametrize("case", WHOLE)
def test_compressed_files_of_every_make_are_read(tmp_path, case):
    suffix, content = WHOLE[case]
    assert documents(write(tmp_path / f"a.jsonl{suffix}", content)) == [TEXT]
    assert documents(write(tmp_path / f"a.txt{suffix}", content)) == [ROW.decode()]


DAMAGED = {
    "garbage behind a member": (
        ".gz",
        gzip.compress(ROW) + b"garbage",
        "not valid compressed data behind 1 good parts",
    ),
    "padding alone": (".gz", b"\0" * 1000, "not valid compressed data"),
    "padding, then garbage": (".gz", gzip.compress(ROW) + b"\0" * 99 + b"x", "cut short|not valid"),
    "a member cut in its checksum": (".gz", gzip.compress(ROW)[:-3], "cut short"),
    "a second member cut": (".gz", gzip.compress(ROW) + gzip.compress(ROW)[:-9], "cut short"),
    "a wrong checksum": (".gz", gzip.compress(ROW)[:-8] + b"\0" * 8, "not valid compressed data"),
    "a frame cut": (".zst", zstandard.compress(ROW)[:-3], "cut short"),
    "a second frame cut": (".zst", zstandard.compress(ROW) + zstandard.compress(ROW)[:-3], "cut short"),
    "garbage behind a frame": (".zst", zstandard.compress(ROW) + b"garbage", "not valid compressed data behind 1"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_compression_is_one_line(tmp_path, case):
    suffix, content, expected = DAMAGED[case]
    for name in ("a.txt", "a.jsonl"):
        message = refused(write(tmp_path / f"{name}{suffix}", content))
        assert any(words in message for words in expected.split("|")), message


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_small_file_that_decodes_without_end_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(opening, "FREE_BYTES", 1 << 22)
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    message = refused(write(tmp_path / f"a.txt{suffix}", compress(b"a line of text\n" * (1 << 20))))
    assert "more than 100 for one" in message
    assert len(documents(write(tmp_path / f"b.txt{suffix}", compress(b"a line of text\n" * (1 << 17))))) == 1
    varied = b"".join(b"line %d of a text\n" % (number * 7919 % 100_003) for number in range(1 << 18))
    assert len(documents(write(tmp_path / f"c.txt{suffix}", compress(varied)))) == 1


def test_numbers_without_end_in_one_row_are_refused_and_commas_in_text_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MOST_VALUES", 1000)
    for nodes in (b"[],", b"{},", b"1,", b'"x",', b'{"a":[1]},'):
        content = b'{"text": "x", "a": [' + (nodes * 1001).removesuffix(b",") + b"]}"
        assert "line 1: more than 1,000 values in one row" in refused(write(tmp_path / "a.jsonl", content))
    text = 'commas, [brackets], {braces} and "quotes\\", ' * 2000
    row = json.dumps({"text": text, "numbers": list(range(500))})
    assert documents(write(tmp_path / "b.jsonl", row)) == [text]


def not_regular(folder: Path) -> dict[str, tuple[Path, str]]:
    """Sources that are no regular files, and what they are called."""
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket.jsonl"))
    links = {"zero.txt": "/dev/zero", "random.jsonl": "/dev/urandom", "null.parquet": "/dev/null"}
    links |= {"memory.txt": "/proc/self/mem", "status.txt": "/proc/self/status", "kernel.txt.gz": "/proc/self/maps"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    words = {
        "pipe.txt": "pipe",
        "socket.jsonl": "socket",
        "memory.txt": "kernel",
        "status.txt": "kernel",
        "kernel.txt.gz": "kernel",
    }
    cases = {name: (folder / name, words.get(name, "device")) for name in [*links, "pipe.txt", "socket.jsonl"]}
    return {**cases, "/dev/zero": (Path("/dev/zero"), "device"), "/proc/self/mem": (Path("/proc/self/mem"), "kernel")}


def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path):
    for name, (path, what) in not_regular(tmp_path).items():
        if not path.exists():
            continue
        for read in (load_corpus, lambda path: build_documents(path, tmp_path / "o"), lambda path: TextSource([path])):
            with pytest.raises(DataError) as error:
                read(path)
            assert what in refusal(error), name
        if "." in path.name:
            assert what in refused(path)
    assert not (tmp_path / "o").exists()


def test_a_folder_is_read_without_what_is_no_regular_file(tmp_path, caplog):
    not_regular(tmp_path)
    write(tmp_path / "a.txt", TEXT)
    with caplog.at_level(logging.INFO):
        assert documents_of(load_corpus(tmp_path)) == [TEXT]
    assert "left out: " in caplog.text
    assert "1 x a pipe (FIFO)" in caplog.text
    report = build_documents(tmp_path, tmp_path / "corpus")
    assert report.counts["documents"] == 1
    assert load_corpus(str(tmp_path / "*.txt"))[0]["text"] == TEXT


def test_a_glue_file_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train.tsv")
    with pytest.raises(DataError):
        load_glue(glue_task("sst2"), tmp_path, "train")


@pytest.mark.parametrize(
    "pattern", ["*" * 3000, "*/" * 3000 + "a.txt", "**/" * 6 + "*.txt", "a" * 5000, "a" * 300 + ".txt"]
)
@pytest.mark.parametrize("command", ["gpt", "bert"])
def test_names_and_patterns_without_end_are_one_line(tmp_path, capsys, monkeypatch, pattern, command):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "build", command, pattern, "--output-dir", "o"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 600
    with pytest.raises(CottentionError):
        load_corpus(pattern)


def test_patterns_of_ordinary_length_are_read(tmp_path):
    write(tmp_path / "a" / "b" / "c.txt", TEXT)
    for pattern in ("**/*.txt", "*/*/*.txt", "**/b/**/*.t*t"):
        assert documents_of(load_corpus(str(tmp_path / pattern))) == [TEXT]


def test_a_name_that_is_not_utf8_goes_through_a_whole_build(tmp_path, capsys):
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text(TEXT * 9)
    for command in ("gpt", "bert"):
        folder = tmp_path / command
        for _ in range(2):
            assert main(["data", "build", command, str(path), "--output-dir", str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out.split("\n}\n")[1] + "}")["was_finished"]
        kind = {"gpt": "gpt-text", "bert": "bert-sentences"}[command]
        assert open_corpus(folder, kind=kind).manifest["settings"]["sources"][0]["file"] == "caf\\xe9.txt"


ODD = {  # what JSON, text and names may hold; the words of the line, or None where it is read
    "nothing": ("a.txt", b"", "no text"),
    "spaces": ("a.txt", b" " * (1 << 21), "no text"),
    "line ends": ("a.txt", b"\n" * (1 << 21), "no text"),
    "carriage returns": ("a.txt", b"\r" * (1 << 20), "no text"),
    "a mark alone": ("a.txt", b"\xef\xbb\xbf", "no text"),
    "half a mark": ("a.txt", b"\xef\xbb", "not UTF-8"),
    "a surrogate in UTF-8": ("a.txt", b"a \xed\xa0\x80 b", "not UTF-8"),
    "overlong": ("a.txt", b"a \xc0\xaf b", "not UTF-8"),
    "beyond Unicode": ("a.txt", b"a \xf5\x80\x80\x80 b", "not UTF-8"),
    "an executable": ("a.txt", b"\x7fELF\x02\x01\x01" + bytes(99), "binary file"),
    "no row": ("a.jsonl", b"", "no text"),
    "empty lines": ("a.jsonl", b"\n" * (1 << 20), "no text"),
    "nulls": ("a.jsonl", b'{"text": null}\n' * 99, "no text"),
    "an array": ("a.jsonl", b'[{"text": "a"}]', "got a list"),
    "NaN": ("a.jsonl", b'{"text": NaN}', "must hold text"),
    "infinity": ("a.jsonl", b'{"text": "a b c", "n": Infinity}', None),
    "1e999999": ("a.jsonl", b'{"text": "a b c", "n": 1e999999}', None),
    "a long number": ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "digits"),
    "deep": ("a.jsonl", b'{"text": "a", "n": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "recursion"),
    "deep objects": ("a.jsonl", b'{"text": "a", "n": ' + b'{"a":' * 99_999 + b"1" + b"}" * 100_000, "recursion"),
    "a name twice": ("a.jsonl", b'{"text": "a b", "text": "c d"}', None),
    "escaped zero": ("a.jsonl", b'{"text": "a \\u0000 b"}', None),
    "half a pair": ("a.jsonl", b'{"text": "a \\ud800 b"}', None),
    "text behind": ("a.jsonl", b'{"text": "a"} x', "not JSON"),
    "two rows on a line": ("a.jsonl", b'{"text": "a"}{"text": "b"}', "not JSON"),
    "single quotes": ("a.jsonl", b"{'text': 'a'}", "not JSON"),
    "many names": ("a.jsonl", json.dumps({str(number): 1 for number in range(9999)}).encode(), "no column 'text'"),
    "parquet cut": ("a.parquet", b"PAR1" + bytes(50) + b"PAR1", "parquet"),
    "parquet of zeros": ("a.parquet", bytes(5000), "parquet"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("command", ["gpt", "bert"])
def test_odd_sources_are_read_or_one_short_line(tmp_path, capsys, case, command):
    name, content, expected = ODD[case]
    write(tmp_path / name, content)
    code = main(["data", "build", command, str(tmp_path / name), "--output-dir", str(tmp_path / "o")])
    said = capsys.readouterr().err
    if expected is None and command == "gpt":
        assert code == 0
    elif expected is not None and "no text" not in expected:
        assert code == 2
        assert expected in said
    if code:
        assert code == 2
        assert said.count("\n") == 1
        assert len(said) < 900


def repeated_parquet(path: Path, num_rows: int, row_bytes: int, **options) -> Path:
    """Few bytes on disk, `num_rows` equal rows in a reader's hand."""
    text = pa.array(["x" * row_bytes])
    indices = pa.array([0] * num_rows, pa.int32())
    table = pa.table({"text": pa.DictionaryArray.from_arrays(indices, text), "n": pa.array(range(num_rows))})
    pq.write_table(table, path, compression="zstd", **options)
    return path


def test_a_small_parquet_file_of_large_rows_is_read_a_few_at_a_time(tmp_path):
    path = repeated_parquet(tmp_path / "a.parquet", 400, 1_300_000, dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 4000
    before, most, num_rows = pa.total_allocated_bytes(), 0, 0
    for text, ends in read_rows(path, split_by="document", text_column="text"):
        most = max(most, pa.total_allocated_bytes() - before)
        num_rows += ends
        assert len(text) <= 1_300_000
    assert num_rows == 400
    assert most < 24 << 20


def test_parquet_values_that_share_their_beginning_are_read_a_few_at_a_time(tmp_path):
    texts = ["x" * 300_000 + str(number) for number in range(200)]
    pq.write_table(
        pa.table({"text": texts}),
        tmp_path / "a.parquet",
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
        compression="zstd",
    )
    before, most, read = pa.total_allocated_bytes(), 0, []
    for text, _ in read_rows(tmp_path / "a.parquet", split_by="document", text_column="text"):
        most = max(most, pa.total_allocated_bytes() - before)
        read.append(text)
    assert read == texts
    assert most < 32 << 20


def test_a_parquet_column_that_unpacks_a_thousandfold_is_refused(tmp_path):
    table = pa.table({"text": ["x" * (1 << 20)] * 90})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, compression="zstd")
    assert "more than 100 for one" in refused(tmp_path / "a.parquet")


def test_nested_parquet_columns_are_refused_in_a_short_line(tmp_path):
    kind = pa.string()
    for _ in range(30):
        kind = pa.list_(kind)
    table = pa.table({"text": pa.array(["a"]), "deep": pa.array([None], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == ["a"]
    with pytest.raises(DataError) as error:
        list(read_rows(tmp_path / "a.parquet", split_by="document", text_column="deep"))
    assert len(refusal(error)) < 300
    reading = ReadSettings(rows="sentences", documents_by="column:deep")
    with pytest.raises(DataError, match="single values"):
        build_sentences(tmp_path / "a.parquet", tmp_path / "o", reading=reading)


def test_a_key_column_of_large_equal_values_is_read_a_few_at_a_time(tmp_path):
    keys = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["k" * 1_000_000]))
    table = pa.table({"text": [f"Sentence {number} is short." for number in range(300)], "key": keys})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30)
    reading = ReadSettings(rows="sentences", documents_by="column:key")
    before = pa.total_allocated_bytes()
    source, most = TextSource([tmp_path / "a.parquet"], reading), 0
    rows = []
    for row in source.rows(Counter()):
        rows.append(row)
        most = max(most, pa.total_allocated_bytes() - before)
    assert joined(rows)[0].count("\n") == 300
    assert most < 32 << 20


def _peak(script: str, folder: Path, timeout_s: int = 300) -> tuple[str, int]:
    """Run Python of its own, in 4 GB of addresses; what it printed, and its peak memory in MiB beyond the imports."""
    head = """
    import resource, sys
    from collections import Counter
    from pathlib import Path
    from cottention.data.building import build_documents, build_sentences
    from cottention.data.glue import load_glue
    from cottention.data.glue_tasks import glue_task
    from cottention.data.readers import read_records, read_rows
    from cottention.data.sources import ReadSettings
    from cottention.errors import CottentionError
    folder = Path(sys.argv[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
    """
    tail = """
    except CottentionError as error:
        print(error)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    dedent = textwrap.dedent
    body = dedent(head) + textwrap.indent(dedent(script).strip(), "    ") + dedent(tail)
    command = f"ulimit -v 4000000; exec {sys.executable} -c '{body}' {folder}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *said, peak = done.stdout.strip().split("\n")
    return "\n".join(said), int(peak)


def gzip_of(piece: bytes, times: int) -> bytes:
    held = io.BytesIO()
    with gzip.GzipFile(fileobj=held, mode="wb", compresslevel=1) as file:
        for _ in range(times):
            file.write(piece)
    return held.getvalue()


@pytest.mark.slow
def test_an_endless_line_takes_little_memory_in_every_reader(tmp_path):
    content = gzip_of(b"a" * (8 << 20), 40)  # 320 MiB on one line
    write(tmp_path / "a.txt.gz", content)
    write(tmp_path / "train.tsv.gz", content)
    write(tmp_path / "a.jsonl.gz", content)
    for script in (
        'build_sentences(folder / "a.txt.gz", folder / "o", reading=ReadSettings(rows="sentences"))',
        'list(read_records(folder / "a.txt.gz", text_column="text"))',
        'load_glue(glue_task("sst2"), folder, "train")',
        'list(read_rows(folder / "a.jsonl.gz", split_by="document", text_column="text"))',
    ):
        said, peak = _peak(script, tmp_path)
        assert "longer than" in said, script
        assert peak < 700, script


@pytest.mark.slow
def test_bombs_of_columns_and_values_take_little_memory(tmp_path):
    repeated_parquet(tmp_path / "large.parquet", 2000, 50_000_000, dictionary_pagesize_limit=1 << 30)
    said, peak = _peak(
        'for row in read_rows(folder / "large.parquet", split_by="document", text_column="text"): pass', tmp_path
    )
    assert "more than 100 for one" in said
    assert peak < 700
    nodes = b'{"text":"x","a":[' + b"[]," * (20 << 20) + b"[]]}\n"
    write(tmp_path / "a.jsonl.gz", gzip.compress(nodes, 1))
    said, peak = _peak('list(read_rows(folder / "a.jsonl.gz", split_by="document", text_column="text"))', tmp_path)
    assert "more than 2,097,152 values in one row" in said
    assert peak < 400
    compressor = zstandard.ZstdCompressor().compressobj()
    content = b"".join(compressor.compress(b"a b\n" * (1 << 22)) for _ in range(80)) + compressor.flush()
    write(tmp_path / "b.txt.zst", content)
    said, peak = _peak(
        'for row in read_rows(folder / "b.txt.zst", split_by="document", text_column="text"): pass', tmp_path
    )
    assert "more than 100 for one" in said
    assert peak < 400


def test_a_name_of_the_hub_says_why_the_hub_is_not_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "build", "bert", "wikipedia", "--output-dir", "o"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("HF_HUB_OFFLINE is set")
