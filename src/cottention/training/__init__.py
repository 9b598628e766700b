"""Training: recipes, pretraining with resume, fine-tuning on GLUE, the quickstart.

    from cottention.training import load_recipe, pretrain

    result = pretrain(load_recipe("quickstart_gpt"), output_dir="runs/mine")

Names are imported when they are first used: the recipes need no torch, and `--help` must not wait for it. None of them
may be the name of a submodule, which Python would put in its place.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cottention.training.finetune_settings import FinetuneSettings
    from cottention.training.finetuning import FinetuneResult, finetune
    from cottention.training.pretraining import PretrainResult, pretrain
    from cottention.training.quickstart import run_quickstart
    from cottention.training.recipe import BertRecipe, GPTRecipe
    from cottention.training.recipe_files import load_recipe, packaged_recipes

_HOMES = {
    "BertRecipe": "cottention.training.recipe",
    "GPTRecipe": "cottention.training.recipe",
    "FinetuneResult": "cottention.training.finetuning",
    "FinetuneSettings": "cottention.training.finetune_settings",
    "PretrainResult": "cottention.training.pretraining",
    "finetune": "cottention.training.finetuning",
    "load_recipe": "cottention.training.recipe_files",
    "packaged_recipes": "cottention.training.recipe_files",
    "pretrain": "cottention.training.pretraining",
    "run_quickstart": "cottention.training.quickstart",
}

__all__ = [
    "BertRecipe",
    "FinetuneResult",
    "FinetuneSettings",
    "GPTRecipe",
    "PretrainResult",
    "finetune",
    "load_recipe",
    "packaged_recipes",
    "pretrain",
    "run_quickstart",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
