"""Sentence pairs to batches: strangers are of another document, and who does the work changes nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from torch.utils.data import DataLoader

from cottention.data.masking import TokenMasking
from cottention.data.pair_collator import PairCollator
from cottention.data.pair_examples import PairExamples, _shortened
from cottention.errors import CottentionError
from cottention.training.stream import ExampleStream, InOrder
from tests import tiny
from tests.data.helpers import refusal

NUM_SPECIAL = 5
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
VOCABULARY = 60
FEATURES = Features({"first": List(Value("int32")), "second": List(Value("int32")), "document": Value("int64")})


def pairs(
    rows_of: tuple[int, ...] = (5, 1, 9, 3), *, longest: int = 13, seed: int = 0, length: int | None = None
) -> Dataset:
    """Pairs of random tokens; the second of row r begins with the token 5 + r, which tells where it came from.

    Seconds have `length` tokens, or any number below `longest`.
    """
    source = np.random.default_rng(seed)
    documents = [document for document, number in enumerate(rows_of) for _ in range(number)]
    rows: dict[str, list] = {"first": [], "second": [], "document": documents}
    for row in range(len(documents)):
        rows["first"].append(source.integers(NUM_SPECIAL, VOCABULARY, source.integers(1, longest)).tolist())
        num_more = source.integers(0, longest - 1) if length is None else length - 1
        rest = source.integers(NUM_SPECIAL, VOCABULARY, num_more).tolist()
        rows["second"].append([NUM_SPECIAL + row % (VOCABULARY - NUM_SPECIAL), *rest])
    return Dataset.from_dict(rows, features=FEATURES)


def made(examples: PairExamples, pass_number: int = 0) -> list[dict[str, Any]]:
    """All examples of a pass."""
    return examples.examples(np.arange(len(examples)), np.full(len(examples), pass_number))


def assert_same(one: Any, other: Any) -> None:
    """Two lists of examples or of batches, name by name."""
    assert len(one) == len(other)
    for ours, theirs in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


# Which pairs


def test_a_strange_second_is_whole_and_of_another_document() -> None:
    rows = pairs(length=4)
    documents, seconds = np.array(rows["document"]), rows["second"]
    examples = PairExamples([rows], max_length=64)
    origins = set()
    for number in range(60):
        for example in made(examples, number):
            row, second = example["row"], example["second"].tolist()
            assert example["first"].tolist() == rows["first"][row]
            came_from = second[0] - NUM_SPECIAL
            assert second == seconds[came_from]
            assert example["is_random"] == (came_from != row)
            if example["is_random"]:
                assert documents[came_from] != documents[row]
                origins.add((documents[row], came_from))
    of_every = {(document, row) for document in range(4) for row in range(18) if documents[row] != document}
    assert len(origins) > 0.9 * len(of_every), "any row of another document may be drawn"


def test_half_of_the_pairs_are_strangers() -> None:
    rows = pairs((200, 300, 100))
    share = np.mean(
        [example["is_random"] for number in range(5) for example in made(PairExamples([rows], max_length=64), number)]
    )
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(3000)


def test_the_length_does_not_tell_strangers_apart() -> None:
    """True pairs fill their window; were strangers of any length, counting tokens would answer most questions."""
    source = np.random.default_rng(0)
    firsts = source.integers(5, 56, 1200)
    rows = {
        "first": [[7] * n for n in firsts],
        "second": [[row % 50 + 5] * (61 - n) for row, n in enumerate(firsts)],
        "document": np.repeat(np.arange(60), 20).tolist(),
    }
    examples = made(PairExamples([Dataset.from_dict(rows, features=FEATURES)], max_length=64))
    totals = np.array([len(example["first"]) + len(example["second"]) for example in examples])
    strangers = np.array([example["is_random"] for example in examples])
    assert abs(totals[strangers].mean() - 61) < 1
    assert (totals[strangers] < 55).mean() < 0.02


def test_a_sentence_that_occurs_twice_is_no_stranger_to_itself() -> None:
    rows = Dataset.from_dict({"first": [[5], [6]], "second": [[7, 8], [7, 8]], "document": [0, 1]}, features=FEATURES)
    examples = PairExamples([rows], max_length=16)
    assert not any(example["is_random"] for number in range(20) for example in made(examples, number))


@pytest.mark.parametrize("firsts", [2, 9, 30])
@pytest.mark.parametrize("tail", [0, 1, 5])
def test_a_stranger_is_told_by_what_is_shown_of_it(firsts: int, tail: int) -> None:
    shared = list(range(5, 35))
    rows = {
        "first": [[40 + row] * firsts for row in range(4)],
        "second": [[*shared, *[50 + row] * tail] for row in range(4)],
        "document": [0, 1, 2, 3],
    }
    examples = PairExamples([Dataset.from_dict(rows, features=FEATURES)], max_length=24)
    drawn = [example for number in range(20) for example in made(examples, number)]
    assert {len(example["first"]) + len(example["second"]) for example in drawn} == {21}
    assert not any(example["is_random"] for example in drawn)
    longer = PairExamples([Dataset.from_dict(rows, features=FEATURES)], max_length=128)
    assert any(example["is_random"] for number in range(20) for example in made(longer, number)) == (tail > 0)


def test_documents_of_two_parts_are_different() -> None:
    examples = PairExamples([pairs((4,)), pairs((3,), seed=1)], max_length=64)
    assert (len(examples), examples.num_documents) == (7, 2)
    drawn = [example for number in range(20) for example in made(examples, number)]
    assert any(example["is_random"] for example in drawn)
    for example in drawn:
        came_from = example["second"][0] - NUM_SPECIAL
        if example["is_random"]:  # rows of the second part count from 0 again
            part = pairs((3,), seed=1) if example["row"] < 4 else pairs((4,))
            assert example["second"].tolist() == part["second"][came_from]


def test_rows_can_be_chosen_and_strangers_still_come_from_all() -> None:
    examples = PairExamples([pairs(length=4)], max_length=64)
    some = examples.restricted(np.array([3, 17]))
    assert len(some) == 2
    drawn = [example for number in range(60) for example in made(some, number)]
    assert {example["row"] for example in drawn} == {3, 17}
    assert len({int(example["second"][0]) for example in drawn}) > 8
    assert_same([some[1]], [examples[17]])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(5, 5, (5, 5)), (9, 2, (8, 2)), (2, 9, (2, 8)), (9, 9, (5, 5)), (10, 5, (5, 5)), (6, 5, (5, 5)), (5, 6, (5, 5))],
)
def test_the_end_of_the_longer_one_is_cut(first: int, second: int, expected: tuple[int, int]) -> None:
    a, b = np.arange(first), np.arange(100, 100 + second)
    short_a, short_b = _shortened(a, b, 10)
    assert (len(short_a), len(short_b)) == expected
    assert short_a.tolist() == a.tolist()[: expected[0]]
    assert short_b.tolist() == b.tolist()[: expected[1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": [pairs((6,))]}, "the corpus is one document, so no sentence of another can follow; "),
        ({"parts": [pairs((6,)).select([])]}, "the corpus holds no sentence pair"),
        (
            {"parts": [pairs().rename_column("second", "secnd")]},
            "must have a column 'second'; got .*did you mean 'secnd'",
        ),
        ({"parts": [pairs((2, 2)).select([0, 2, 1])]}, "the sentence pairs of a document must lie together"),
        ({"max_length": 4}, "a sentence pair needs at least 5 tokens; got 4"),
        ({"seed": -1}, "the seed of the pairs must be 0 or more; got -1"),
    ],
)
def test_pairs_that_cannot_be_used_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CottentionError, match=message) as error:
        PairExamples(**{"parts": [pairs()], "max_length": 64, **change})
    refusal(error)


# Batches


def collator(**settings: Any) -> PairCollator:
    """One for the tests' tokenizer."""
    return PairCollator(tiny.wordpiece_tokenizer(), **settings)


def unmasked(batch: dict[str, Any]) -> torch.Tensor:
    """What the text was."""
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def test_a_packed_batch_holds_every_pair_with_its_special_tokens() -> None:
    examples = made(PairExamples([pairs()], max_length=24))
    batch = collator()(examples)
    bounds = batch["cu_seqlens"].tolist()
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["next_sentence_label"].tolist() == [int(example["is_random"]) for example in examples]
    text = unmasked(batch)[0]
    for number, example in enumerate(examples):
        one = slice(bounds[number], bounds[number + 1])
        first, second = example["first"].tolist(), example["second"].tolist()
        assert text[one].tolist() == [SPECIAL["cls"], *first, SPECIAL["sep"], *second, SPECIAL["sep"]]
        assert len(text[one]) <= 24
        assert batch["token_type_ids"][0, one].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert batch["position_ids"][0, one].tolist() == list(range(len(first) + len(second) + 3))


def test_a_padded_batch_holds_the_same() -> None:
    examples = made(PairExamples([pairs()], max_length=24))
    packed, padded = collator()(examples), collator(unpadded=False)(examples)
    real = padded["attention_mask"].bool()
    assert real.sum(1).tolist() == packed["cu_seqlens"].diff().tolist()
    for name in ("input_ids", "token_type_ids", "labels"):
        assert torch.equal(padded[name][real], packed[name][0]), name
    assert (padded["input_ids"][~real] == SPECIAL["pad"]).all()
    assert (padded["labels"][~real] == -100).all()
    assert torch.equal(padded["next_sentence_label"], packed["next_sentence_label"])


def test_masks_are_80_10_10_of_15_percent_and_never_special() -> None:
    examples = made(PairExamples([pairs((40, 400, 60), longest=60)], max_length=128))
    batch = collator()(examples)
    text, shown, is_target = unmasked(batch)[0], batch["input_ids"][0], batch["labels"][0] != -100
    ordinary = text >= NUM_SPECIAL
    assert not (is_target & ~ordinary).any()
    assert (shown[~is_target] == text[~is_target]).all()
    num_targets = int(is_target.sum())
    assert abs(num_targets / int(ordinary.sum()) - 0.15) < 0.01
    masked, kept = (shown == SPECIAL["mask"]) & is_target, (shown == text) & is_target
    assert abs(int(masked.sum()) / num_targets - 0.8) < 0.02
    assert abs(int(kept.sum()) / num_targets - 0.1) < 0.02
    replaced = shown[is_target & ~masked & ~kept]
    assert (replaced >= NUM_SPECIAL).all()
    assert len(replaced.unique()) > 0.9 * (len(tiny.wordpiece_tokenizer()) - NUM_SPECIAL)
    bounds = batch["cu_seqlens"].tolist()
    assert all(is_target[a:b].any() for a, b in pairwise(bounds)), "every pair has a target"


def test_whole_words_are_hidden_together() -> None:
    tokenizer = tiny.wordpiece_tokenizer()
    pieces = [number for token, number in tokenizer.get_vocab().items() if token.startswith("##")]
    begins = [n for n in range(NUM_SPECIAL, len(tokenizer)) if n not in pieces]
    source = np.random.default_rng(0)
    ids = np.where(source.random(4000) < 0.6, source.choice(pieces, 4000), source.choice(begins, 4000))
    starts = np.arange(0, 4000, 40)
    ids[starts] = SPECIAL["cls"]
    ids[starts + 39] = SPECIAL["sep"]
    ids[starts + 1] = pieces[0]  # a piece behind [CLS] begins a word all the same
    masking = TokenMasking(tokenizer, 0.15, whole_words=True)
    shown, labels = masking.apply(ids, starts, source.random((3, 4000)))
    is_target = labels != -100
    continues = np.isin(ids, pieces)
    continues[starts + 1] = False
    same_word = continues[1:]  # as the token before it
    assert (is_target[1:] == is_target[:-1])[same_word].all()
    assert not is_target[ids < NUM_SPECIAL].any()
    assert 0.12 < is_target.sum() / (ids >= NUM_SPECIAL).sum() < 0.18
    assert len(set(zip(shown[is_target] == SPECIAL["mask"], labels[is_target], strict=True))) > 10
    single = TokenMasking(tokenizer, 0.15).apply(ids, starts, source.random((3, 4000)))[1] != -100
    assert not (single[1:] == single[:-1])[same_word].all(), "it would show if words were not kept together"


@pytest.mark.parametrize(
    ("tokenizer", "settings", "message"),
    [
        (tiny.bpe_tokenizer, {}, "the tokenizer has no mask token"),
        (tiny.wordpiece_tokenizer, {"mlm_probability": 1.0}, "mlm_probability must be between 0 and 1; got 1.0"),
        (tiny.wordpiece_tokenizer, {"seed": -2}, "the seed of the masking must be 0 or more; got -2"),
    ],
)
def test_a_collator_refuses_what_it_cannot_use(tokenizer: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CottentionError, match=message) as error:
        PairCollator(tokenizer(), **settings)
    refusal(error)


def test_whole_words_need_pieces() -> None:
    with pytest.raises(CottentionError, match="whole words need a WordPiece tokenizer"):
        TokenMasking(_without_pieces(), 0.15, whole_words=True)


def _without_pieces() -> Any:
    """A tokenizer of whole words alone."""

    class Words:
        mask_token_id = 4
        all_special_ids: ClassVar[list[int]] = [0, 1, 2, 3, 4]

        @staticmethod
        def get_vocab() -> dict[str, int]:
            return {name: number for number, name in enumerate(["pad", "unk", "cls", "sep", "mask", "the", "people"])}

    return Words()


# The stream


def stream(seed: int = 0) -> ExampleStream:
    """Four passes over the pairs."""
    return ExampleStream(PairExamples([pairs()], max_length=24, seed=seed), num_examples=72, seed=seed)


def loaded(**options: Any) -> list[dict[str, torch.Tensor]]:
    """Micro batches of four."""
    order = stream()
    return list(DataLoader(order, batch_size=4, sampler=InOrder(len(order)), collate_fn=collator(), **options))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # what a DataLoader does by default
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more than the machine has cores
@pytest.mark.parametrize("num_workers", [1, 4])
def test_any_number_of_workers_makes_the_same_batches(num_workers: int) -> None:
    assert_same(loaded(num_workers=num_workers, multiprocessing_context="fork", timeout=60), loaded())


def test_two_processes_make_the_batches_of_one() -> None:
    from accelerate.data_loader import prepare_data_loader

    order, shares = stream(), []
    for index in range(2):
        loader = DataLoader(order, batch_size=4, sampler=InOrder(len(order)), collate_fn=collator())
        shares.append(list(prepare_data_loader(loader, num_processes=2, process_index=index, put_on_device=False)))
    assert_same([batch for both in zip(*shares, strict=True) for batch in both], loaded())


def test_neither_neighbours_nor_order_change_an_example() -> None:
    together = stream().__getitems__(list(range(72)))
    jumping = stream()
    for position in np.random.default_rng(0).permutation(72):
        assert_same([jumping[int(position)]], [together[position]])
    batch = collator()(together)
    bounds = batch["cu_seqlens"].tolist()
    for position in (0, 30, 71):
        alone = collator()([together[position]])
        assert torch.equal(alone["input_ids"][0], batch["input_ids"][0, bounds[position] : bounds[position + 1]])


def test_every_pass_and_every_seed_is_another() -> None:
    first, second = (made(PairExamples([pairs()], max_length=24), number) for number in (0, 1))
    other = made(PairExamples([pairs()], max_length=24, seed=1))
    for theirs in (second, other):
        assert [example["is_random"] for example in theirs] != [example["is_random"] for example in first]
    labels = [collator(seed=seed)(first)["labels"] for seed in (0, 1)]
    assert not torch.equal(*labels)
    again = [{**example, "pass_number": 1} for example in first]
    assert not torch.equal(collator()(again)["labels"], labels[0])
