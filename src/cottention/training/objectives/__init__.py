"""Ways of training, one file each: what an example is, how rows become passes, the loss, the held-out figure, state.

A recipe names its own (`recipe.objective`); a new one is a file here and a line in `OBJECTIVES`. Training itself
(`training/loop.py`) asks no recipe what it is.

    objective = objective_of(recipe)
    text = prepare_text(recipe, None)
    objective.stream(text)[0], objective.loss(model, batch, num_targets)["loss"]
"""

from __future__ import annotations

from cottention.training.objectives.base import Objective, PretrainingObjective
from cottention.training.objectives.carried import Carried
from cottention.training.objectives.causal import Causal
from cottention.training.objectives.masked import Masked
from cottention.training.objectives.pairs import Pairs
from cottention.training.recipe import Recipe

OBJECTIVES: dict[str, type[PretrainingObjective]] = {
    "causal": Causal,
    "carried": Carried,
    "masked": Masked,
    "pairs": Pairs,
}
"""What `recipe.objective` may be. Fine-tuning has no recipe; its losses are `compute_loss` of its trainers."""

__all__ = ["OBJECTIVES", "Carried", "Causal", "Masked", "Objective", "Pairs", "PretrainingObjective", "objective_of"]


def objective_of(recipe: Recipe) -> PretrainingObjective:
    """The way in which a recipe trains; cheap, nothing is opened."""
    return OBJECTIVES[recipe.objective](recipe)
