"""The Trainer of transformers, with what matters here replaced: data order, optimizer, evaluation, logs, checkpoints.

The stock Trainer writes checkpoints in place, forgets the loss since the last log line when it resumes, averages
held-out batches without weights, and spends time per micro batch on counting FLOPs and tokens. What is left of it: the
loop, gradient accumulation, device placement, several processes, and reading and writing of optimizer and RNG states
(all of it with weights_only=True).

    arguments = training_arguments(recipe, run_dir)
    trainer = PretrainingTrainer(recipe, model, arguments=arguments, text=text, run_dir=run_dir)
    trainer.fit(resume_from=None)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

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
    write_atomically,
    writing_to,
)
from cottention.training.deadline import Deadline
from cottention.training.memory import keep_freed_memory
from cottention.training.metrics import MetricsLog
from cottention.training.neighbours import NeighbourWatch
from cottention.training.objectives import objective_of
from cottention.training.optimizer import build_optimizer, build_scheduler
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
            run_dir / "checkpoints",
            text.tokenizer,
            run_control,
            model=model,
            args=arguments,
            data_collator=self.objective.collator(text),
            train_dataset=stream,
            eval_dataset=stream,  # the Trainer insists on one; evaluate() below does not read it
            callbacks=[*([self.deadline, NeighbourWatch()] if self.deadline else []), run_control, ProgressBar(recipe)],
        )
        self.remove_callback(PrinterCallback)
        if self.args.device.type == "cpu":
            keep_freed_memory()
        if self.args.world_size > 1:
            self.run_control.agree_among(self.args.world_size)
            set_seed(recipe.training.seed + self.args.process_index)  # each process drops out other units
        self.model_accepts_loss_kwargs = True  # compute_loss() always passes the number of targets
        self._autocast = {
            "device_type": self.args.device.type,
            "dtype": torch.bfloat16,
            "enabled": compute_type(recipe, self.args.device) == torch.bfloat16,
        }
        self._stopwatch = Stopwatch(elapsed_s=0.0, step=0)
        self._grad_norm: Tensor | float = 0.0
        self._window_losses = torch.zeros(len(self.objective.losses), device=self.args.device)
        self._window_start = 0
        self._first_bad_step = torch.full((), -1, device=self.args.device)
        self.objective.begin(model, self.args.device, self.args.process_index, max(1, self.args.world_size))

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
            num_processes = len(state["window_losses"])
            if num_processes != self.args.world_size:
                logger.warning(
                    "%s was written by %d processes, now there are %d: the same examples, but other dropout",
                    resume_from,
                    num_processes,
                    self.args.world_size,
                )
            self.objective.take_up(resume_from)
        self._window_start = state["window_start"]
        for rank, losses in enumerate(state["window_losses"]):
            if rank % self.args.world_size == self.args.process_index:
                self._window_losses += torch.tensor(losses, device=self.args.device)
        self._stopwatch = Stopwatch(elapsed_s=state["elapsed_s"], step=state["step"])
        if self.is_world_process_zero():
            self.metrics_log = MetricsLog(self.run_dir / "metrics.jsonl", resume_step=state["step"])
        self.train_on_from(resume_from)

    # What the loop asks for

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW as the recipe says."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(model or cast(PreTrainedModel, self.model), self.recipe.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear warmup, then linear to zero, by steps or by the clock."""
        if self.lr_scheduler is None and self.deadline is not None:
            adamw = cast(torch.optim.Optimizer, optimizer or self.optimizer)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, self.deadline.factor)
            self._created_lr_scheduler = True
        elif self.lr_scheduler is None:
            self.lr_scheduler = build_scheduler(
                optimizer or self.optimizer,
                num_warmup_steps=self.recipe.num_warmup_steps,
                num_steps=num_training_steps,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        # Batches are scaled by the targets of the whole step, so that accumulation does not change the gradient.
        if not batch_samples:
            return None
        passes = [one for batch in batch_samples for one in batch.get("passes", [batch])]
        count = torch.stack([self.objective.num_targets(one) for one in passes]).sum().to(device)
        return cast(Tensor, self.accelerator.reduce(count)) if self.args.world_size > 1 else count

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss over this pass, divided by the targets of the whole step, and that of pairs by its pairs."""
        # Our own autocast instead of the Trainer's: that one also turns the logits of every batch into fp32.
        with torch.autocast(**self._autocast):
            losses = self.objective.loss(model, inputs, num_items_in_batch)
        # Every process divides by the targets of all of them, and DDP takes the mean over processes.
        self._window_losses += torch.stack([loss.detach() for loss in losses.values()]) * self.args.world_size
        return losses["loss"] * self.args.world_size

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward over one micro batch, in passes where its windows are long; watches the loss."""
        passes = inputs.get("passes", [inputs])
        losses = []
        for number, one in enumerate(passes, start=1):
            # Gradients are exchanged once, behind the last pass, and then only if the Trainer wants it.
            with self.accelerator.no_sync(model) if number < len(passes) else nullcontext():
                losses.append(super().training_step(model, one, num_items_in_batch))
        loss = torch.stack(losses).sum()
        # Kept on the device: asking for the value would make a GPU wait at every step.
        bad = ~torch.isfinite(loss) & (self._first_bad_step < 0)
        self._first_bad_step.masked_fill_(bad, self.state.global_step + 1)
        if loss.device.type == "cpu":
            self._refuse_non_finite()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            # The Trainer would "clip" to infinity, which is one more pass over all gradients.
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(gradients)
        self._grad_norm = grad_norm
        return grad_norm

    def floating_point_ops(self, inputs: dict) -> int:
        """Nothing: see below."""
        return 0  # counting walks over all parameters at every micro batch, and nobody reads the sum

    # Evaluation and logs

    def evaluate(self, *_args: Any, **_options: Any) -> dict[str, float]:
        """Measure the held-out loss and log it."""
        self._refuse_non_finite()
        with self._stopwatch.paused():
            measured = self.measure_held_out()
        if not math.isfinite(measured["val_loss"]):
            step = self.state.global_step
            self._stop("held-out loss", step, newest_good=step - 1)
        self.log(measured)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics=measured)
        return measured

    def measure_held_out(self) -> dict[str, float]:
        """Loss and its relatives on the held-out text, as the model is now."""
        return self.text.held_out.measure(cast(PreTrainedModel, self.model), self._autocast, self.accelerator)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a line to metrics.jsonl and show it."""
        if "loss" in logs:
            self._refuse_non_finite()
            logs = self._training_line(logs)
        elif "val_loss" not in logs:
            return  # the Trainer's summary at the end
        step = self.state.global_step
        entry = {"step": step, "tokens": self.recipe.tokens_after(step), **logs}
        if self.is_world_process_zero():
            with writing_to(self.run_dir):
                self.metrics_log.write(entry)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, entry)

    def _training_line(self, logs: Mapping[str, float]) -> dict[str, float]:
        step = self.state.global_step
        num_steps = step - self._window_start
        losses = self._window_losses
        if self.args.world_size > 1:
            losses = cast(Tensor, self.accelerator.reduce(losses, "mean"))
        num_tokens = self.recipe.tokens_after(step) - self.recipe.tokens_after(self._stopwatch.lap_step)
        line = {
            "epoch": round(self.text.epochs_after(step, self.recipe), 4),
            **{name: loss / num_steps for name, loss in zip(self.objective.losses, losses.tolist(), strict=True)},
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(self._grad_norm),
            "tokens_per_s": round(num_tokens / self._stopwatch.lap(step), 1),
            "elapsed_s": round(self._stopwatch.elapsed_s, 2),
        }
        self._window_start = step
        self._window_losses.zero_()
        return line

    def _refuse_non_finite(self) -> None:
        bad_step = int(self._first_bad_step)
        if bad_step >= 0:
            # The update before it left the weights that gave this loss, so what was saved there is not good either.
            self._stop("loss", bad_step, newest_good=bad_step - 2)
        if not math.isfinite(self._grad_norm):
            step = self.state.global_step
            self._stop("gradient", step, newest_good=step - 1)

    def _stop(self, what: str, step: int, *, newest_good: int) -> NoReturn:
        good = [path for path in list_checkpoints(self.checkpoints_dir) if checkpoint_step(path) <= newest_good]
        where = f"last good checkpoint: {good[-1]}" if good else "no checkpoint was written yet"
        raise NonFiniteLossError(
            f"the {what} became infinite or NaN at step {step}; {where}; "
            "a smaller optimizer.learning_rate, a longer warmup or optimizer.max_grad_norm may help"
        )

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._refuse_non_finite()
        folder = self.checkpoints_dir
        writes = self.is_world_process_zero()
        run_state = self._run_state()
        more = self.objective.state_to_save(self.accelerator)
        with self._stopwatch.paused(), writing_to(folder):
            with ExitStack() as until_all_have_written:
                if writes:
                    target = folder / checkpoint_name(self.state.global_step)
                    staging = until_all_have_written.enter_context(atomic_directory(target, sealed=True))
                    write_atomically(staging / RUN_STATE, json.dumps(run_state))
                    if more is not None:
                        save_file(more[1], staging / more[0])
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
            if writes:
                rotate(folder, self.recipe.training.save_total_limit)
            self.accelerator.wait_for_everyone()

    def _run_state(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "window_start": self._window_start,
            "window_losses": cast(Tensor, self.accelerator.gather(self._window_losses[None])).tolist(),
            "elapsed_s": self._stopwatch.elapsed_s,
            "text": self.text.fingerprint(),
        }
