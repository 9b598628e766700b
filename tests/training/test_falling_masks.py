"""Runs that hide fewer and fewer tokens: the share of every example, in windows and in pairs, and a stopped run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cottention.data.masking import shares_of
from cottention.errors import SettingsError
from cottention.training.pretraining import pretrain
from cottention.training.recipe_sections import BertDataSettings
from cottention.training.stream import FallingShares
from cottention.training.text import prepare_text
from tests.training import victims
from tests.training.helpers import assert_same_run, in_child, tiny_recipe
from tests.training.test_pair_training import pair_recipe
from tests.training.test_pair_training import stories as stories

FALLING = {"data__mlm_probability": 0.1, "data__mlm_probability_start": 0.7, "training__max_steps": 4}


@pytest.mark.parametrize("make", [tiny_recipe, pair_recipe], ids=["windows", "pairs"])
def test_the_share_falls_from_step_to_step_and_in_no_step(make: Any, stories: Path) -> None:
    recipe = make(*(["bert"] if make is tiny_recipe else []), stories, **FALLING)
    text = prepare_text(recipe, None)
    stream = text.stream(recipe)
    assert isinstance(stream, FallingShares)
    rows = stream.__getitems__(list(range(8))) + stream.__getitems__(list(range(8, 32)))
    shares = np.array([row["mlm_probability"] for row in rows]).reshape(4, 8)
    np.testing.assert_allclose(shares, np.repeat([[0.7], [0.5], [0.3], [0.1]], 8, axis=1))
    assert stream[17]["mlm_probability"] == rows[17]["mlm_probability"]


@pytest.mark.parametrize("make", [tiny_recipe, pair_recipe], ids=["windows", "pairs"])
def test_so_many_tokens_are_hidden_and_the_later_ones_are_some_of_the_earlier(make: Any, stories: Path) -> None:
    recipe = make(*(["bert"] if make is tiny_recipe else []), stories, **FALLING)
    text = prepare_text(recipe, None)
    rows: list[Any] = [text.train[index] for index in range(len(text.train))]
    hidden = [
        text.collator([{**row, "pass_number": 0, "mlm_probability": share} for row in rows])["labels"] != -100
        for share in (0.1, 0.5)
    ]
    few, many = (float(one.float().mean()) for one in hidden)
    assert 0.07 < few < 0.13, few
    assert 0.40 < many < 0.55, many  # special tokens and padding are never hidden
    assert not (hidden[0] & ~hidden[1]).any()
    plain = text.collator([{**row, "pass_number": 0} for row in rows])["labels"] != -100
    assert torch.equal(plain, hidden[0]), "rows without a share of their own are masked as the recipe's last step"


def test_held_out_text_is_masked_alike_whatever_the_start(stories: Path) -> None:
    recipes = [tiny_recipe("bert", stories, data__mlm_probability_start=start) for start in (None, 0.9)]
    batches = []
    for recipe in recipes:
        held_out = prepare_text(recipe, None).held_out
        batches.append(held_out._collator([held_out._windows[0]]))  # type: ignore[union-attr]
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_share(stories: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("bert", stories, **{**FALLING, "training__max_steps": 8, "training__save_every": 2})
    pretrain(recipe, output_dir=tmp_path / "whole")
    in_child(victims.run, recipe, tmp_path / "stopped", "an update is done", 5)
    in_child(victims.run, recipe, tmp_path / "stopped", None, 1)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_examples_without_shares_have_none() -> None:
    assert shares_of([{"input_ids": [1]}]) is None
    assert shares_of([]) is None


def test_one_step_has_the_first_share() -> None:
    class Rows:
        def __len__(self) -> int:
            return 3

    assert [
        FallingShares(Rows(), first=0.4, last=0.2, examples_per_step=3).share_at(position)  # type: ignore[arg-type]
        for position in range(3)
    ] == [0.4] * 3


@pytest.mark.parametrize("start", [0.0, 1.0, -0.1])
def test_a_share_that_is_none_is_refused(start: float) -> None:
    with pytest.raises(SettingsError, match=rf"^data.mlm_probability_start must be between 0 and 1; got {start}$"):
        BertDataSettings(mlm_probability_start=start)
