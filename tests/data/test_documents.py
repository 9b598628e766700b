"""A random window of every document in each pass, with true ends only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from torch.nn.functional import cross_entropy

from cottention.data.documents import DocumentWindows, collate_documents
from cottention.errors import DataError, SettingsError
from tests import tiny

EOS = 0
LENGTHS = [3, 0, 40, 1, 9, 10, 25]
"""Tokens of each document; the window of 10 holds 9 and an end."""


def token_rows(split: int = 7) -> tuple[Dataset, list[np.ndarray]]:
    """Documents of numbers that never come twice, in rows of `split` at most, as `tokenize_documents` gives them."""
    rows: dict[str, list[Any]] = {"input_ids": [], "num_bytes": [], "ends_document": []}
    documents, following = [], 1
    for length in LENGTHS:
        ids = np.arange(following, following + length)
        following += length
        documents.append(ids)
        parts = [ids[start : start + split] for start in range(0, max(length, 1), split)]
        rows["input_ids"] += [part.tolist() for part in parts]
        rows["num_bytes"] += [4 * len(part) for part in parts]
        rows["ends_document"] += [False] * (len(parts) - 1) + [True]
    features = Features(
        {"input_ids": List(Value("int32")), "num_bytes": Value("int64"), "ends_document": Value("bool")}
    )
    return Dataset.from_dict(rows, features=features), [ids for ids in documents if len(ids)]


def windows(window: int = 10, seed: int = 0, split: int = 7) -> tuple[DocumentWindows, list[np.ndarray]]:
    """Windows of the documents, and these."""
    tokens, documents = token_rows(split)
    return DocumentWindows(tokens, window, EOS, seed=seed), documents


def ids_in(examples: DocumentWindows, one_pass: int) -> list[list[int]]:
    """The tokens that one pass reads of each document."""
    everything = np.arange(len(examples))
    return [row["input_ids"].tolist() for row in examples.examples(everything, np.full(len(examples), one_pass))]


@pytest.mark.parametrize("split", [1, 7, 1000])
def test_windows_are_stretches_of_their_documents_with_true_ends_only(split: int) -> None:
    examples, documents = windows(split=split)
    assert len(examples) == len(documents) == 6, "an empty document is none"
    assert examples.num_tokens == sum(LENGTHS) + 6
    for one_pass in range(20):
        for ids, document in zip(ids_in(examples, one_pass), documents, strict=True):
            whole = [*document.tolist(), EOS]
            assert len(ids) == min(len(whole), 10)
            start = whole.index(ids[0])
            assert ids == whole[start : start + 10]
            assert EOS not in ids[:-1]
            assert (ids[-1] == EOS) == (start + 10 >= len(whole))


def test_every_stretch_of_a_document_is_read_about_equally_often() -> None:
    examples, documents = windows()
    starts = [ids_in(examples.restricted(np.array([1])), n)[0][0] - documents[1][0] for n in range(640)]
    counts = np.bincount(starts, minlength=32)
    assert len(counts) == 32, "from the first token to the last ten with the end"
    assert counts.min() >= 5  # 20 expected; 4.5e-5 the chance of fewer than 5 at one place
    assert counts.max() <= 45


def test_passes_and_seeds_read_other_windows_and_short_documents_whole() -> None:
    first, second = ids_in(windows()[0], 0), ids_in(windows()[0], 1)
    assert first == ids_in(windows()[0], 0)
    assert first != second
    assert first != ids_in(windows(seed=1)[0], 0)
    short = [i for i, length in enumerate(length for length in LENGTHS if length) if length < 10]
    assert short == [0, 2, 3]
    for i in short:
        assert first[i] == second[i]


def test_what_is_read_does_not_depend_on_what_is_read_with_it() -> None:
    examples, _ = windows()
    together = examples.examples(np.array([5, 1, 1, 3]), np.array([0, 2, 3, 1]))
    assert [row["pass_number"] for row in together] == [0, 2, 3, 1]
    for row, (number, one_pass) in zip(together, [(5, 0), (1, 2), (1, 3), (3, 1)], strict=True):
        (alone,) = examples.examples(np.array([number]), np.array([one_pass]))
        assert alone["input_ids"].tolist() == row["input_ids"].tolist()
    chosen = examples.restricted(np.array([5, 1]))
    assert len(chosen) == 2
    assert chosen[1]["input_ids"].tolist() == examples[1]["input_ids"].tolist()


def test_selected_rows_are_documents_of_their_own() -> None:
    """As held-out documents of a tokenised corpus are."""
    tokens, documents = token_rows(split=1000)
    some = DocumentWindows(tokens.select([2, 4]), 100, EOS)
    assert ids_in(some, 0) == [[*documents[1].tolist(), EOS], [*documents[3].tolist(), EOS]]


def test_a_document_that_lacks_its_last_row_is_read_too() -> None:
    tokens, documents = token_rows(split=7)
    cut = DocumentWindows(tokens.select(range(len(tokens) - 1)), 100, EOS)
    assert ids_in(cut, 0)[-1] == [*documents[-1][:21].tolist(), EOS]


def test_batches_are_packed_and_give_the_loss_of_documents_read_alone() -> None:
    examples, _ = windows()
    rows = examples.examples(np.arange(6), np.zeros(6, dtype=int))
    batch = collate_documents(rows)
    assert batch["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    assert batch["cu_seqlens"].dtype == torch.int32
    model = tiny.gpt().eval()
    got = model(**batch, num_items_in_batch=1).loss
    nats = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.from_numpy(row["input_ids"]).long()
        nats += cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
    torch.testing.assert_close(got, nats)


def test_what_cannot_be_read_is_refused() -> None:
    tokens, _ = token_rows()
    with pytest.raises(SettingsError, match=r"the tokenizer has no end-of-text token \(eos_token\)"):
        DocumentWindows(tokens, 10, None)
    with pytest.raises(SettingsError, match="a window must hold at least 2 tokens; got 1"):
        DocumentWindows(tokens, 1, EOS)
    with pytest.raises(DataError, match="the corpus has no document with a token in it"):
        DocumentWindows(tokens.select([1]), 10, EOS)
