"""Shows a run's figures elsewhere too: its picture of the loss, TensorBoard, Weights & Biases, Trackio.

Every tracker gets the lines of metrics.jsonl under the names that they have there, by step. Each is a package of its
own, asked for by `training.report_to` and imported for those who do.

    check_trackers(recipe.training.report_to)       # before anything is prepared
    trainer.add_callback(Reports(recipe, run_dir))
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cottention.errors import SettingsError
from cottention.training.checkpoints import writing_to
from cottention.training.metrics import draw_loss_curve, read_metrics
from cottention.training.recipe import Recipe

_PROJECT = "cottention"

Send = Callable[[int, dict[str, float]], object]
"""Takes the step and the figures of a line."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what could not be reported to when the first line is there.

    Raises:
        SettingsError: a tracker's package is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise SettingsError(
                f"training.report_to: {name} is not installed; pip install {name}, or take it out "
                "(the extra `tracking` of cottention brings all three)"
            )


class Reports(TrainerCallback):
    """Sends each line to the trackers, and draws loss_curve.png at every evaluation; process 0 only."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        self._recipe = recipe
        self._run_dir = run_dir
        self._trackers: list[tuple[Send, Callable[[], object]]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Open the trackers."""
        if state.is_world_process_zero:
            self._trackers = [_OPENERS[name](self._recipe, self._run_dir) for name in self._recipe.training.report_to]

    def on_log(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_others: Any,
    ) -> None:
        """Send a line; behind one on held-out text draw the curves as far as they go."""
        figures = {name: value for name, value in logs.items() if name != "step"}
        for send, _ in self._trackers:
            send(state.global_step, figures)
        if state.is_world_process_zero and "val_loss" in figures:
            with writing_to(self._run_dir):
                draw_run(self._run_dir)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Close the trackers."""
        for _, close in self._trackers:
            close()
        self._trackers = []


def draw_run(run_dir: Path) -> None:
    """Draw loss_curve.png from metrics.jsonl."""
    draw_loss_curve(read_metrics(run_dir / "metrics.jsonl"), run_dir / "loss_curve.png", title=run_dir.name)


def _tensorboard(recipe: Recipe, run_dir: Path) -> tuple[Send, Callable[[], object]]:
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(run_dir / "tensorboard"))

    def send(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def _wandb(recipe: Recipe, run_dir: Path) -> tuple[Send, Callable[[], object]]:
    run = import_module("wandb").init(
        project=_PROJECT,
        name=run_dir.resolve().name,
        id=_run_id(run_dir),
        resume="allow",  # a run that goes on is one run there too
        dir=str(run_dir),
        config={"arch": recipe.arch, **asdict(recipe)},
    )
    return lambda step, figures: run.log(figures, step=step), run.finish


def _trackio(recipe: Recipe, run_dir: Path) -> tuple[Send, Callable[[], object]]:
    trackio = import_module("trackio")
    with redirect_stdout(sys.stderr):  # where it would greet among our results
        trackio.init(
            project=_PROJECT,
            name=f"{run_dir.resolve().name}-{_run_id(run_dir)}",  # its runs have no id but their name
            resume="allow",
            config={"arch": recipe.arch, **asdict(recipe)},
        )

    def close() -> None:
        with redirect_stdout(sys.stderr):
            trackio.finish()

    return lambda step, figures: trackio.log(figures, step=step), close


def _run_id(run_dir: Path) -> str:
    """The same for a run that goes on in its directory."""
    return hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:10]


_OPENERS: dict[str, Callable[[Recipe, Path], tuple[Send, Callable[[], object]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
