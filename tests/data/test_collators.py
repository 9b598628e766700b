"""Batches: labels and bounds of GPT windows, and masks that follow from seed, pass and the row's own tokens alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from cottention.data import CausalCollator, MaskedLMCollator, load_tokenizer, pack_windows, train_tokenizer
from cottention.errors import SettingsError
from cottention.models import CottentionGPTForCausalLM
from tests.data.helpers import refusal, write
from tests.models.helpers import ATTENTION_TYPES, gpt_config, gradients, randomised

EOS = 0
NUM_SPECIAL = 5


def row_of(ids, num_tokens: int | None = None, starts=(), **more) -> dict[str, Any]:
    """A row as the windows' numpy format gives it."""
    ids = np.asarray(ids, dtype=np.int32)
    counted = {} if num_tokens is None else {"num_tokens": num_tokens}
    return {"input_ids": ids, **counted, "document_starts": np.asarray(starts, dtype=np.int32), **more}


# CausalCollator

ROWS = [
    row_of([0, 4, 5, 0, 6, 7], 6, [0, 3]),
    row_of([8, 0, 9, 4, 0, 5], 6, [1, 4]),
    row_of([6, 0, 7, 1, 1, 1], 3, [1]),
]


def test_every_token_but_the_first_and_padding_is_a_target():
    batch = CausalCollator()(ROWS)
    assert batch["input_ids"].tolist() == [[0, 4, 5, 0, 6, 7], [8, 0, 9, 4, 0, 5], [6, 0, 7, 1, 1, 1]]
    assert batch["labels"].tolist() == [
        [-100, 4, 5, 0, 6, 7],
        [-100, 0, 9, 4, 0, 5],
        [-100, 0, 7, -100, -100, -100],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 6, [1, 1, 1, 0, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_batch_without_padding_needs_no_mask():
    assert set(CausalCollator()(ROWS[:2])) == {"input_ids", "labels"}
    assert set(CausalCollator()([row_of([1, 2, 3])])) == {"input_ids", "labels"}  # a row that does not say is whole


def test_documents_are_kept_apart_when_asked_for():
    batch = CausalCollator(reset_at_documents=True)(ROWS)
    assert batch["input_ids"].tolist() == [[0, 4, 5, 0, 6, 7, 8, 0, 9, 4, 0, 5, 6, 0, 7, 1, 1, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 6, 7, 10, 12, 13, 18]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 0, 1, 0, 0, 1, 2, 3, 4]]
    assert batch["labels"].flatten().tolist() == CausalCollator()(ROWS)["labels"].flatten().tolist()


def test_a_document_is_taught_its_end_but_not_the_next_ones_beginning():
    batch = CausalCollator(reset_at_documents=True)(ROWS)
    # The end-of-text behind each document is the target of its last token; behind a row there is nothing to predict.
    assert batch["shift_labels"].tolist() == [
        [4, 5, 0, 6, 7, -100, 0, 9, 4, 0, 5, -100, 0, 7, -100, -100, -100, -100],
    ]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_targets_are_the_same_with_and_without_bounds(data):
    length = data.draw(st.integers(2, 12))
    rows = []
    for _ in range(data.draw(st.integers(1, 4))):
        starts = data.draw(st.sets(st.integers(0, length - 1)))
        num_tokens = data.draw(st.integers(max([1, *starts]), length))
        ids = [EOS if place in starts else data.draw(st.integers(4, 99)) for place in range(length)]
        rows.append(row_of(ids, num_tokens, sorted(starts)))
    plain, packed = CausalCollator()(rows), CausalCollator(reset_at_documents=True)(rows)
    shifted = torch.nn.functional.pad(plain["labels"], (0, 1), value=-100)[:, 1:]
    assert torch.equal(packed["shift_labels"], shifted.reshape(1, -1))
    bounds = packed["cu_seqlens"].tolist()
    assert bounds[0] == 0
    assert bounds[-1] == packed["input_ids"].shape[1]
    assert bounds == sorted(set(bounds))
    expected = {i * length + start for i, row in enumerate(rows) for start in [0, *row["document_starts"].tolist()]}
    assert set(bounds[:-1]) == expected
    positions = packed["position_ids"][0].tolist()
    assert positions == [place - max(bound for bound in bounds if bound <= place) for place in range(len(positions))]


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_packed_documents_train_a_model_like_documents_of_their_own(attention_type):
    documents = [[11, 12, 13], [14], [15, 16, 17, 18]]
    ids = [EOS, *[token for document in documents for token in (*document, EOS)]]
    starts = [place for place, token in enumerate(ids[:-1]) if token == EOS]
    rows = [row_of([*ids, 1], len(ids), starts)]  # the last end-of-text opens nothing; one position is padded
    model = randomised(CottentionGPTForCausalLM(gpt_config(attention_type)))

    packed = model(**CausalCollator(reset_at_documents=True)(rows))
    packed.loss.backward()
    got = gradients(model)
    model.zero_grad()
    num_targets = len(ids) - 1
    losses = []
    for document in documents:
        inputs, targets = torch.tensor([[EOS, *document]]), torch.tensor([[*document, EOS]])
        losses.append(model(inputs, shift_labels=targets, num_items_in_batch=num_targets).loss)
    loss = torch.stack(losses).sum()
    loss.backward()
    torch.testing.assert_close(packed.loss, loss)
    for name, expected in gradients(model).items():
        torch.testing.assert_close(got[name], expected)


def test_windows_go_through_a_loader():
    tokens = Dataset.from_dict({"input_ids": [list(range(5, 40)), list(range(50, 60))], "ends_document": [True, True]})
    windows: Any = pack_windows(tokens, 8, EOS, tail="pad")
    batches: list[dict[str, Tensor]] = list(DataLoader(windows, batch_size=2, collate_fn=CausalCollator(True)))
    assert torch.cat([batch["input_ids"] for batch in batches], dim=1).tolist() == [
        [token for row in windows["input_ids"] for token in row.tolist()]
    ]
    targets = torch.cat([batch["shift_labels"] for batch in batches], dim=1)
    assert int((targets == EOS).sum()) == 2


# MaskedLMCollator


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = " ".join(f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst")
    return train_tokenizer(Dataset.from_dict({"text": [words] * 3}), kind="wordpiece", vocab_size=135)


def some_rows(tokenizer, number: int, length: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows [CLS] ... [SEP] of ordinary tokens with a [SEP] in the middle."""
    chance = np.random.default_rng(seed)
    rows = chance.integers(NUM_SPECIAL, len(tokenizer), (number, length))
    rows[:, 0], rows[:, length // 2], rows[:, -1] = (
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
        tokenizer.sep_token_id,
    )
    return [row_of(row, length) for row in rows]


def test_shares_are_15_percent_and_80_10_10(tokenizer):
    rows = some_rows(tokenizer, 400, 128)
    batch = MaskedLMCollator(tokenizer)(rows)
    original = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    is_target = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_target], original[is_target])
    assert torch.equal(batch["input_ids"][~is_target], original[~is_target])

    def check(count: Tensor, total: int, share: float) -> None:  # within 4 standard deviations
        assert abs(int(count) - share * total) < 4 * np.sqrt(total * share * (1 - share)), (int(count), total, share)

    num_targets = int(is_target.sum())
    check(is_target.sum(), 400 * 125, 0.15)
    masked = is_target & (batch["input_ids"] == tokenizer.mask_token_id)
    changed = is_target & ~masked & (batch["input_ids"] != original)
    num_ordinary = len(tokenizer) - NUM_SPECIAL
    check(masked.sum(), num_targets, 0.8)
    check(changed.sum(), num_targets, 0.1 * (1 - 1 / num_ordinary))
    # Random tokens come from the whole vocabulary, evenly.
    counts = torch.bincount(batch["input_ids"][changed], minlength=len(tokenizer))
    assert not counts[:NUM_SPECIAL].any()
    expected = float(counts.sum()) / num_ordinary
    chi_squared = float(((counts[NUM_SPECIAL:] - expected) ** 2 / expected).sum())
    assert abs(chi_squared - num_ordinary) < 4 * np.sqrt(2 * num_ordinary)
    # So do the places.
    per_place = is_target.sum(0)[[place for place in range(1, 127) if place != 64]].double()
    assert float(per_place.std()) < 1.3 * np.sqrt(400 * 0.15 * 0.85)


@pytest.mark.parametrize("probability", [0.01, 0.4, 0.9])
def test_the_share_is_as_asked_for(tokenizer, probability):
    labels = MaskedLMCollator(tokenizer, probability)(some_rows(tokenizer, 100, 128))["labels"]
    assert float((labels != -100).sum()) / (100 * 125) == pytest.approx(probability, abs=0.02)


def test_special_tokens_and_padding_are_never_targets(tokenizer):
    rows = [row_of([*row["input_ids"], *[tokenizer.pad_token_id] * 20], 30) for row in some_rows(tokenizer, 50, 30)]
    for row in rows:
        row["input_ids"][5] = tokenizer.unk_token_id
        row["input_ids"][6] = tokenizer.mask_token_id
    batch = MaskedLMCollator(tokenizer, 0.9)(rows)
    original = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    is_special = original < NUM_SPECIAL
    assert (batch["labels"][is_special] == -100).all()
    assert torch.equal(batch["input_ids"][is_special], original[is_special])
    assert batch["attention_mask"].tolist() == [[1] * 30 + [0] * 20] * 50
    assert (batch["labels"][:, 30:] == -100).all()


def test_every_row_has_a_target(tokenizer):
    labels = MaskedLMCollator(tokenizer, 1e-9)(some_rows(tokenizer, 200, 5))["labels"]
    assert (labels != -100).sum(1).tolist() == [1] * 200
    nothing = MaskedLMCollator(tokenizer)([row_of([2, 3, 0], 2)])
    assert (nothing["labels"] == -100).all()  # where there is a token that can be one


def test_rows_of_several_lengths_are_padded(tokenizer):
    rows = [row_of([2, 7, 8, 9, 3]), row_of([2, 7, 3])]
    batch = MaskedLMCollator(tokenizer)(rows)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1] * 3 + [0] * 2]
    assert batch["input_ids"][1, 3:].tolist() == [tokenizer.pad_token_id] * 2
    assert "attention_mask" not in MaskedLMCollator(tokenizer)(rows[:1])


def masks_of(collator: MaskedLMCollator, rows: list[dict[str, Any]], batches: list[list[int]]) -> dict[int, Any]:
    """What became of each row, without its padding."""
    seen = {}
    for numbers in batches:
        batch = collator([rows[number] for number in numbers])
        for number, ids, labels in zip(numbers, batch["input_ids"], batch["labels"], strict=True):
            length = rows[number].get("num_tokens", len(rows[number]["input_ids"]))
            seen[number] = (ids[:length].tolist(), labels[:length].tolist())
    return seen


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(9)), st.lists(st.integers(1, 8), max_size=4), st.integers(0, 3))
def test_masks_do_not_depend_on_order_batches_or_neighbours(tokenizer, order, cuts, epoch):
    # Rows of several lengths: which of them come together decides how far each is padded.
    rows = [some_rows(tokenizer, 1, length, seed=length)[0] for length in (6, 9, 9, 20, 33, 34, 50, 64, 64)]
    rows[2] = row_of([*rows[1]["input_ids"][:-2], 3, 0], 8)
    collator = MaskedLMCollator(tokenizer, 0.4, seed=3)
    collator.set_epoch(epoch)
    bounds = [0, *sorted(set(cuts)), 9]
    batches = [list(order[low:high]) for low, high in pairwise(bounds)]
    assert masks_of(collator, rows, batches) == masks_of(collator, rows, [[number] for number in range(9)])


def test_masks_follow_from_seed_and_pass(tokenizer):
    rows = some_rows(tokenizer, 8, 64)

    def labels(seed: int, epoch: int | None = None, rows=rows) -> str:
        collator = MaskedLMCollator(tokenizer, seed=seed)
        if epoch is not None:
            collator.set_epoch(epoch)
        return str(collator(rows)["labels"].tolist())

    assert labels(0) == labels(0) == labels(0, 0)
    assert len({labels(0, 0), labels(0, 1), labels(0, 2), labels(1, 0), labels(1, 1)}) == 5
    numbered = [{**row, "pass_number": 1} for row in rows]
    assert labels(0, 5, numbered) == labels(0, 1)  # a row's own number comes first
    mixed = [{**row, "pass_number": number % 2} for number, row in enumerate(rows)]
    collator = MaskedLMCollator(tokenizer)
    passes = []
    for number in range(2):
        collator.set_epoch(number)
        passes.append(collator(rows)["labels"])
    assert torch.equal(collator(mixed)["labels"][0::2], passes[0][0::2])
    assert torch.equal(collator(mixed)["labels"][1::2], passes[1][1::2])


def test_masks_of_one_pass_have_nothing_to_do_with_those_of_the_next(tokenizer):
    rows = some_rows(tokenizer, 200, 128)
    collator = MaskedLMCollator(tokenizer)
    first = collator(rows)["labels"] != -100
    collator.set_epoch(1)
    second = collator(rows)["labels"] != -100
    num_places = 200 * 125
    expected, deviation = 0.15**2 * num_places, np.sqrt(num_places * 0.15**2)
    assert abs(int((first & second).sum()) - expected) < 4 * deviation


def test_masks_are_the_same_whatever_holds_the_row(tokenizer):
    (row,) = some_rows(tokenizer, 1, 40)
    collator = MaskedLMCollator(tokenizer)
    expected = collator([row])
    for ids in (row["input_ids"].tolist(), row["input_ids"].astype(np.int64), torch.tensor(row["input_ids"])):
        batch = collator([{"input_ids": ids, "num_tokens": 40}])
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_masks_are_these_on_every_machine(tokenizer):
    # Frozen: another version of numpy or of this code that draws other numbers would break resumed runs.
    batch = MaskedLMCollator(tokenizer, seed=1)([row_of([2, *range(10, 40), 3])])
    places = torch.nonzero(batch["labels"][0] != -100).flatten().tolist()
    assert places == [17, 18, 24]
    assert batch["input_ids"][0, places].tolist() == [7, 4, 4]  # one becomes another token, two become [MASK]


def test_workers_change_nothing(tokenizer):
    rows: Any = some_rows(tokenizer, 12, 32)
    collator = MaskedLMCollator(tokenizer)
    alone, worked = (
        [batch["labels"] for batch in DataLoader(rows, batch_size=4, collate_fn=collator, num_workers=number)]
        for number in (0, 2)
    )
    assert torch.equal(torch.cat(alone), torch.cat(worked))


def test_rows_are_left_as_they_came(tokenizer):
    rows = some_rows(tokenizer, 4, 32)
    before = [row["input_ids"].copy() for row in rows]
    MaskedLMCollator(tokenizer, 0.9)(rows)
    CausalCollator()(rows)
    CausalCollator(reset_at_documents=True)(rows)
    assert all(np.array_equal(row["input_ids"], ids) for row, ids in zip(rows, before, strict=True))


def test_a_vocabulary_with_a_gap_will_do(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "a", "c"]  # no id 5: the later "a" has it
    opened = load_tokenizer(write(tmp_path / "vocab.txt", "\n".join(words)).parent)
    batch = MaskedLMCollator(opened, 0.9)([row_of([2, *[6, 7, 8] * 100, 3])])
    assert set(batch["input_ids"].flatten().tolist()) == {2, 3, 4, 6, 7, 8}


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1, 15, float("nan")])
def test_a_share_that_is_none_is_refused(tokenizer, probability):
    with pytest.raises(SettingsError) as error:
        MaskedLMCollator(tokenizer, probability)
    assert f"mlm_probability must be between 0 and 1; got {probability}" in refusal(error)


def test_a_negative_seed_is_refused(tokenizer):
    with pytest.raises(SettingsError) as error:
        MaskedLMCollator(tokenizer, seed=-1)
    assert "0 or more; got -1" in refusal(error)


def test_a_tokenizer_without_mask_is_refused():
    gpt = train_tokenizer(Dataset.from_dict({"text": ["a"]}), vocab_size=257)
    with pytest.raises(SettingsError) as error:
        MaskedLMCollator(gpt)
    assert "no mask token" in refusal(error)
