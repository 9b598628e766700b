"""Text to ids: the right ids, no special ones, counted, cached, in pieces of bounded size, and in parallel the same."""

from __future__ import annotations

import os
import random

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from cottention.data import load_corpus, tokenization, tokenize_documents, train_tokenizer
from cottention.data.arrow_cache import fingerprint_of
from cottention.data.tokenization import arrow_batches
from cottention.errors import DataError
from tests.damage import HARMS
from tests.data.helpers import ordinary_user, refusal, write

TEXTS = ["Fellow citizens of the Senate,", "", "<|endoftext|>[CLS] a [SEP][MASK]", "Größe 🎉\tund  mehr\n", "the end"]


@pytest.fixture(scope="module", params=["bpe", "wordpiece"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    texts = [*TEXTS, "Fellow citizens of the house, the end of all the senates"]
    return train_tokenizer(Dataset.from_dict({"text": texts}), kind=request.param, vocab_size=300)


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_dict({"text": TEXTS, "ends_document": [True, True, False, True, True], "year": [1] * 5})


def test_each_row_becomes_ids_and_counts(rows, tokenizer):
    tokens = tokenize_documents(rows, tokenizer)
    assert tokens.column_names == ["input_ids", "num_bytes", "num_words", "ends_document"]
    assert tokens.data.schema.field("input_ids").type == pa.list_(pa.int32())
    assert tokens["num_bytes"][:] == [30, 0, 32, 23, 7]
    assert tokens["num_words"][:] == [5, 0, 3, 4, 2]
    assert tokens["ends_document"][:] == rows["ends_document"][:]
    for ids, text in zip(tokens["input_ids"], TEXTS, strict=True):
        if "[" not in text:
            assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_text_that_spells_a_special_token_stays_text(rows, tokenizer):
    ids = tokenize_documents(rows, tokenizer)["input_ids"][2]
    assert len(ids) > 10
    unknown = {tokenizer.unk_token_id} - {None}  # a character that the small corpus lacks, not a token that was spelled
    assert not (set(ids) - unknown) & set(tokenizer.all_special_ids)
    if not unknown:
        assert tokenizer.decode(ids) == TEXTS[2]
    assert tokenizer.encode("<|endoftext|>" if not unknown else "[SEP]", add_special_tokens=False)[0] in (
        tokenizer.all_special_ids
    )  # elsewhere the tokenizer still knows it


def test_without_ends_every_row_is_a_document(tokenizer):
    tokens = tokenize_documents(Dataset.from_dict({"text": TEXTS}), tokenizer)
    assert tokens["ends_document"][:] == [True] * len(TEXTS)


def test_long_rows_are_whole(tokenizer):
    tokenizer.model_max_length, before = 16, tokenizer.model_max_length
    try:
        tokens = tokenize_documents(Dataset.from_dict({"text": ["the end of " * 1000]}), tokenizer)
    finally:
        tokenizer.model_max_length = before
    assert len(tokens[0]["input_ids"]) >= 3000


def test_several_processes_give_the_same(rows, tokenizer, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    parallel = tokenize_documents(rows, tokenizer, num_proc=2).to_dict()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert parallel == tokenize_documents(rows, tokenizer).to_dict()


class _Counting(tokenization._Tokenize):
    calls = 0

    def __call__(self, rows):
        type(self).calls += 1
        return super().__call__(rows)


def test_the_same_text_is_tokenised_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization, "_Tokenize", _Counting)
    monkeypatch.setattr(_Counting, "calls", 0)
    corpus = load_corpus(write(tmp_path / "a.txt", "some text"))
    first = tokenize_documents(corpus, tokenizer)
    # What padding and truncation leave behind in a tokenizer changes no id here.
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    again = tokenize_documents(load_corpus(tmp_path / "a.txt"), tokenizer)
    assert _Counting.calls == 1
    assert fingerprint_of(first) == fingerprint_of(again)
    assert first.to_dict() == again.to_dict()


def test_another_tokenizer_or_text_is_tokenised_again(tmp_path, tokenizer):
    corpus = load_corpus(write(tmp_path / "a.txt", "some text"))
    other = train_tokenizer(corpus, kind="bpe", vocab_size=257)
    fingerprints = {fingerprint_of(tokenize_documents(corpus, one)) for one in (tokenizer, other)}
    fingerprints.add(fingerprint_of(tokenize_documents(load_corpus(write(tmp_path / "b.txt", "other")), tokenizer)))
    assert len(fingerprints) == 3


def test_a_slow_tokenizer_will_do(rows, tokenizer):
    class Slow:
        is_fast = False

        def __call__(self, texts, **options):
            assert options["add_special_tokens"] is False
            return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    tokens = tokenize_documents(rows, Slow())  # pyright: ignore[reportArgumentType]
    assert tokens["input_ids"][0] == [6, 8, 2, 3, 7]


def test_a_tokenizer_never_gets_more_than_some_megabytes_at_once(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization, "_BATCH_BYTES", 1000)
    # The mean of a corpus says nothing about long rows that stand together.
    texts = ["a"] * 20_000 + ["a word " * 100] * 50 + ["a"] * 10
    sizes = []

    def spying(texts, **options):
        sizes.append(sum(map(len, texts)))
        return tokenizer(texts, **options)

    tokenize = tokenization._Tokenize(tokenizer)
    monkeypatch.setattr(tokenize, "tokenizer", spying)
    ids = tokenize({"text": texts})["input_ids"]
    assert max(sizes) <= 1000
    assert len(ids) == len(texts)
    assert [list(row) for row in ids[-60:]] == tokenizer(texts[-60:], add_special_tokens=False)["input_ids"]


def test_batches_are_bounded_and_lose_nothing(monkeypatch):
    monkeypatch.setattr(tokenization, "_BATCH_BYTES", 4000)
    lengths = [1] * 3000 + [900] * 40 + [1] * 10 + [5000]
    column = [np.arange(length, dtype=np.int32) for length in lengths]
    dataset = Dataset.from_dict({"input_ids": column})
    for some in (dataset, dataset.select(range(0, len(lengths), 3))):
        tables = list(arrow_batches(some))
        assert max(table.nbytes for table in tables if len(table) > 1) <= 2 * 4000
        assert pa.concat_tables(tables).to_pydict()["input_ids"] == some["input_ids"][:]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Dataset.from_dict({"text": []}), "no rows"),
        (Dataset.from_dict({"txt": ["a"]}), "column 'text'; it has 'txt'; did you mean 'txt'"),
        (Dataset.from_dict({}), "it has none"),
    ],
)
def test_a_dataset_without_text_is_refused(dataset, expected, tokenizer):
    for use in (lambda: tokenize_documents(dataset, tokenizer), lambda: train_tokenizer(dataset, vocab_size=300)):
        with pytest.raises(DataError) as error:
            use()
        assert expected in refusal(error)


def test_a_cache_that_may_not_be_written_is_one_line(public_path, tokenizer):
    corpus = load_corpus(write(public_path / "a.txt", "some text"))
    for path in [*(public_path / "cache").rglob("*"), public_path / "cache"]:
        path.chmod(0o555)
    with ordinary_user(), pytest.raises(DataError) as error:
        tokenize_documents(corpus, tokenizer)
    assert "HF_DATASETS_CACHE chooses another" in refusal(error)


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_cache_of_tokens_is_made_again(harm, cache, tmp_path, tokenizer):
    corpus = load_corpus(write(tmp_path / "a.txt", "some text that has been read " * 300))
    expected = tokenize_documents(corpus, tokenizer).to_dict()
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert len(files) == 2  # one of text and one of tokens, both ours
    for path in files:
        content = path.read_bytes()
        path.unlink()  # a mapped file keeps what was mapped
        path.write_bytes(content)
        harm(path, random.Random(1))
        assert tokenize_documents(load_corpus(tmp_path / "a.txt"), tokenizer).to_dict() == expected
        assert path.read_bytes() == content
