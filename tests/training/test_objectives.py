"""Ways of training: each recipe names one, and each gives the losses that it says from a batch that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cottention.training
from cottention.training.objectives import OBJECTIVES, objective_of
from cottention.training.pretraining import build_model
from cottention.training.recipe_files import load_recipe, packaged_recipes
from tests.training.helpers import tiny_recipe

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "causal": ("gpt", {}),
    "carried": ("gpt", {"data__carry_state": True}),
    "masked": ("bert", {"model__next_sentence_head": True}),
    "pairs": ("bert", {"model__next_sentence_head": True, "data__next_sentence": True}),
}


def recipe_of(name: str) -> Any:
    arch, changes = RECIPES[name]
    return tiny_recipe(arch, Path("text.txt"), model__dropout=0.0, **changes)


def test_every_packaged_recipe_names_a_way_of_training() -> None:
    assert {load_recipe(name).objective for name in packaged_recipes()} <= OBJECTIVES.keys()
    assert OBJECTIVES.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_in_the_way_that_it_names(name: str) -> None:
    objective = objective_of(recipe_of(name))
    assert type(objective) is OBJECTIVES[name]
    assert objective.reads_pairs == (name == "pairs")
    assert objective.leaves_parameters_unused == (name == "masked"), "its next-sentence head learns nothing"


@pytest.mark.parametrize("name", ["causal", "masked", "pairs"])
def test_the_losses_are_means_over_the_targets_that_are_counted(name: str) -> None:
    """Twice as many targets in the step: half the loss, of tokens; that of pairs goes by the recipe's pairs."""
    torch.manual_seed(0)
    recipe = recipe_of(name)
    objective, model = objective_of(recipe), build_model(recipe).double()
    input_ids = torch.randint(1, recipe.model.vocab_size, (recipe.training.global_batch_size, 32))
    batch = {"input_ids": input_ids, **objective.random_labels(input_ids)}
    num_targets = objective.num_targets(batch)
    assert 0 < int(num_targets) <= input_ids.numel()
    losses = objective.loss(model, batch, num_targets)
    assert tuple(losses) == objective.losses
    plain = model(**batch)
    for part, loss in losses.items():
        torch.testing.assert_close(loss, plain[part])
    halved = objective.loss(model, batch, 2 * num_targets)
    tokens = "mlm_loss" if name == "pairs" else "loss"
    torch.testing.assert_close(2 * halved[tokens], losses[tokens])
    if name == "pairs":
        torch.testing.assert_close(halved["nsp_loss"], losses["nsp_loss"])
        torch.testing.assert_close(losses["loss"], losses["mlm_loss"] + losses["nsp_loss"])


def test_training_asks_no_recipe_what_it_is() -> None:
    sources = Path(cottention.training.__file__).parent.rglob("*.py")
    assert not [path for path in sources if "isinstance(recipe" in path.read_text(encoding="utf-8")]
