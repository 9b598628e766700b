"""Pretraining on the loop: data order, optimizer, losses of the recipe's objective, evaluation, logs, checkpoints.

arguments = training_arguments(recipe, run_dir)
trainer = PretrainingTrainer(recipe, model, arguments=arguments, text=text, run_dir=run_dir)
trainer.fit(resume_from=None)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from cottention.errors import DataError
from cottention.logging import get_logger
from cottention.training.arguments import ENDLESS, compute_type
from cottention.training.checkpointing_trainer import CheckpointingTrainer, NonFiniteLossError
from cottention.training.checkpoints import (
    RUN_STATE,
    atomic_directory,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
    read_run_state,
    rotate,
    staging_area,
    write_atomically,
    writing_to,
)
from cottention.training.deadline import Deadline
from cottention.training.metrics import MetricsLog
from cottention.training.neighbours import NeighbourWatch
from cottention.training.objectives import objective_of
from cottention.training.optimizer import build_optimizer, build_scheduler
from cottention.training.processes import Processes
from cottention.training.progress import ProgressBar, RunControl
from cottention.training.recipe import Recipe
from cottention.training.recipe_files import replace_settings
from cottention.training.stopwatch import Stopwatch
from cottention.training.stream import FallingShares
from cottention.training.text import PreparedText

_RUN_STATE_KINDS = {
    "step": int,
    "window_start": int,
    "window_losses": list,
    "elapsed_s": (int, float),
    "text": str,
}

logger = get_logger(__name__)


class PretrainingTrainer(CheckpointingTrainer):
    """Trains one model by one recipe inside one run directory."""

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        *,
        arguments: TrainingArguments,
        text: PreparedText,
        run_dir: Path,
    ) -> None:
        """Set the run up; nothing is trained yet.

        Args:
            recipe: all choices.
            model: freshly initialised.
            arguments: what `training_arguments` makes of the recipe.
            text: windows, collator, tokenizer, held-out text.
            run_dir: receives metrics.jsonl and checkpoints/.
        """
        self.recipe = recipe
        self.run_dir = run_dir
        self.text = text
        self.objective = objective_of(recipe)
        by_clock = recipe.training.minutes is not None
        stream = text.stream(replace_settings(recipe, {"training.max_steps": ENDLESS}) if by_clock else recipe)
        run_control = RunControl()
        self.deadline = Deadline(recipe, lambda: self._stopwatch.since_start_s) if by_clock else None
        if self.deadline is not None and isinstance(stream, FallingShares):
            stream.progress = self.deadline.progress
        super().__init__(
            model,
            arguments,
            processes=Processes.joined(arguments, recipe.parallelism),
            checkpoints_dir=run_dir / "checkpoints",
            tokenizer=text.tokenizer,
            run_control=run_control,
            stream=stream,
            collator=self.objective.collator(text),
            callbacks=[*([self.deadline, NeighbourWatch()] if self.deadline else []), run_control, ProgressBar(recipe)],
        )
        device = self.processes.device
        self._autocast = {
            "device_type": device.type,
            "dtype": torch.bfloat16,
            "enabled": compute_type(recipe, device) == torch.bfloat16,
        }
        self.processes.parallel.apply(model, compute_type=compute_type(recipe, device))
        self._stopwatch = Stopwatch(elapsed_s=0.0, step=0)
        self._window_losses = torch.zeros(len(self.objective.losses), device=device)
        self._window_start = 0
        self._first_bad_step = torch.full((), -1, device=device)
        self.objective.begin(model, device, self.processes.reader, self.processes.num_readers)

    def fit(self, resume_from: Path | None) -> None:
        """Train to the end of the recipe, or until a signal asks to stop.

        Args:
            resume_from: an intact checkpoint of the same recipe, or None to start from the beginning.

        Raises:
            NonFiniteLossError: names the step and the last good checkpoint.
            CheckpointError: the checkpoint is of another model, or the disk is full.
            DataError: the checkpoint was trained on other text.
        """
        state = {"step": 0, "window_start": 0, "window_losses": [], "elapsed_s": 0.0}
        if resume_from is not None:
            state = read_run_state(resume_from, _RUN_STATE_KINDS)
            if state["text"] != self.text.fingerprint():
                raise DataError(
                    f"the text is not the one that {resume_from} was trained on; bring that back, or --overwrite "
                    "starts again"
                )
            num_writers = len(state["window_losses"])
            if num_writers != self.processes.num_processes:
                logger.warning(
                    "%s was written by %d processes, now there are %d: the same examples, but other dropout",
                    resume_from,
                    num_writers,
                    self.processes.num_processes,
                )
            self.objective.take_up(resume_from)
        self._window_start = state["window_start"]
        for rank, losses in enumerate(state["window_losses"]):
            if rank % self.processes.num_processes == self.processes.process_index:
                # Each of those that wrote has its share times their number, of which the mean is logged.
                ratio = self.processes.num_processes / len(state["window_losses"])
                self._window_losses += torch.tensor(losses, device=self.processes.device) * ratio
        self._stopwatch = Stopwatch(elapsed_s=state["elapsed_s"], step=state["step"])
        if self.processes.is_first:
            self.metrics_log = MetricsLog(self.run_dir / "metrics.jsonl", resume_step=state["step"])
        self.train_on_from(resume_from)

    # What the loop asks for

    def create_optimizer(self) -> torch.optim.Optimizer:
        """AdamW as the recipe says."""
        return build_optimizer(self.model, self.recipe.optimizer)

    def create_scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
        """Linear warmup, then linear to zero, by steps or by the clock."""
        if self.deadline is not None:
            return torch.optim.lr_scheduler.LambdaLR(optimizer, self.deadline.factor)
        return build_scheduler(optimizer, num_warmup_steps=self.recipe.num_warmup_steps, num_steps=num_steps)

    def num_targets(self, passes: Sequence[Any]) -> Tensor:
        """Those of the objective."""
        count = self.processes.reduce(torch.stack([self.objective.num_targets(one) for one in passes]).sum())
        return count // self.processes.parallel.layout.sequence  # each of those that share a window counted all of it

    def compute_loss(self, model: nn.Module, batch: Any, num_targets: Tensor | None) -> Tensor:
        """Loss over this pass, divided by the targets of the whole step, and that of pairs by its pairs."""
        with torch.autocast(**self._autocast):
            losses = self.objective.loss(model, self.processes.parallel.pass_of(model, batch), num_targets)
        # Every process divides by the targets of all of them, and gradients become the mean over processes.
        num_processes = self.processes.num_processes
        self._window_losses += torch.stack([loss.detach() for loss in losses.values()]) * num_processes
        return losses["loss"] * num_processes

    def watch(self, loss: Tensor) -> None:
        """Remember the first step whose loss is no number; stop there on a CPU, at the next line on a GPU."""
        # Kept on the device: asking for the value would make a GPU wait at every step.
        bad = ~torch.isfinite(loss) & (self._first_bad_step < 0)
        self._first_bad_step.masked_fill_(bad, self.state.global_step + 1)
        if loss.device.type == "cpu":
            self._refuse_non_finite()

    # Evaluation and logs

    def evaluate(self) -> None:
        """Measure the held-out loss and log it."""
        self._refuse_non_finite()
        with self._stopwatch.paused():
            measured = self.measure_held_out()
        if not math.isfinite(measured["val_loss"]):
            step = self.state.global_step
            self._stop("held-out loss", step, newest_good=step - 1)
        with self._stopwatch.paused():  # pictures are drawn
            self._log(measured)
            self.tell("on_evaluate", metrics=measured)

    def measure_held_out(self) -> dict[str, float]:
        """Loss and its relatives on the held-out text, as the model is now."""
        return self.text.held_out.measure(self.model, self._autocast, self.processes)

    def log_step(self, learning_rate: float) -> None:
        """Write a line about the steps since the last one."""
        self._refuse_non_finite()
        step = self.state.global_step
        num_steps = step - self._window_start
        losses = self.processes.reduce(self._window_losses, "mean")
        num_tokens = self.recipe.tokens_after(step) - self.recipe.tokens_after(self._stopwatch.lap_step)
        line = {
            "epoch": round(self.text.epochs_after(step, self.recipe), 4),
            **{name: loss / num_steps for name, loss in zip(self.objective.losses, losses.tolist(), strict=True)},
            "learning_rate": learning_rate,
            "grad_norm": float(self._grad_norm),
            "tokens_per_s": round(num_tokens / self._stopwatch.lap(step), 1),
            "elapsed_s": round(self._stopwatch.elapsed_s, 2),
        }
        self._window_start = step
        self._window_losses.zero_()
        self._log(line)

    def _log(self, figures: Mapping[str, float]) -> None:
        """Write a line to metrics.jsonl and show it."""
        step = self.state.global_step
        entry = {"step": step, "tokens": self.recipe.tokens_after(step), **figures}
        if self.processes.is_first:
            with writing_to(self.run_dir):
                self.metrics_log.write(entry)
        self.tell("on_log", logs=entry)

    def _refuse_non_finite(self) -> None:
        bad_step = int(self._first_bad_step)
        if bad_step >= 0:
            # The update before it left the weights that gave this loss, so what was saved there is not good either.
            self._stop("loss", bad_step, newest_good=bad_step - 2)
        if not math.isfinite(self._grad_norm):
            step = self.state.global_step
            self._stop("gradient", step, newest_good=step - 1)

    def _stop(self, what: str, step: int, *, newest_good: int) -> NoReturn:
        self.saving.wait()
        good = [path for path in list_checkpoints(self.checkpoints_dir) if checkpoint_step(path) <= newest_good]
        where = f"last good checkpoint: {good[-1]}" if good else "no checkpoint was written yet"
        raise NonFiniteLossError(
            f"the {what} became infinite or NaN at step {step}; {where}; "
            "a smaller optimizer.learning_rate, a longer warmup or optimizer.max_grad_norm may help"
        )

    # Checkpoints

    def save_checkpoint(self) -> None:
        """Write all that the run goes on from, and delete what is older than the newest few."""
        self._refuse_non_finite()
        folder, processes = self.checkpoints_dir, self.processes
        target = folder / checkpoint_name(self.state.global_step)
        run_state = self._run_state()
        more = self.objective.state_to_save(processes)
        with self._stopwatch.paused(), writing_to(folder):
            self.saving.wait()
            with ExitStack() as until_all_have_written:
                staging = staging_area(folder) / target.name
                if processes.is_first:
                    until_all_have_written.enter_context(_rotating(folder, self.recipe.training.save_total_limit))
                    until_all_have_written.enter_context(atomic_directory(target, sealed=True))
                    write_atomically(staging / RUN_STATE, json.dumps(run_state))
                    if more is not None:
                        save_file(more[1], staging / more[0])
                processes.wait_for_everyone()
                self.save_state(staging)
                processes.wait_for_everyone()
                self.saving.goes_on(until_all_have_written)
            processes.wait_for_everyone()

    def _run_state(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "window_start": self._window_start,
            "window_losses": self.processes.gather(self._window_losses[None]).tolist(),
            "elapsed_s": self._stopwatch.elapsed_s,
            "text": self.text.fingerprint(),
        }


@contextmanager
def _rotating(folder: Path, keep: int) -> Iterator[None]:
    """Delete older checkpoints once a new one is there."""
    yield
    rotate(folder, keep)
