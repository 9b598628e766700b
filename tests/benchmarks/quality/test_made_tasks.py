"""The generators of made tasks keep their rules, whatever the sizes, and give the same rows again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cottention.benchmarks.quality.copying import FIRST_SYMBOL, MARK, NOISE, copying_rows
from cottention.benchmarks.quality.recall import BLANK, POWER, recall_rows
from cottention.benchmarks.quality.tracking import product_table, tracking_rows
from cottention.errors import SettingsError
from cottention.files import IGNORE_INDEX


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("length", "pairs"), [(64, 8), (48, 16), (12, 4), (512, 64)])
def test_each_key_is_asked_for_once_and_answered_by_its_value(length: int, pairs: int) -> None:
    batch = recall_rows(_rng(), 16, length, pairs, 512, stacked=False)
    for ids, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        value_of = dict(zip(ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
        assert len(value_of) == pairs
        asked = {ids[t]: labels[t] for t in range(length) if labels[t] != IGNORE_INDEX}
        assert asked == value_of
        assert labels[: 2 * pairs] == [IGNORE_INDEX] * 2 * pairs
        others = [ids[t] for t in range(2 * pairs, length) if labels[t] == IGNORE_INDEX]
        assert not set(others) & (set(value_of) | set(value_of.values()))


def test_a_stacked_token_holds_the_key_and_its_value() -> None:
    pairs, length = 8, 24
    batch = recall_rows(_rng(), 4, length, pairs, 512, stacked=True)
    assert batch.inputs.shape == (4, length, 2)
    for ids, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        value_of = dict(ids[:pairs])
        assert {ids[t][0]: labels[t] for t in range(length) if labels[t] != IGNORE_INDEX} == value_of
        assert all(beside == BLANK for _, beside in ids[pairs:])


def test_queries_come_early_by_the_power_law() -> None:
    """With one pair the place of its query has the published law itself."""
    length, num_rows = 34, 20_000
    labels = recall_rows(_rng(), num_rows, length, 1, 64, stacked=False).labels
    places = (labels != IGNORE_INDEX).int().argmax(-1).numpy() - 2
    expected = np.arange(1, length - 1) ** (POWER - 1)
    found = np.bincount(places, minlength=length - 2) / num_rows
    assert np.abs(found - expected / expected.sum()).max() < 4 * np.sqrt(0.25 / num_rows)


def test_a_row_without_room_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"8 pairs need as many keys and a row of 24 tokens; got .* and 23"):
        recall_rows(_rng(), 1, 23, 8, 512, stacked=False)
    with pytest.raises(SettingsError, match="8 pairs need"):
        recall_rows(_rng(), 1, 64, 8, 16, stacked=False)
    with pytest.raises(SettingsError, match="16 symbols and as many marks need a row of 32; got 31"):
        copying_rows(_rng(), 1, 31, 16, 32)


def test_copied_symbols_are_told_in_order_at_the_marks() -> None:
    batch = copying_rows(_rng(), 32, 40, 6, 20)
    for ids, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        symbols = [each for each in ids if each >= FIRST_SYMBOL]
        assert ids[34:] == [MARK] * 6
        assert labels == [IGNORE_INDEX] * 34 + symbols
        assert ids.count(NOISE) == 28
    first = (batch.inputs >= FIRST_SYMBOL).int().argmax(-1)
    assert len(first.unique()) > 3


@pytest.mark.parametrize("elements", [2, 3, 4])
def test_tracking_tells_the_product_so_far(elements: int) -> None:
    permutations = list(itertools.permutations(range(elements)))
    batch = tracking_rows(_rng(), 8, 20, product_table(elements))
    for ids, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        arrangement = list(range(elements))
        for given, told in zip(ids, labels, strict=True):
            arrangement = [permutations[given][i] for i in arrangement]
            assert tuple(arrangement) == permutations[told]


def test_two_elements_are_parity() -> None:
    batch = tracking_rows(_rng(), 8, 20, product_table(2))
    assert (batch.labels == batch.inputs.cumsum(-1) % 2).all()


def test_the_same_numbers_give_the_same_rows() -> None:
    one, again, other = (recall_rows(_rng(seed), 8, 64, 8, 512, stacked=False) for seed in (1, 1, 2))
    assert (one.inputs == again.inputs).all()
    assert (one.labels == again.labels).all()
    assert (one.inputs != other.inputs).any()
