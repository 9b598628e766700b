"""Fine-tunes one classifier with one seed, on the training loop; measures every epoch and keeps the best one.

As in pretraining, the order of the rows is a function of the seed, checkpoints are atomic, and a killed run goes on to
the same result. Rows are drawn as one long stream of permutations cut into full batches, so an epoch ends at the first
step that has seen all rows.

    trainer = FinetuneTrainer(model, tokenizer, task=task, train=train, dev={"dev": dev}, settings=settings, seed=1,
                              run_dir=Path("runs/glue/cola/seed-1"))
    trainer.fit()
    trainer.epochs, trainer.best_epoch          # the best epoch's model is in run_dir / "best"
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from cottention.data.arrow_cache import fingerprint_of
from cottention.data.glue_batches import GlueCollator, packs_best
from cottention.data.glue_tasks import GlueTask
from cottention.errors import DataError
from cottention.evaluation.glue import glue_logits, glue_scores, predictions_of
from cottention.logging import get_logger
from cottention.seals import model_files, seal
from cottention.training.arguments import type_of
from cottention.training.checkpointing_trainer import CheckpointingTrainer, NonFiniteLossError, save_model
from cottention.training.checkpoints import (
    PARTS,
    RUN_STATE,
    atomic_directory,
    checkpoint_name,
    newest_intact_checkpoint,
    read_run_state,
    rotate,
    write_atomically,
    writing_to,
)
from cottention.training.finetune_settings import FinetuneSettings
from cottention.training.optimizer import build_optimizer
from cottention.training.progress import RunControl
from cottention.training.recipe_sections import OptimizerSettings
from cottention.training.stream import ExampleStream

_STEPS_BETWEEN_CHECKPOINTS = 1000  # MNLI's epochs have 12,000

logger = get_logger(__name__)


class Task(Protocol):
    """What is learned."""

    @property
    def title(self) -> str:
        """As in the log."""
        ...


class FinetuneTrainer(CheckpointingTrainer):
    """One seed of one task: of GLUE, or by `make_collator` and `measured` of another."""

    stepwise = False  # _Milestones asks for what is due

    fields: ClassVar[tuple[str, ...]] = ("input_ids", "num_first", "label")
    """Columns of the rows that the collator takes."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        task: Task,
        train: Dataset,
        dev: Mapping[str, Dataset],
        settings: FinetuneSettings,
        seed: int,
        run_dir: Path,
    ) -> None:
        """Set up; nothing is trained yet.

        Args:
            model: a classifier of the task's number of labels, freshly seeded.
            tokenizer: saved beside it.
            task: what is learned.
            train: encoded rows with labels.
            dev: the same of every split to measure on; the first decides which epoch is the best.
            settings: everything else.
            seed: of order and dropout.
            run_dir: receives checkpoints/ and best/.
        """
        self.task = task
        self.settings = settings
        self.seed = seed
        self.run_dir = run_dir
        self.epochs: list[dict[str, Any]] = []
        run_control = RunControl()
        self._train = train.select_columns([name for name in self.fields if name in train.column_names])
        self._dev = {name: rows.select_columns(self._train.column_names) for name, rows in dev.items()}
        num_rows = len(train)
        batch_size, num_steps = settings.batch_size_for(num_rows), settings.num_steps(num_rows)
        self.epoch_ends = {settings.num_steps(num_rows, epoch): epoch for epoch in range(1, settings.epochs + 1)}
        arguments = _arguments(settings, seed, run_dir, num_steps, batch_size)
        self.collator = self.make_collator(
            pad_token_id=tokenizer.pad_token_id or 0,
            packed=packs_best(model.config.attention_type, arguments.device),
            num_token_types=getattr(model.config, "type_vocab_size", 1),
        )
        super().__init__(
            model,
            arguments,
            checkpoints_dir=run_dir / "checkpoints",
            tokenizer=tokenizer,
            run_control=run_control,
            stream=ExampleStream(self._train, num_examples=num_steps * batch_size, seed=seed),
            collator=self.collator,
            callbacks=[run_control, _Milestones(self.epoch_ends), _Bar(f"{task.title}, seed {seed}")],
        )
        device = self.processes.device
        autocasts = type_of(settings.precision, device) == torch.bfloat16
        self.autocast = {"device_type": device.type, "dtype": torch.bfloat16, "enabled": autocasts}
        self._loss_sum = torch.zeros((), dtype=torch.float64)

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose model is kept: the first of the best ones; None before the first."""
        scores = [entry["score"] for entry in self.epochs]
        return None if not scores else 1 + int(np.argmax(scores))

    def fit(self) -> None:
        """Train to the end, or until a signal asks to stop; goes on from the newest intact checkpoint.

        Raises:
            NonFiniteLossError: the loss became infinite or NaN; names the step.
            CheckpointError: every checkpoint is damaged, or the disk is full.
            DataError: the checkpoint was trained on other rows.
        """
        checkpoint = newest_intact_checkpoint(self.checkpoints_dir, PARTS)
        if checkpoint is not None:
            state = read_run_state(checkpoint, {"epochs": list, "loss_sum": (int, float), "rows": str})
            if state["rows"] != fingerprint_of(self._train):
                raise DataError(f"the rows are not those that {checkpoint} was trained on; --overwrite starts again")
            self.epochs = state["epochs"]
            self._loss_sum.fill_(state["loss_sum"])
            logger.info("resuming from %s", checkpoint)
        self.train_on_from(checkpoint)

    def make_collator(self, **options: Any) -> GlueCollator:
        """What joins this task's rows to batches.

        Args:
            **options: of `GlueCollator`.
        """
        return GlueCollator(**options)

    # What the loop asks for

    def create_optimizer(self) -> torch.optim.Optimizer:
        """AdamW, as in pretraining, at the settings' rate."""
        settings = OptimizerSettings(
            learning_rate=self.settings.learning_rate, weight_decay=self.settings.weight_decay, warmup_steps=0
        )
        return build_optimizer(self.model, settings)

    def create_scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
        """The settings' schedule."""
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.settings.learning_rate_factor(step, num_steps)
        )

    def compute_loss(self, model: nn.Module, batch: Any, num_targets: Tensor | None) -> Tensor:
        """Loss of one batch."""
        with torch.autocast(**self.autocast):
            return model(**batch).loss

    def watch(self, loss: Tensor) -> None:
        """Stop at a loss that is no number, before it reaches the weights."""
        value = loss.item()
        if not np.isfinite(value):
            self.stop_at("loss", self.state.global_step + 1)
        self._loss_sum += value

    # Evaluation

    def evaluate(self) -> None:
        """Measure the epoch that has just ended, and keep its model when it is the best so far."""
        step = self.state.global_step
        epoch = self.epoch_ends[step]
        splits = {name: self.measured(rows) for name, rows in self._dev.items()}
        first = splits[next(iter(splits))]
        steps_before = max((end for end in self.epoch_ends if end < step), default=0)
        entry = {
            "epoch": epoch,
            "step": step,
            "train_loss": self._loss_sum.item() / (step - steps_before),
            "score": first["main"],
            "splits": splits,
        }
        self._loss_sum.zero_()
        self.epochs.append(entry)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in first["official"].items())
        logger.info(
            "%s, seed %d, epoch %d of %d: training loss %.4f, %s",
            self.task.title,
            self.seed,
            epoch,
            self.settings.epochs,
            entry["train_loss"],
            shown,
        )
        if self.best_epoch == epoch:
            with writing_to(self.run_dir), atomic_directory(self.run_dir / "best", sealed=False) as staging:
                save_model(self.model, self.saved_tokenizer, staging)
                seal(staging, model_files(staging, tokenizer=True))
        self.tell("on_evaluate", metrics={"score": first["main"]})

    def logits_of(self, rows: Dataset) -> np.ndarray:
        """The model's outputs `[N, labels]` for encoded rows; stops where they are no numbers."""
        logits = glue_logits(self.model, rows, self.collator, autocast=self.autocast)
        if not np.isfinite(logits).all():
            self.stop_at("output", self.state.global_step)
        return logits

    def measured(self, rows: Dataset) -> dict[str, Any]:
        """Scores of a split: "main", by which epochs are compared, "official", which are shown, and whatever else."""
        logits, task = self.logits_of(rows), cast(GlueTask, self.task)
        scores = glue_scores(task, predictions_of(task, logits), np.asarray(rows["label"]))
        return {"main": scores.main, "official": scores.official, "as_published": scores.as_published}

    def stop_at(self, what: str, step: int) -> NoReturn:
        """End the run at a number that is none."""
        raise NonFiniteLossError(
            f"the {what} became infinite or NaN at step {step} of {self.task.title}, seed {self.seed}; "
            "a smaller --learning-rate, a --warmup or --max-grad-norm may help"
        )

    # Checkpoints

    def save_checkpoint(self) -> None:
        """Write all that the seed goes on from, in place of the checkpoint before."""
        folder = self.checkpoints_dir
        run_state = {
            "epochs": self.epochs,
            "loss_sum": self._loss_sum.item(),
            "rows": fingerprint_of(self._train),
        }
        with writing_to(folder):
            with atomic_directory(folder / checkpoint_name(self.state.global_step), sealed=True) as staging:
                write_atomically(staging / RUN_STATE, json.dumps(run_state))
                self.save_state(staging)
            rotate(folder, 1)


class _Milestones(TrainerCallback):
    """Asks for a measurement and a checkpoint at every epoch's end, and for checkpoints within long ones."""

    def __init__(self, epoch_ends: Mapping[int, int]) -> None:
        self._epoch_ends = epoch_ends

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Decide."""
        control.should_evaluate = state.global_step in self._epoch_ends
        if control.should_evaluate or state.global_step % _STEPS_BETWEEN_CHECKPOINTS == 0:
            control.should_save = True


class _Bar(TrainerCallback):
    """A bar on a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Open it."""
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self._title, unit="step", leave=False
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Move it."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Close it."""
        if self._bar is not None:
            self._bar.close()


def _arguments(
    settings: FinetuneSettings, seed: int, run_dir: Path, num_steps: int, batch_size: int
) -> TrainingArguments:
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(run_dir / "checkpoints"),
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        seed=seed,
        max_grad_norm=settings.max_grad_norm or 0.0,
        dataloader_pin_memory=on_gpu,
        use_cpu=not on_gpu,
        report_to="none",
    )
