"""Windows: every token once and in order, documents where they begin, tails, and nothing held in memory."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from cottention.data import (
    PackingReport,
    load_corpus,
    pack_mlm_windows,
    pack_windows,
    packing_report,
    tokenization,
    tokenize_documents,
    train_tokenizer,
)
from cottention.data.packing import join_documents
from cottention.errors import CottentionError, DataError, SettingsError
from tests.data.helpers import refusal, write

EOS, CLS, SEP, PAD = 0, 1, 2, 3
MLM: dict[str, Any] = {"cls_token_id": CLS, "sep_token_id": SEP, "pad_token_id": PAD}
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "num_bytes": Value("int64"),
        "num_words": Value("int64"),
        "ends_document": Value("bool"),
    }
)


def tokens_of(documents: list[list[list[int]]], *, open_end: bool = False) -> Dataset:
    """Tokenised documents, each a list of rows; with `open_end` the last row does not end its document."""
    rows = [(row, row is document[-1]) for document in documents for row in document]
    ends = [end for _, end in rows]
    if open_end:
        ends[-1] = False
    lengths = [len(row) for row, _ in rows]
    columns = {"input_ids": [row for row, _ in rows], "num_bytes": [3 * n for n in lengths], "num_words": lengths}
    return Dataset.from_dict({**columns, "ends_document": ends}, features=FEATURES)


def numbered(*lengths: int) -> list[list[list[int]]]:
    """Documents of one row each, whose tokens are all different."""
    bounds = np.cumsum([10, *lengths])
    return [[list(range(low, high))] for low, high in pairwise(bounds.tolist())]


def rows_of(windows: Any) -> list[tuple[list[int], int, list[int]]]:
    return [(row["input_ids"].tolist(), int(row["num_tokens"]), row["document_starts"].tolist()) for row in windows]


def stream_of(documents: list[list[list[int]]], separator: int, *, outer: bool) -> tuple[list[int], list[int]]:
    """The documents joined, and where they begin; said again in the plainest way."""
    stream, starts = [], []
    for document in documents:
        if outer:
            starts.append(len(stream))
        if outer or stream or starts:
            stream.append(separator)
        if not outer:
            starts.append(len(stream))
        stream += [token for row in document for token in row]
    return ([*stream, separator] if outer else stream), starts


@pytest.fixture
def small_batches(monkeypatch):
    """Batches of a row or two, so that every state is carried on."""
    monkeypatch.setattr(tokenization, "_BATCH_BYTES", 40)


DOCUMENTS = st.lists(st.lists(st.lists(st.integers(4, 99), max_size=9), min_size=1, max_size=3), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(DOCUMENTS, st.integers(2, 12), st.sampled_from(["drop", "pad"]), st.sampled_from([40, 1 << 22]))
def test_gpt_windows_are_the_joined_text_cut(tmp_path_factory, documents, window, tail, batch_bytes):
    stream, starts = stream_of(documents, EOS, outer=True)
    expected = [stream[at : at + window] for at in range(0, len(stream), window)]
    if tail == "drop" and len(expected[-1]) < window:
        expected.pop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "_BATCH_BYTES", batch_bytes)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
        tokens = tokens_of(documents)
        if not expected:
            with pytest.raises(DataError):
                pack_windows(tokens, window, EOS, tail=tail)
            return
        windows = pack_windows(tokens, window, EOS, tail=tail, pad_token_id=PAD)
        report = packing_report(tokens, windows)
    rows = rows_of(windows)
    assert [ids[:num_tokens] for ids, num_tokens, _ in rows] == expected
    assert all(ids[num_tokens:] == [PAD] * (window - num_tokens) for ids, num_tokens, _ in rows)
    placed = [number * window + start for number, (_, _, found) in enumerate(rows) for start in found]
    assert placed == [start for start in starts if start < len(rows) * window]
    num_kept = sum(map(len, expected))
    assert report == PackingReport(
        num_documents=len(documents),
        num_bytes=sum(3 * len(row) for document in documents for row in document),
        num_tokens=len(stream),
        num_windows=len(expected),
        num_dropped=len(stream) - num_kept,
        num_padding=len(expected) * window - num_kept,
    )


@settings(max_examples=80, deadline=None)
@given(DOCUMENTS, st.integers(3, 12), st.sampled_from(["drop", "pad"]), st.sampled_from([40, 1 << 22]))
def test_bert_windows_are_the_joined_text_cut_and_wrapped(tmp_path_factory, documents, window, tail, batch_bytes):
    stream, starts = stream_of(documents, SEP, outer=False)
    length = window - 2
    expected = [stream[at : at + length] for at in range(0, len(stream), length)]
    if tail == "drop" and expected and len(expected[-1]) < length:
        expected.pop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "_BATCH_BYTES", batch_bytes)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
        tokens = tokens_of(documents)
        if not expected:
            with pytest.raises(DataError):
                pack_mlm_windows(tokens, window, **MLM, tail=tail)
            return
        windows = pack_mlm_windows(tokens, window, **MLM, tail=tail)
        report = packing_report(tokens, windows)
    rows = rows_of(windows)
    assert [ids[:num_tokens] for ids, num_tokens, _ in rows] == [[CLS, *content, SEP] for content in expected]
    assert all(len(ids) == window for ids, _, _ in rows)
    assert all(ids[num_tokens:] == [PAD] * (window - num_tokens) for ids, num_tokens, _ in rows)
    placed = [number * length + start - 1 for number, (_, _, found) in enumerate(rows) for start in found]
    assert placed == [start for start in starts if start < len(rows) * length]
    num_tokens = len(stream) + 2 * len(expected)
    num_kept = sum(len(content) + 2 for content in expected)
    assert (report.num_documents, report.num_tokens, report.num_windows) == (len(documents), num_tokens, len(expected))
    assert report.num_dropped == num_tokens - num_kept
    assert report.num_padding == len(expected) * window - num_kept


def test_one_end_of_text_between_documents_none_inside(small_batches):
    # The second document has two rows, and both are cut by windows.
    documents = [[[10, 11, 12]], [[20, 21, 22], [23, 24]], [[30]]]
    windows = pack_windows(tokens_of(documents), 4, EOS, tail="pad")
    assert rows_of(windows) == [
        ([0, 10, 11, 12], 4, [0]),
        ([0, 20, 21, 22], 4, [0]),
        ([23, 24, 0, 30], 4, [2]),
        ([0, 0, 0, 0], 1, []),
    ]


def test_bert_windows_have_a_sep_between_documents_and_at_the_end(small_batches):
    documents = [[[10, 11, 12]], [[20, 21], [22]], [[30]]]
    assert rows_of(pack_mlm_windows(tokens_of(documents), 6, **MLM, tail="pad")) == [
        ([1, 10, 11, 12, 2, 2], 6, [1]),
        ([1, 20, 21, 22, 2, 2], 6, [1]),
        ([1, 30, 2, 3, 3, 3], 3, [1]),
    ]


def test_padding_is_end_of_text_where_nothing_else_is_asked_for():
    (row,) = rows_of(pack_windows(tokens_of(numbered(2)), 7, EOS, tail="pad"))
    assert row == ([EOS, 10, 11, EOS, EOS, EOS, EOS], 4, [0])


def test_without_ends_every_row_is_a_document():
    tokens = tokens_of(numbered(2, 3)).remove_columns("ends_document")
    assert rows_of(pack_windows(tokens, 8, EOS)) == [([0, 10, 11, 0, 12, 13, 14, 0], 8, [0, 3])]
    assert packing_report(tokens, pack_windows(tokens, 8, EOS)).num_documents == 2


def test_a_document_that_is_cut_off_counts_as_one():
    tokens = tokens_of([[[10, 11]], [[20], [21]]], open_end=True)
    windows = pack_windows(tokens, 7, EOS)
    assert rows_of(windows) == [([0, 10, 11, 0, 20, 21, 0], 7, [0, 3])]
    report = packing_report(tokens, windows)
    assert (report.num_documents, report.num_tokens, report.num_dropped) == (2, 7, 0)


def test_windows_are_mapped_arrays_of_fixed_size(cache):
    windows = pack_windows(tokens_of(numbered(50, 60)), 16, EOS)
    assert windows.features["input_ids"].length == 16
    assert windows.data.schema.field("input_ids").type == pa.list_(pa.int32(), 16)
    assert isinstance(windows[0]["input_ids"], np.ndarray)
    assert type(windows.data).__name__ == "MemoryMappedTable"
    assert [str(cache) in file["filename"] for file in windows.cache_files] == [True]


def test_windows_are_cut_once(monkeypatch):
    tokens = tokens_of(numbered(50, 60))
    first = pack_windows(tokens, 16, EOS)
    monkeypatch.setattr("cottention.data.packing.arrow_batches", None)
    assert rows_of(pack_windows(tokens, 16, EOS)) == rows_of(first)


def test_every_setting_makes_windows_of_its_own():
    tokens, other = tokens_of(numbered(50, 60)), tokens_of(numbered(51, 59))
    made = [
        pack_windows(tokens, 16, EOS),
        pack_windows(other, 16, EOS),
        pack_windows(tokens, 15, EOS),
        pack_windows(tokens, 16, 5),
        pack_windows(tokens, 16, EOS, tail="pad"),
        pack_windows(tokens, 16, EOS, tail="pad", pad_token_id=PAD),
        pack_mlm_windows(tokens, 16, **MLM),
        pack_mlm_windows(tokens, 16, **{**MLM, "cls_token_id": 7}),
        pack_mlm_windows(tokens, 16, **{**MLM, "sep_token_id": 7}),
        pack_mlm_windows(tokens, 16, **MLM, tail="pad"),
        pack_mlm_windows(tokens, 16, **{**MLM, "pad_token_id": 7}, tail="pad"),
    ]
    assert len({str(rows_of(windows)) for windows in made}) == len(made)


@pytest.mark.parametrize(
    ("pack", "expected"),
    [
        (lambda tokens: pack_windows(tokens, 4, None), "no end-of-text token"),
        (lambda tokens: pack_windows(tokens, 1, EOS), "at least 2 tokens; got 1"),
        (lambda tokens: pack_windows(tokens, 4, EOS, tail="keep"), "drop or pad; got 'keep'"),
        (lambda tokens: pack_mlm_windows(tokens, 2, **MLM), "at least 3 tokens; got 2"),
        (lambda tokens: pack_mlm_windows(tokens, 4, **MLM, tail="cut"), "drop or pad; got 'cut'"),
        (lambda tokens: pack_mlm_windows(tokens, 4, **{**MLM, "cls_token_id": None}), "cls"),
        (lambda tokens: pack_mlm_windows(tokens, 4, **{**MLM, "sep_token_id": None}), "sep"),
        (lambda tokens: pack_mlm_windows(tokens, 4, **{**MLM, "pad_token_id": None}), "pad"),
    ],
)
def test_settings_that_make_no_windows_are_refused(pack, expected):
    with pytest.raises(SettingsError) as error:
        pack(tokens_of(numbered(9)))
    assert expected in refusal(error)


@pytest.mark.parametrize("pack", [lambda t: pack_windows(t, 16, EOS), lambda t: pack_mlm_windows(t, 16, **MLM)])
def test_a_text_that_fills_no_window_is_refused(pack):
    with pytest.raises(CottentionError) as error:
        pack(tokens_of(numbered(5, 4)))
    assert "9 tokens, too few for one window of 16" in refusal(error)


def test_the_report_reads_well():
    tokens = tokens_of(numbered(1200, 300))
    dropped = str(packing_report(tokens, pack_windows(tokens, 100, EOS)))
    assert (
        dropped == "2 documents, 4,500 bytes, 1,503 tokens (2.99 bytes each) in 15 windows, 3 tokens dropped at the end"
    )
    padded = str(packing_report(tokens, pack_windows(tokens, 100, EOS, tail="pad")))
    assert padded.endswith("in 16 windows, 97 positions padded at the end")


@pytest.mark.parametrize("outer", [True, False])
def test_documents_are_joined_in_pieces(small_batches, outer):
    documents = numbered(*[5] * 40)
    pieces = list(join_documents(tokens_of(documents), SEP, outer=outer))
    assert len(pieces) > 10
    stream, starts = stream_of(documents, SEP, outer=outer)
    assert np.concatenate([ids for ids, _ in pieces]).tolist() == stream
    before = np.cumsum([0, *(len(ids) for ids, _ in pieces)])
    assert [int(at + offset) for offset, (_, found) in zip(before, pieces, strict=False) for at in found] == starts


def test_packing_holds_some_megabytes_at_most(monkeypatch):
    monkeypatch.setattr(tokenization, "_BATCH_BYTES", 1 << 16)
    column = pa.array([np.arange(2000, dtype=np.int32)] * 4000)  # 32 MB
    tokens = Dataset(pa.table({"input_ids": column}))
    tracemalloc.start()
    try:
        windows = pack_windows(tokens, 512, EOS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(windows) == 4000 * 2001 // 512
    assert peak < 4 << 20


def test_from_text_to_windows_and_back(tmp_path):
    texts = ["Fellow citizens of the Senate.\n", "It is done; 12,345 votes 🎉", "The end"]
    paths = [write(tmp_path / f"{number}.txt", text) for number, text in enumerate(texts)]
    corpus = load_corpus(paths)
    tokenizer = train_tokenizer(corpus, vocab_size=270)
    tokens = tokenize_documents(corpus, tokenizer)
    windows = pack_windows(tokens, 8, 0, tail="pad")
    joined = [token for ids, num_tokens, _ in rows_of(windows) for token in ids[:num_tokens]]
    assert tokenizer.decode(joined) == "<|endoftext|>".join(["", *texts, ""])
    assert packing_report(tokens, windows).num_bytes == sum(len(text.encode()) for text in texts)
