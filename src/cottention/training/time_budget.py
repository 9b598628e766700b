"""How many steps fit into some minutes, here and now: a few real steps of a throwaway model are timed.

The result is a recipe with training.minutes, by whose clock the schedule falls to zero exactly at the end however the
speed changes, and with max_steps, what the run is expected to come to.

    recipe = fit_to_time(recipe, text, budget_s=300.0)
"""

from __future__ import annotations

import math
import tempfile
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from cottention.logging import get_logger
from cottention.training.arguments import ENDLESS, training_arguments
from cottention.training.neighbours import NeighbourWatch
from cottention.training.pretraining import build_model
from cottention.training.progress import ProgressBar, duration
from cottention.training.recipe import Recipe
from cottention.training.recipe_files import replace_settings
from cottention.training.text import PreparedText
from cottention.training.trainer import PretrainingTrainer

_WARM_UP_STEPS = 3  # the first steps wait for memory and for threads to start
_LEAST_STEPS = 4
_SHARE = 0.03  # of the budget, for timing: long enough to see what else the machine is doing
_MOST_S = 20.0
_EVALUATIONS = 10
_LEAST_LINES = 20  # in the log and in the picture
_EVALUATION_SHARE = 0.05  # of the budget, at most, for all evaluations together
_BETWEEN_CHECKPOINTS_S = 30.0  # what a killed run loses at most; writing one takes some tenths of a second

logger = get_logger(__name__)


def fit_to_time(recipe: Recipe, text: PreparedText, *, budget_s: float) -> Recipe:
    """Choose precision, minutes, steps, when to log, evaluate and save: training is to take about `budget_s` seconds.

    The time that this takes is part of the budget.

    Args:
        recipe: everything else.
        text: its text.
        budget_s: seconds for all of timing, training, held-out evaluations and checkpoints.

    Returns:
        The recipe with training.precision, minutes, max_steps, log_every, eval_every and save_every set.
    """
    started = time.perf_counter()
    candidates = [replace_settings(recipe, {"training.precision": precision}) for precision in _precisions(recipe)]
    timed_s = min(_SHARE * budget_s, _MOST_S) / len(candidates)
    measured = [(*_measure(each, text, timed_s=timed_s), each) for each in candidates]
    step_s, evaluation_s, recipe = min(measured, key=itemgetter(0))
    left_s = budget_s - (time.perf_counter() - started)
    num_evaluations = max(1, min(_EVALUATIONS, int(_EVALUATION_SHARE * budget_s / evaluation_s)))
    # The first steps are timed; those of longer windows, where the recipe has them, take longer by their tokens.
    endless = replace_settings(recipe, {"training.max_steps": ENDLESS})
    mean_step_s = step_s * endless.tokens_after(ENDLESS) / (ENDLESS * endless.tokens_per_step)
    max_steps = max(1, round((left_s - num_evaluations * evaluation_s) / mean_step_s))
    logger.info(
        "a step takes %.3f s: %d steps in %s; %s are kept for scores of held-out text",
        mean_step_s,
        max_steps,
        duration(budget_s),
        duration(num_evaluations * evaluation_s),
    )
    changes = {
        "training.max_steps": max_steps,
        "training.log_every": max(1, min(recipe.training.log_every, max_steps // _LEAST_LINES)),
        # The evaluation at the end comes when the time is over. Where neighbours make it take a good part of that, the
        # run is rather late than untrained.
        "training.minutes": max(left_s - evaluation_s, budget_s / 2) / 60,
        "training.eval_every": max(
            math.ceil(max_steps / num_evaluations),
            # Not at every step of a run that will have more than was left for it.
            round(budget_s / 2 / mean_step_s) if left_s - evaluation_s < budget_s / 2 else 1,
        ),
        "training.save_every": max(1, round(_BETWEEN_CHECKPOINTS_S / step_s)),
    }
    return replace_settings(recipe, changes)


def _precisions(recipe: Recipe) -> list[str]:
    """Those to choose from by their time: large products gain by bf16, small ones lose by its conversions."""
    chooses = recipe.training.precision == "auto" and not torch.cuda.is_available() and _multiplies_bf16()
    return ["bf16", "fp32"] if chooses else [recipe.training.precision]


def _multiplies_bf16() -> bool:
    """Whether the processor has instructions for bf16; without them it takes many times as long as fp32."""
    described = Path("/proc/cpuinfo")
    return described.is_file() and "avx512_bf16" in described.read_text(encoding="utf-8")


def _measure(recipe: Recipe, text: PreparedText, *, timed_s: float) -> tuple[float, float]:
    """Seconds of a training step and of an evaluation, by the trainer that will do them."""
    never = dict.fromkeys(("max_steps", "log_every", "eval_every", "save_every"), ENDLESS)
    endless = replace_settings(recipe, {f"training.{name}": value for name, value in never.items()})
    timer = _Timer(timed_s)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(endless, Path(folder))
        set_seed(recipe.training.seed)
        model = build_model(endless, text.tokenizer)
        trainer = PretrainingTrainer(endless, model, arguments=arguments, text=text, run_dir=Path(folder))
        trainer.remove_callback(ProgressBar)
        trainer.add_callback(NeighbourWatch())
        trainer.add_callback(timer)
        trainer.train()  # not fit(): nothing is to be saved, and Ctrl-C may end it at once
        started = time.perf_counter()
        trainer.measure_held_out()
    return timer.step_s, time.perf_counter() - started


class _Timer(TrainerCallback):
    """Times steps behind a few warm-up steps, and then ends the training."""

    def __init__(self, timed_s: float) -> None:
        self.step_s = 0.0
        self._timed_s = timed_s
        self._started = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Look at the clock."""
        num_steps = state.global_step - _WARM_UP_STEPS
        if num_steps <= 0:
            self._started = time.perf_counter()
            return
        elapsed_s = time.perf_counter() - self._started
        # The mean, not the median: what slows down some of the steps here will slow down some of the run's.
        self.step_s = elapsed_s / num_steps
        control.should_training_stop = num_steps >= _LEAST_STEPS and elapsed_s >= self._timed_s
