"""Where a run starts from: the weights of a model that exists, or the end of a finished run that is to go further.

start = open_start(recipe)                  # before any text is read: sizes, attention, tokenizer
if start is not None: start.hand_over(model)
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cottention.data.tokenizer import load_tokenizer
from cottention.errors import SettingsError
from cottention.generation import load_model_and_tokenizer
from cottention.training.checkpoints import list_checkpoints
from cottention.training.corpora import TRAINED
from cottention.training.objectives import objective_of
from cottention.training.recipe import Recipe

# What of a config says nothing about its weights.
_FREE = frozenset(
    (
        "resid_pdrop",
        "embd_pdrop",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "original_init",
        "n_positions",
        "sparse_prediction",
    )
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Weights to start from."""

    model: PreTrainedModel
    """With the weights, of the kind and the sizes of the recipe."""

    def hand_over(self, model: PreTrainedModel) -> None:
        """Give a new model of the same recipe these weights."""
        model.load_state_dict(self.model.state_dict())


def open_start(recipe: Recipe) -> Start | None:
    """Open the model that a recipe starts from; None where it starts from random weights.

    Raises:
        CheckpointError: there is no such model, or it is damaged or of another kind.
        SettingsError: its sizes, its attention or its tokenizer are not those of the recipe.
    """
    source = recipe.training.init_from
    if source is None:
        return None
    kind = objective_of(recipe).model_kind
    model, tokenizer = load_model_and_tokenizer(source, kind, device="cpu", dtype=torch.float32)
    own: Any = type(model.config)(**recipe.config_fields())
    for name in recipe.config_fields():
        ours, theirs = getattr(own, name), getattr(model.config, name)
        if name in _FREE or ours == theirs or _is_unused(name, own):
            continue
        raise SettingsError(f"model.{name} must be {theirs}, as in {source}, which the run starts from; got {ours}")
    given = recipe.data.tokenizer
    if given == TRAINED:
        raise SettingsError(f"data.tokenizer must be that of {source}, which the run starts from; got {TRAINED}")
    if load_tokenizer(given).get_vocab() != tokenizer.get_vocab():
        raise SettingsError(f"data.tokenizer must have the tokens of {source}, which the run starts from; got {given}")
    return Start(model=model)


def _is_unused(name: str, config: Any) -> bool:
    """Whether a field is of no effect in such a config."""
    if name == "max_position_embeddings":
        return config.position_embedding_type == "rotary"
    return name == "rotary_dim" and config.position_embedding_type in ("none", "absolute")


def check_goes_further(run_dir: Path, recipe: Recipe) -> None:
    """Refuse to lengthen a run whose steps so far would have been others in the longer one.

    Raises:
        SettingsError: it would be so, or no checkpoint is left.
    """
    if recipe.training.minutes is not None:
        raise SettingsError(f"--extend needs a run without training.minutes; got {recipe.training.minutes:g}")
    bound = [name for name in objective_of(recipe).laid_out_by_steps if getattr(recipe.data, name)]
    if bound:
        raise SettingsError(
            f"--extend needs a run without data.{bound[0]}, whose text is laid out by training.max_steps"
        )
    if not list_checkpoints(run_dir / "checkpoints"):
        raise SettingsError(f"--extend needs a checkpoint to go on from; {run_dir} has none")


def set_aside(run_dir: Path, steps: int) -> None:
    """Rename the model of a finished run that goes further, so that the run does not count as finished.

    Args:
        run_dir: of the run.
        steps: those that the model has behind it, which become part of its name.
    """
    kept = run_dir / f"model-{steps}"
    if (run_dir / "model").is_dir():
        shutil.rmtree(kept, ignore_errors=True)
        (run_dir / "model").rename(kept)


class LongerSchedule(TrainerCallback):
    """Takes the next update's rate from the longer run's line: the saved one is where the shorter line ended."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Set the rate of every group."""
        scheduler = others["lr_scheduler"]
        for group, base, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(state.global_step)
