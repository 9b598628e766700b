"""Text to corpus directories: counts that add up, the same bytes for any number of processes, after any kill."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cottention.data import (
    load_corpus,
    load_tokenizer,
    open_corpus,
    pack_windows,
    sentence_documents,
    sentence_pairs,
    tokenize_documents,
)
from cottention.data.building import build_documents, build_sentences, tokenize_pairs, tokenize_text
from cottention.data.sources import ReadSettings
from cottention.errors import CottentionError
from tests import tiny
from tests.data.helpers import documents_of, refusal, write
from tests.forks import start_fork

SMALL_SHARDS = 6000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """80 documents: short ones, long ones, empty ones, one of a single sentence."""
    rng = np.random.default_rng(0)
    rows = [{"text": ""}, {"text": "All alone."}, {"text": "HEADING"}]
    for document in range(80):
        sentences = (
            " ".join(f"The people of the United States number {rng.integers(99)}" for _ in range(rng.integers(1, 4)))
            for _ in range(rng.integers(2, 9))
        )
        rows.append({"text": ". ".join(sentences) + f", in document {document}."})
    return write(tmp_path / "source.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def refused(function: Any, *words: Any, **settings: Any) -> str:
    with pytest.raises(CottentionError) as error:
        function(*words, **settings)
    return refusal(error)


def test_bert_corpora_hold_what_the_functions_make(tmp_path, source):
    tokenizer = tiny.wordpiece_tokenizer()
    built = build_sentences(source, tmp_path / "sentences")
    made = tokenize_pairs(tmp_path / "sentences", tmp_path / "pairs", tokenizer, max_length=64)
    sentences: Any = sentence_documents(load_corpus(source))
    found: Any = open_corpus(tmp_path / "sentences", kind="bert-sentences").dataset
    assert found["sentences"][:] == sentences["sentences"][:]
    pairs: Any = sentence_pairs(found, tokenizer, 64)
    corpus = open_corpus(tmp_path / "pairs", kind="bert-pairs")
    for name in ("first", "second", "document"):
        assert corpus.dataset[name][:] == pairs[name][:]
    assert built.rows == len(found) == built.counts["documents_kept"] == 80
    assert made.rows == len(pairs) == made.counts["pairs"]
    assert load_tokenizer(tmp_path / "pairs/tokenizer").get_vocab() == tokenizer.get_vocab()
    assert corpus.manifest["settings"]["corpus"]["settings"]["sources"][0]["file"] == "source.jsonl"


def test_bert_counts_add_up(tmp_path, source):
    counts = build_sentences(source, tmp_path / "sentences").counts
    dropped = {name: count for name, count in counts.items() if name.startswith("documents_dropped_")}
    assert dropped == {
        "documents_dropped_empty": 1,
        "documents_dropped_no_sentence": 1,
        "documents_dropped_too_short": 1,
    }
    assert counts["documents"] == 83 == counts["documents_kept"] + sum(dropped.values())
    made = tokenize_pairs(tmp_path / "sentences", tmp_path / "pairs", tiny.wordpiece_tokenizer(), max_length=64)
    assert made.counts["sentences"] == counts["sentences_kept"]
    assert made.counts["tokens"] == sum(
        made.counts[f"tokens_{what}"] for what in ("kept", "dropped_trimmed", "dropped_no_partner")
    )
    assert made.tokens_per_s
    assert made.megabytes_per_s > 0


def test_rows_of_single_sentences_are_paired(tmp_path):
    path = write(tmp_path / "books.txt", "He left .\nShe stayed . Or not .\n\nIt rained .\nthey came\n")
    reading = ReadSettings(rows="sentences", documents_by="blank")
    build_sentences(path, tmp_path / "sentences", reading=reading)
    assert open_corpus(tmp_path / "sentences").dataset.to_list() == [
        {"document": 0, "sentences": ["He left .", "She stayed . Or not ."]},
        {"document": 1, "sentences": ["It rained .", "they came"]},
    ]


def test_a_long_document_comes_in_rows_and_no_pair_in_two_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr("cottention.data.readers.BLOCK", 600)
    paragraphs = [f"Here is number {n}. And this is more of {n}.\n\n" for n in range(200)]
    path = write(tmp_path / "book.txt", "".join(paragraphs))
    report = build_sentences(path, tmp_path / "sentences")
    rows: Any = open_corpus(tmp_path / "sentences").dataset
    assert len(rows) > 5
    assert set(rows["document"]) == {0}
    assert [s for row in rows["sentences"] for s in row] == [
        sentence for n in range(200) for sentence in (f"Here is number {n}.", f"And this is more of {n}.")
    ]
    assert report.counts["documents"] == report.counts["documents_kept"] == 1


def test_gpt_corpora_hold_what_the_functions_make(tmp_path, source):
    tokenizer: Any = tiny.bpe_tokenizer()
    built = build_documents(source, tmp_path / "text")
    corpus = load_corpus(source)
    assert documents_of(open_corpus(tmp_path / "text").dataset) == documents_of(corpus)
    made = tokenize_text(tmp_path / "text", tmp_path / "tokens", tokenizer)
    straight = tokenize_text(source, tmp_path / "straight", tokenizer)
    expected: Any = tokenize_documents(corpus, tokenizer)
    for name in ("tokens", "straight"):
        tokens: Any = open_corpus(tmp_path / name, kind="gpt-tokens").dataset
        assert tokens.features == expected.features
        assert all(tokens[column][:] == expected[column][:] for column in expected.column_names)
        windows = pack_windows(tokens, 32, tokenizer.eos_token_id)
        assert windows["input_ids"][:].tolist() == (  # pyright: ignore
            pack_windows(expected, 32, tokenizer.eos_token_id)["input_ids"][:].tolist()  # pyright: ignore
        )
    assert made.counts["tokens"] == straight.counts["tokens"] == sum(map(len, expected["input_ids"]))
    assert built.counts["documents"] == straight.counts["documents"] == 83
    assert built.counts["documents_kept"] == 82
    assert built.counts["documents_dropped_empty"] == 1


def test_long_documents_are_left_out_of_gpt_text_and_counted(tmp_path, source):
    texts = documents_of(load_corpus(source))
    limit = sorted(map(len, texts))[60]
    report = build_documents(source, tmp_path / "text", max_document_chars=limit)
    kept = [text for text in texts if len(text) <= limit]
    assert documents_of(open_corpus(tmp_path / "text").dataset) == kept
    assert report.counts["documents_dropped_too_long"] == len(texts) - len(kept) > 10
    assert report.counts["documents_kept"] == len(kept)
    assert report.counts["bytes"] - report.counts["bytes_dropped_too_long"] == sum(map(len, kept))
    message = refused(build_documents, source, tmp_path / "none", max_document_chars=2)
    assert message.startswith("nothing is left of the text: documents 83, documents dropped empty 1,")
    assert "documents dropped too long 82" in message
    assert not (tmp_path / "none").exists()
    assert "max_document_chars must be at least 1" in refused(
        build_documents, source, tmp_path / "none", max_document_chars=-1
    )


def test_a_tokenizer_is_trained_on_the_text(tmp_path, source, monkeypatch):
    build_documents(source, tmp_path / "text")
    tokenize_text(tmp_path / "text", tmp_path / "tokens", None, vocab_size=300)
    tokenize_text(source, tmp_path / "straight", None, vocab_size=300)
    tokenizers = [load_tokenizer(tmp_path / name / "tokenizer") for name in ("tokens", "straight")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert len(tokenizers[0]) == 300
    monkeypatch.setattr("cottention.data.building._TRAINING_BYTES", 3000)
    tokenize_text(tmp_path / "text", tmp_path / "sampled", None, vocab_size=300)
    assert load_tokenizer(tmp_path / "sampled/tokenizer").get_vocab() != tokenizers[0].get_vocab()
    assert "run `cottention data build gpt` first" in refused(
        tokenize_text, source, tmp_path / "x", None, reading=ReadSettings(rows="sentences")
    )


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cottention.data.sentences._TASK_CHARACTERS", 1500)
    monkeypatch.setattr("cottention.data.building._TASK_CHARACTERS", 1500)
    monkeypatch.setattr("cottention.data.tokenization._BATCH_BYTES", 2000)


def steps(source: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    """The four commands, each as a call without arguments."""
    bert, gpt = tiny.wordpiece_tokenizer(), tiny.bpe_tokenizer()
    settings = {"shard_bytes": SMALL_SHARDS, **settings}
    texts = {name: value for name, value in settings.items() if name != "num_proc"}
    return {
        "sentences": lambda: build_sentences(source, folder / "sentences", **settings),
        "pairs": lambda: tokenize_pairs(folder / "sentences", folder / "pairs", bert, max_length=32, **settings),
        "text": lambda: build_documents(source, folder / "text", **texts),
        "tokens": lambda: tokenize_text(folder / "text", folder / "tokens", gpt, **settings),
    }


@pytest.mark.usefixtures("small_tasks")
def test_the_same_bytes_for_one_and_two_processes(tmp_path, source):
    for num_proc in (1, 2):
        for name, step in steps(source, tmp_path / str(num_proc), num_proc=num_proc).items():
            assert step().num_proc == (1 if name == "text" else num_proc)
    one, two = content(tmp_path / "1"), content(tmp_path / "2")
    assert one == two
    assert sum(name.endswith(".arrow") for name in one) > 12


@pytest.mark.usefixtures("small_tasks")
@pytest.mark.parametrize("step", ["sentences", "pairs", "text", "tokens"])
def test_an_interrupted_build_goes_on_to_the_same_bytes(tmp_path, source, monkeypatch, step):
    for whole in steps(source, tmp_path / "whole").values():
        whole()
    part = steps(source, tmp_path / "part")
    if step in ("pairs", "tokens"):
        part["sentences" if step == "pairs" else "text"]()
    add, added = _failing_after(6)
    with monkeypatch.context() as patched:
        patched.setattr("cottention.data.shards.CorpusWriter.add", add)
        with pytest.raises(KeyboardInterrupt):
            part[step]()
    assert "is an unfinished corpus" in refused(open_corpus, tmp_path / "part" / step)
    add, again = _failing_after(10**6)
    monkeypatch.setattr("cottention.data.shards.CorpusWriter.add", add)
    part[step]()
    assert content(tmp_path / "part" / step) == content(tmp_path / "whole" / step)
    # What is in finished shards is not done again.
    assert len(added) == 6
    whole_tasks = len(again) + open_tasks(added, again)
    assert len(again) < whole_tasks
    assert part[step]().was_finished


def open_tasks(added: list[int], again: list[int]) -> int:
    """Tasks that the second run did not do."""
    return added.index(again[0]) if again[0] in added else len(added)


def _failing_after(number: int) -> tuple[Any, list[int]]:
    """CorpusWriter.add, but interrupted after so many tasks; and the sizes of what it was given."""
    from cottention.data.shards import CorpusWriter

    real, added = CorpusWriter.add, []

    def add(self: Any, table: Any, counts: Any) -> None:
        if len(added) == number:
            raise KeyboardInterrupt
        added.append(hash(str(table.to_pylist())))
        real(self, table, counts)

    return add, added


def test_a_killed_command_goes_on_to_the_same_bytes(tmp_path):
    text = "The people came. They saw what was there to see, and nobody was there. Then they left again.\n\n" * 36_000
    source = write(tmp_path / "long.txt", text)
    words = ["data", "build", "bert", str(source), "--shard-size-mb", "1", "--num-proc", "1", "--output-dir"]
    part = tmp_path / "part"
    running = start_fork("-m", "cottention", *words, str(part))
    while not (part / "shard-00001.arrow").exists():
        assert running.poll() is None
        time.sleep(0.005)
    running.kill()
    running.communicate()
    assert not (part / "manifest.json").exists()
    assert (part / "progress.json").exists()
    whole = build_sentences(source, tmp_path / "whole", shard_bytes=1 << 20)
    resumed = build_sentences(source, part, shard_bytes=1 << 20)
    assert resumed.counts == whole.counts
    found, expected = content(part), content(tmp_path / "whole")
    assert {name: found[name] for name in expected} == expected


def test_a_finished_corpus_is_reported_and_not_built_again(tmp_path, source):
    first = build_sentences(source, tmp_path / "sentences")
    before = content(tmp_path / "sentences")
    second = build_sentences(source, tmp_path / "sentences")
    assert second.was_finished
    assert (second.counts, second.rows) == (first.counts, first.rows)
    assert "was there already" in second.summary()
    message = refused(build_sentences, source, tmp_path / "sentences", min_sentences=3)
    assert "holds a finished corpus with min_sentences 2 instead of 3" in message
    write(source, source.read_text() + '{"text": "One more. And another."}\n')
    assert "holds a finished corpus with other sources" in refused(build_sentences, source, tmp_path / "sentences")
    assert content(tmp_path / "sentences") == before
    assert build_sentences(source, tmp_path / "sentences", overwrite=True).rows == first.rows + 1


def test_corpora_of_another_kind_and_tokenizers_that_do_not_fit_are_refused(tmp_path, source):
    bert, gpt = tiny.wordpiece_tokenizer(), tiny.bpe_tokenizer()
    build_sentences(source, tmp_path / "sentences")
    tokenize_pairs(tmp_path / "sentences", tmp_path / "pairs", bert, max_length=64)
    message = refused(tokenize_pairs, tmp_path / "pairs", tmp_path / "x", bert, max_length=64)
    assert "holds bert-pairs, made by `cottention data tokenize bert`; bert-sentences is needed here" in message
    assert "gpt-text is needed here" in refused(tokenize_text, tmp_path / "sentences", tmp_path / "x", gpt)
    assert "is a file, not a corpus directory" in refused(tokenize_pairs, source, tmp_path / "x", bert, max_length=64)
    assert "has no cls_token" in refused(tokenize_pairs, tmp_path / "sentences", tmp_path / "x", gpt, max_length=64)
    assert "has no eos_token" in refused(tokenize_text, source, tmp_path / "x", bert)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("function", [build_sentences, build_documents])
def test_text_that_cannot_be_used_is_told(tmp_path, function):
    empty = write(tmp_path / "empty.txt", "")
    message = refused(function, empty, tmp_path / "x")
    assert message.startswith("nothing is left of the text: ")
    assert "documents dropped empty 1" in message
    bad = write(tmp_path / "bad.jsonl", '{"text": "One. Two."}\n{"txt": "Three."}\n')
    message = refused(function, bad, tmp_path / "x")
    assert message == f"{bad}, line 2: no column 'text'; it has 'txt'; did you mean 'txt'?"
    assert refused(function, tmp_path / "none.txt", tmp_path / "x").startswith("no such file or folder")
    assert not (tmp_path / "x").exists()
