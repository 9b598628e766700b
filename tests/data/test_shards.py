"""Corpus directories: complete or not there, resumed byte for byte, and one line for everything that is wrong."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Features, Value

from cottention.data import is_corpus, open_corpus
from cottention.data.shards import KINDS, CorpusWriter
from cottention.errors import CottentionError
from tests.damage import HARMS
from tests.data.helpers import ordinary_user, refusal

FEATURES = Features({"document": Value("int64"), "text": Value("string")})
SETTINGS = {"sources": [{"name": "a.txt", "bytes": 3}], "limit": 5}
NUM_TASKS = 20


def writer(path: Path, **options: Any) -> CorpusWriter:
    settings = {"kind": "gpt-text", "features": FEATURES, "settings": SETTINGS, "shard_bytes": 2000, **options}
    return CorpusWriter(path, **settings)


def task(number: int) -> tuple[pa.Table, dict[str, int]]:
    rows = {"document": [number, number], "text": ["x" * 100, f"the end of {number}"]}
    return pa.table(rows), {"documents": 1, "bytes": 100 + number}


def build(path: Path, *, stop_after: int = NUM_TASKS, **options: Any) -> list[int]:
    """Do the tasks that are left; return which."""
    done = []
    with writer(path, **options) as corpus:
        for number in range(corpus.num_tasks, stop_after):
            corpus.add(*task(number))
            done.append(number)
        if stop_after == NUM_TASKS and not corpus.is_finished:
            corpus.finish()
    return done


def _add_all(corpus: CorpusWriter) -> None:
    for number in range(NUM_TASKS):
        corpus.add(*task(number))


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(CottentionError) as error:
        writer(path, **options)
    return refusal(error)


def not_opened(path: Path, **options: Any) -> str:
    with pytest.raises(CottentionError) as error:
        open_corpus(path, **options)
    return refusal(error)


def test_what_was_written_is_opened(tmp_path):
    build(tmp_path / "made/here")
    corpus = open_corpus(str(tmp_path / "made/here"))
    assert is_corpus(tmp_path / "made/here")
    assert corpus.kind == "gpt-text"
    assert corpus.tokenizer_path is None
    rows: Any = corpus.dataset
    assert rows["document"][:] == [number for number in range(NUM_TASKS) for _ in range(2)]
    assert rows[-1]["text"] == "the end of 19"
    assert corpus.manifest["counts"] == {"documents": NUM_TASKS, "bytes": sum(100 + n for n in range(NUM_TASKS))}
    assert corpus.manifest["settings"] == SETTINGS
    assert corpus.manifest["rows"] == 40 == sum(shard["rows"] for shard in corpus.manifest["shards"])
    names = [f"shard-{number:05d}.arrow" for number in range(len(corpus.manifest["shards"]))]
    assert len(names) > 2
    assert sorted(content(corpus.path)) == ["manifest.json", *names]


def test_the_same_corpus_has_the_same_fingerprint_wherever_it_lies(tmp_path):
    build(tmp_path / "a")
    build(tmp_path / "b")
    build(tmp_path / "c", shard_bytes=900)
    prints = [open_corpus(tmp_path / name).dataset._fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("stop_after", [1, 7, 12, 19])
def test_an_interrupted_build_goes_on_to_the_same_bytes(tmp_path, stop_after):
    build(tmp_path / "whole")
    begun = build(tmp_path / "part", stop_after=stop_after)
    assert len(begun) == stop_after
    assert not is_corpus(tmp_path / "part")
    assert not list((tmp_path / "part").glob("*.partial")) if (tmp_path / "part").exists() else stop_after == 1
    again = build(tmp_path / "part")
    assert again[0] <= stop_after
    if stop_after >= 12:
        assert again[0] > 0  # finished shards are kept
    assert content(tmp_path / "part") == content(tmp_path / "whole")


def test_a_killed_build_goes_on_too(tmp_path):
    build(tmp_path / "whole")
    corpus = writer(tmp_path / "killed")
    for number in range(15):
        corpus.add(*task(number))
    corpus._shard = None  # neither closed nor removed, as after SIGKILL
    corpus.__exit__(None, None, None)
    (tmp_path / "killed" / "shard-00004.partial").write_bytes(b"half")
    (tmp_path / "killed" / "shard-00003.arrow").write_bytes(b"renamed, but not yet in progress.json")
    assert "is an unfinished corpus; run `cottention data build gpt` again" in not_opened(tmp_path / "killed")
    assert build(tmp_path / "killed")[0] > 0
    found = content(tmp_path / "killed")
    assert {name: found[name] for name in content(tmp_path / "whole")} == content(tmp_path / "whole")


def test_a_finished_corpus_is_not_built_again(tmp_path):
    build(tmp_path)
    before = content(tmp_path)
    with writer(tmp_path) as corpus:
        assert corpus.is_finished
        assert corpus.counts["documents"] == NUM_TASKS
        assert corpus.num_rows == 40
    assert content(tmp_path) == before


def test_other_settings_touch_nothing(tmp_path):
    build(tmp_path / "done")
    build(tmp_path / "begun", stop_after=12)
    before = content(tmp_path / "done"), content(tmp_path / "begun")
    message = refused(tmp_path / "done", settings={**SETTINGS, "limit": 6})
    assert "holds a finished corpus with limit 5 instead of 6; choose another directory, or overwrite" in message
    assert "holds an interrupted build with other sources" in refused(tmp_path / "begun", settings={"sources": []})
    assert "kind 'gpt-text' instead of 'gpt-tokens'" in refused(tmp_path / "begun", kind="gpt-tokens")
    assert (content(tmp_path / "done"), content(tmp_path / "begun")) == before


def test_overwriting_begins_afresh(tmp_path):
    build(tmp_path / "corpus")
    (tmp_path / "corpus/tokenizer").mkdir()
    (tmp_path / "corpus/tokenizer/tokenizer.json").touch()
    assert len(build(tmp_path / "corpus", settings={"limit": 1}, overwrite=True)) == NUM_TASKS
    assert open_corpus(tmp_path / "corpus").manifest["settings"] == {"limit": 1}
    assert open_corpus(tmp_path / "corpus").tokenizer_path is None


def test_two_builds_do_not_share_a_directory(tmp_path):
    with writer(tmp_path / "corpus") as first:
        first.add(*task(0))
        message = refused(tmp_path / "corpus", overwrite=True)
        assert re.fullmatch(
            rf"{tmp_path}/corpus is being written by process {os.getpid()} on host \S+ since [-0-9]+ [:0-9]+; "
            "wait for it, or choose another",
            message,
        )
    build(tmp_path / "corpus")


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty (it holds 'notes.txt')" in refused(tmp_path)
    assert "is not empty (it holds 'notes.txt')" in refused(tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir() if file.name != ".lock"] == ["notes.txt"]
    (tmp_path / "file").touch()
    assert f"cannot write {tmp_path / 'file'}: File exists" in refused(tmp_path / "file")


def test_nothing_left_leaves_no_directory(tmp_path):
    empty = pa.table({"document": pa.array([], pa.int64()), "text": pa.array([], pa.string())})
    with writer(tmp_path / "corpus") as corpus:
        corpus.add(empty, {"documents": 3, "documents_dropped_too_long": 3, "documents_kept": 0})
        with pytest.raises(CottentionError) as error:
            corpus.finish()
    assert refusal(error) == "nothing is left of the text: documents 3, documents dropped too long 3"
    assert not (tmp_path / "corpus").exists()


def test_a_folder_that_may_not_be_written_is_named(public_path):
    (public_path / "closed").mkdir(mode=0o555)
    with ordinary_user():
        message = refused(public_path / "closed/corpus")
    assert message == f"cannot write {public_path / 'closed/corpus'}: Permission denied"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without space")
def test_a_full_disk_is_named(tmp_path):
    with writer(tmp_path / "corpus") as corpus:
        (tmp_path / "corpus/shard-00000.partial").symlink_to("/dev/full")
        with pytest.raises(CottentionError) as error:
            _add_all(corpus)
    assert refusal(error) == f"cannot write {tmp_path / 'corpus'}: No space left on device"


def test_what_is_no_corpus_is_told(tmp_path):
    build(tmp_path / "wiki")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").touch()
    assert not_opened(tmp_path / "wiky") == f"no such corpus directory: {tmp_path / 'wiky'}; did you mean 'wiki'?"
    assert "is not a corpus directory: it has no manifest.json" in not_opened(tmp_path / "folder")
    assert "is a file, not a corpus directory" in not_opened(tmp_path / "file.txt")
    assert not_opened(tmp_path / "wiki", kind="bert-sentences") == (
        f"{tmp_path / 'wiki'} holds gpt-text, made by `cottention data build gpt`; "
        "bert-sentences is needed here, made by `cottention data build bert`"
    )
    assert set(KINDS) == {"bert-sentences", "bert-pairs", "gpt-text", "gpt-tokens"}


def _manifest_without_shards(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["shards"]
    (path / "manifest.json").write_text(json.dumps(manifest))


def _newer_format(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))


def _same_size_but_no_arrow(path: Path) -> None:
    shard = path / "shard-00000.arrow"
    shard.write_bytes(b"?" * shard.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "shard-00001.arrow").unlink(), "shard-00001.arrow is missing"),
        (lambda path: (path / "shard-00001.arrow").write_bytes(b""), "shard-00001.arrow has 0 bytes of"),
        (_same_size_but_no_arrow, "shard-00000.arrow is damaged"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is damaged: no JSON object"),
        (_manifest_without_shards, "is damaged: 'shards' is missing"),
        (_newer_format, "is a corpus of another version of cottention"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    build(tmp_path)
    damage(tmp_path)
    assert message in not_opened(tmp_path)


def test_a_damaged_shard_of_an_interrupted_build_is_named(tmp_path):
    build(tmp_path / "corpus", stop_after=15)
    (tmp_path / "corpus/shard-00000.arrow").write_bytes(b"short")
    assert "shard-00000.arrow has 5 bytes of" in refused(tmp_path / "corpus")


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("seed", range(8))
def test_one_bit_or_some_zeros_in_any_file_are_noticed(tmp_path, harm, seed):
    chance = random.Random(seed)
    with writer(tmp_path) as corpus:
        _add_all(corpus)
        corpus.tokenizer_path.mkdir()
        (corpus.tokenizer_path / "tokenizer.json").write_text('{"model": "of words"}')
        corpus.finish()
    open_corpus(tmp_path)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    for path in files:
        content = path.read_bytes()
        harm(path, chance)
        assert path.name in not_opened(tmp_path) or "another version" in not_opened(tmp_path)
        path.write_bytes(content)
    open_corpus(tmp_path)


def test_a_corpus_of_an_older_version_has_no_hashes_and_opens(tmp_path):
    build(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for name in ("sha256", "tokenizer_files"):
        del manifest[name]
    for shard in manifest["shards"]:
        del shard["sha256"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert len(open_corpus(tmp_path).dataset) == 40


@pytest.mark.parametrize("content", ["{}", '{"kind": "gpt-text"}', "[" * 100_000, "[]", "null", '{"shards": 3}'])
def test_a_damaged_progress_is_one_line(tmp_path, content):
    build(tmp_path / "corpus", stop_after=12)
    path = tmp_path / "corpus/progress.json"
    header = {key: json.loads(path.read_text())[key] for key in ("kind", "format_version", "settings")}
    path.write_text(json.dumps({**header, "counts": 3}) if content == "{}" else content)
    refused(tmp_path / "corpus")
