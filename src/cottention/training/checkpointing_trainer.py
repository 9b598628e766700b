"""The loop with checkpoints: whole or not there, strict, and without anything that could run code.

What pretraining and fine-tuning share. Each decides what else a checkpoint holds (`save_checkpoint`) and how often.

    class OurTrainer(CheckpointingTrainer): ...
    trainer.train_on_from(newest_intact_checkpoint(folder))
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState, TrainingArguments, set_seed

from cottention.data.tokenizer_files import save_tokenizer
from cottention.errors import CheckpointError, CottentionError
from cottention.generation.loading import quiet_progress
from cottention.seals import SHARDS
from cottention.training.checkpoints import OPTIMIZER, RANDOM_STATE, SCHEDULER, TRAINER_STATE
from cottention.training.loop import TrainingLoop
from cottention.training.memory import keep_freed_memory
from cottention.training.parallel import unsharded_class
from cottention.training.progress import RunControl
from cottention.training.sharded import Saving, read_shards, set_rates, spread, state_tensors

# What an array of numpy's is put together from; its state is one.
_NUMPY_STATE: Any = [np.zeros(0).__reduce__()[0], np.ndarray, np.dtype, type(np.dtype(np.uint32))]


class NonFiniteLossError(CottentionError):
    """The loss or the gradient became infinite or NaN; the run stopped before the next checkpoint was written."""


class CheckpointingTrainer(TrainingLoop):
    """Saves the whole state of a run and takes it up again.

    Args:
        model: to train; its dropout begins with the arguments' seed.
        arguments: see `TrainingLoop`.
        checkpoints_dir: where checkpoints lie.
        tokenizer: saved beside the model.
        run_control: stops at a signal; the caller lists it among the callbacks too.
        **options: of `TrainingLoop`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        *,
        checkpoints_dir: Path,
        tokenizer: PreTrainedTokenizerBase,
        run_control: RunControl,
        **options: Any,
    ) -> None:
        super().__init__(model, arguments, **options)
        self.checkpoints_dir = checkpoints_dir
        self.saving = Saving()
        self.saved_tokenizer = tokenizer
        self.run_control = run_control
        if self.processes.is_first:
            checkpoints_dir.mkdir(parents=True, exist_ok=True)
        if self.processes.num_processes > 1:
            run_control.agree_among(self.processes.num_processes)
        set_seed(arguments.seed + self.processes.process_index)  # each process drops out other units
        self.model.config.use_cache = False  # nothing is read twice in training
        if self.processes.device.type == "cpu":
            keep_freed_memory()

    def train_on_from(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint, or from the start; a signal stops it after a step.

        Raises:
            CheckpointError: the checkpoint holds more than tensors and plain numbers.
        """
        try:
            with self.run_control.listening():
                self.train(checkpoint)
                self.saving.wait()
                self.processes.wait_for_everyone()
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{checkpoint} holds more than tensors and plain numbers: not loaded") from error

    def save_state(self, folder: Path) -> None:
        """Write weights, tokenizer, optimizer, schedule, number of steps, and each process its random state.

        Shards are written while training goes on (`saving`).
        """
        parallel = self.processes.parallel
        if parallel.is_sharded:
            self.saving.begin(state_tensors(self.model, self.optimizer), folder / SHARDS, parallel.saving_group)
        if self.processes.is_first:
            if parallel.is_sharded:
                save_description(self.model, self.saved_tokenizer, folder)
            else:
                save_model(self.model, self.saved_tokenizer, folder)
                torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)
            self.state.save_to_json(str(folder / TRAINER_STATE))
        states: dict[str, Any] = {"python": random.getstate(), "cpu": torch.random.get_rng_state()}
        states["numpy"] = np.random.get_state()  # noqa: NPY002  # of libraries; ours have generators of their own
        if torch.cuda.is_available():
            states["cuda"] = torch.cuda.random.get_rng_state(self.processes.device)
        torch.save(states, self._random_state_in(folder))

    def load_state(self, checkpoint: Path) -> None:
        """Take up weights, every one of them, optimizer, schedule and number of steps."""
        self.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER, weights_only=True))
        if (checkpoint / SHARDS).is_dir():
            read_shards(state_tensors(self.model, self.optimizer), checkpoint / SHARDS)
            set_rates(self.optimizer, self.lr_scheduler)
        else:
            with quiet_progress():
                saved = unsharded_class(self.model).from_pretrained(
                    checkpoint, config=self.model.config, dtype=torch.float32
                )
            state = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
            if self.processes.parallel.is_sharded:
                spread(saved, state, self.model, self.optimizer)
                set_rates(self.optimizer, self.lr_scheduler)
            else:
                self.model.load_state_dict(saved.state_dict())
                self.optimizer.load_state_dict(state)
        self.state.global_step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE)).global_step

    def load_random_state(self, checkpoint: Path) -> None:
        """Take up this process's random state; one that was not there when it was written begins afresh."""
        path = self._random_state_in(checkpoint)
        if not path.is_file():
            return
        with torch.serialization.safe_globals(_NUMPY_STATE):
            states = torch.load(path, weights_only=True)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])  # noqa: NPY002
        torch.random.set_rng_state(states["cpu"])
        if torch.cuda.is_available() and "cuda" in states:
            torch.cuda.random.set_rng_state(states["cuda"], self.processes.device)

    def _random_state_in(self, folder: Path) -> Path:
        one = self.processes.num_processes == 1
        return folder / (RANDOM_STATE if one else RANDOM_STATE.replace(".", f"_{self.processes.process_index}."))


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a model directory: config, weights, tokenizer; the caller seals it.

    Args:
        model: whose config is written.
        tokenizer: beside it.
        folder: to write into.
        weights: whole, by name, where the model itself holds parts.
    """
    with _with_cache(model.config), quiet_progress():
        model.save_pretrained(folder, state_dict=weights, seal=False)  # pyright: ignore[reportCallIssue]  # ours
    save_tokenizer(tokenizer, folder)


def save_description(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write of a model directory all but the weights."""
    model.config.architectures = [unsharded_class(model).__name__]
    with _with_cache(model.config):
        model.config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


@contextmanager
def _with_cache(config: Any) -> Iterator[None]:
    # The cache is switched off for training; whoever opens the model wants it on.
    training_use_cache = getattr(config, "use_cache", None)
    if training_use_cache is not None:
        config.use_cache = True
    try:
        yield
    finally:
        if training_use_cache is not None:
            config.use_cache = training_use_cache
