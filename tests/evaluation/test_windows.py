"""Every token of every document is a target once, with the history that was promised, in whatever rows it comes."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from cottention.evaluation.windows import IGNORED, batches_of, continued_batches, document_windows

EOS = 0
FEATURES = Features({"input_ids": List(Value("int32")), "ends_document": Value("bool")})
# Token ids that no two documents share, so that a target says where it is from.
corpora = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=6)


def corpus(row_lengths: list[list[int]], cut_off: bool) -> tuple[Dataset, list[list[int]]]:
    """A tokenised corpus of documents with rows of these lengths, and each document with both its ends.

    The last one has no end where the corpus is cut off inside it.
    """
    rows, ends, documents, next_id = [], [], [], 1
    for lengths in row_lengths:
        document = []
        for number, length in enumerate(lengths):
            rows.append(list(range(next_id, next_id + length)))
            ends.append(number == len(lengths) - 1)
            document += rows[-1]
            next_id += length
        documents.append([EOS, *document, EOS])
    if cut_off:
        ends[-1] = False
        documents[-1].pop()
    return Dataset.from_dict({"input_ids": rows, "ends_document": ends}, features=FEATURES), documents


@settings(deadline=None, max_examples=60)
@given(corpora, st.booleans(), st.integers(1, 9), st.integers(1, 9))
def test_windows_ask_for_every_token_once_with_enough_before_it(row_lengths, cut_off, context, stride):
    stride = min(stride, context)
    tokens, documents = corpus(row_lengths, cut_off)
    windows = iter(document_windows(tokens, EOS, context, stride))
    for document in documents:
        asked = 0
        while asked < len(document) - 1:
            ids, targets = next(windows)
            assert 1 <= len(ids) == len(targets) <= context
            new = np.flatnonzero(targets != IGNORED)
            start = asked - new[0]  # of the window in the document
            assert ids.tolist() == document[start : start + len(ids)]
            assert targets[new].tolist() == document[asked + 1 : asked + 1 + len(new)]
            assert new[0] == (0 if start == 0 else context - stride)
            assert new.tolist() == list(range(new[0], len(ids)))
            asked += len(new)
        assert asked == len(document) - 1
    assert next(windows, None) is None


@settings(deadline=None, max_examples=60)
@given(corpora, st.booleans(), st.integers(1, 9), st.integers(1, 5))
def test_continued_pieces_put_together_are_the_documents(row_lengths, cut_off, context, batch_size):
    tokens, documents = corpus(row_lengths, cut_off)
    read: list[list[int]] = []
    group: list[list[int]] = []
    num_before = 0
    for inputs, targets, begins in continued_batches(tokens, EOS, context, batch_size):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] <= context
        assert len(inputs) <= batch_size
        if begins:
            read += group
            group = [[EOS] for _ in inputs]
        else:
            assert len(inputs) <= num_before
        num_before = len(inputs)
        for document, ids, following in zip(group, inputs.tolist(), targets.tolist(), strict=False):
            real = [token for token in following if token != IGNORED]
            assert ids[: len(real)] == [document[-1], *real[:-1]]
            assert following[len(real) :] == [IGNORED] * (len(ids) - len(real))
            document += real
    # A document that is cut off before its first token asks for nothing.
    assert sorted([*read, *group]) == sorted(document for document in documents if len(document) > 1)


def test_documents_are_sorted_a_part_at_a_time(monkeypatch):
    # Millions of documents: what is known of them all would fill the memory.
    monkeypatch.setattr("cottention.evaluation.windows._BATCHES_SORTED", 2)
    tokens, _ = corpus([[length] for length in (1, 2, 3, 4, 5, 6, 7)], cut_off=False)
    lengths = [
        (targets != IGNORED).sum(dim=1).tolist()
        for _, targets, begins in continued_batches(tokens, EOS, 99, 2)
        if begins
    ]
    assert lengths == [[5, 4], [3, 2], [8, 7], [6]]


def test_batches_pad_on_the_right():
    windows = [(np.array([1]), np.array([2])), (np.array([3, 4]), np.array([4, 5]))]
    ((inputs, targets),) = batches_of(windows, 2)
    assert inputs.tolist() == [[3, 4], [1, 0]]
    assert targets.tolist() == [[4, 5], [2, IGNORED]]
    assert list(batches_of([], 2)) == []
