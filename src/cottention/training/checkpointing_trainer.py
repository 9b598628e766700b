"""transformers' Trainer with checkpoints of ours: whole or not there, strict, and without anything that could run code.

What pretraining and fine-tuning share. Each decides what else a checkpoint holds (`_save_checkpoint`) and how often;
the examples come in the order of the stream that it is given.

    class OurTrainer(CheckpointingTrainer): ...
    trainer.train_on_from(newest_intact_checkpoint(folder))
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from cottention.data.tokenizer_files import save_tokenizer
from cottention.errors import CheckpointError, CottentionError
from cottention.generation.loading import quiet_progress
from cottention.training.checkpoints import staging_area
from cottention.training.progress import RunControl
from cottention.training.stream import InOrder


class NonFiniteLossError(CottentionError):
    """The loss or the gradient became infinite or NaN; the run stopped before the next checkpoint was written."""


class CheckpointingTrainer(Trainer):
    """Reads a stream in its order, saves into a staging area, loads strictly.

    Args:
        checkpoints_dir: where checkpoints lie.
        tokenizer: saved beside the model.
        run_control: stops at a signal; the caller lists it among the callbacks too.
        **options: of `Trainer`.
    """

    def __init__(
        self, checkpoints_dir: Path, tokenizer: PreTrainedTokenizerBase, run_control: RunControl, **options: Any
    ) -> None:
        self.checkpoints_dir = checkpoints_dir
        self.saved_tokenizer = tokenizer
        self.run_control = run_control
        super().__init__(**options)

    def train_on_from(self, checkpoint: Path | None) -> None:
        """Train from a checkpoint, or from the start; a signal stops it after a step.

        Raises:
            CheckpointError: the checkpoint holds more than tensors and plain numbers.
        """
        try:
            with self.run_control.listening():
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{checkpoint} holds more than tensors and plain numbers: not loaded") from error

    def _get_train_sampler(self, train_dataset: Any = None) -> InOrder:
        return InOrder(len(cast(Any, self.train_dataset)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # The stock version leaves weights that a checkpoint lacks as they are; ours says so in one line.
        own = cast(PreTrainedModel, self.model)
        with quiet_progress():
            saved = type(own).from_pretrained(resume_from_checkpoint, config=own.config, dtype=torch.float32)
        own.load_state_dict(saved.state_dict())

    def _get_output_dir(self, trial: Any) -> str:
        return str(staging_area(self.checkpoints_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The stock version also pickles the arguments, which only arbitrary-code loading could read again.
        if self.args.should_save:
            assert output_dir is not None
            save_model(cast(PreTrainedModel, self.model), self.saved_tokenizer, Path(output_dir), state_dict=state_dict)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, state_dict: dict | None = None
) -> None:
    """Write a model directory: config, weights, tokenizer; the caller seals it."""
    # The Trainer switches the cache off for training; whoever opens the model wants it on.
    training_use_cache = getattr(model.config, "use_cache", None)
    if training_use_cache is not None:
        model.config.use_cache = True
    with quiet_progress():
        model.save_pretrained(folder, state_dict=state_dict, seal=False)  # pyright: ignore[reportCallIssue]  # ours
    if training_use_cache is not None:
        model.config.use_cache = training_use_cache
    save_tokenizer(tokenizer, folder)
