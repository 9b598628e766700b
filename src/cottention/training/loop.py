"""The training loop: next batch, passes, backward, clip, step, log, evaluate, save, stop at a signal.

`TrainingLoop.train` is the loop and reads from top to bottom. Pretraining (`trainer.py`), fine-tuning
(`finetune_trainer.py`) and distillation (`convert/distil_train.py`) say what a loss is and what is measured and saved.
Callbacks (transformers' `TrainerCallback`) watch, and change `state.max_steps` and `control`: a clock, a progress bar,
a signal, TensorBoard. Several processes share a step as `processes.py` says.

A step's micro batches are read before its first pass, because each pass is divided by the targets of the whole step: so
accumulation does not change the gradient. A micro batch may consist of several passes.

    class Mine(TrainingLoop): ...
    Mine(model, arguments, stream=stream, collator=collator, callbacks=[RunControl()]).train()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cottention.training.parallel import whole
from cottention.training.processes import Processes, to_device
from cottention.training.stream import InOrder


class TrainingLoop(ABC):
    """Trains one model; a subclass says how.

    Args:
        model: to train; it is moved to the device.
        arguments: number of steps, size of a micro batch, micro batches of a step, what is due how often, clipping.
        processes: that train together; None: those that the arguments have joined.
        stream: examples by their position, in the order in which they are read.
        collator: makes a batch of some examples, or {"passes": [batch, ...]}.
        callbacks: told in this order.
    """

    stepwise = True
    """Whether `arguments` say at which steps to log, evaluate and save; else callbacks alone do."""
    drops_out = True
    """Whether the model is in training mode, with its dropout."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        *,
        processes: Processes | None = None,
        stream: Any,
        collator: Any,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.args = arguments
        self.processes = processes or Processes.joined(arguments)
        self.model: Any = model.to(self.processes.device)  # pyright: ignore[reportArgumentType]
        self.train_dataset = stream
        self.collator = collator
        self.callbacks = list(callbacks)
        self.control = TrainerControl()
        self.state = TrainerState(
            is_local_process_zero=self.processes.is_first, is_world_process_zero=self.processes.is_first
        )
        self._grad_norm: Tensor | float = 0.0

    def train(self, checkpoint: Path | None = None) -> None:
        """Train until the last step, or until a callback asks to stop.

        Args:
            checkpoint: to go on from; None: from the start.
        """
        self.optimizer = self.create_optimizer()
        self.lr_scheduler = self.create_scheduler(self.optimizer, self.args.max_steps)
        if checkpoint is not None:
            self.load_state(checkpoint)
        state, control = self.state, self.control
        state.max_steps = self.args.max_steps
        model = self.processes.wrap(self.model, leaves_parameters_unused=bool(self.args.ddp_find_unused_parameters))
        model.train(self.drops_out)
        batches = self.batches_from(state.global_step)
        if checkpoint is not None:
            self.load_random_state(checkpoint)
        control.should_training_stop = False
        self.tell("on_train_begin")
        # Callbacks may change max_steps at any time: a run that ends by the clock knows its number of steps last.
        while state.global_step < state.max_steps and not control.should_training_stop:
            micro_batches = islice(batches, self.args.gradient_accumulation_steps)
            passes = [one for batch in micro_batches for one in batch.get("passes", [batch])]
            num_targets = self.num_targets(passes)
            for number, one in enumerate(passes, start=1):
                with self.processes.exchange(model, now=number == len(passes)):
                    self.training_step(model, one, num_targets)
            self._get_grad_norm(model)
            self.optimizer.step()
            learning_rate = self.lr_scheduler.get_last_lr()[0]
            self.lr_scheduler.step()
            self.optimizer.zero_grad()

            state.global_step += 1
            state.epoch = state.global_step / self.args.max_steps
            self.say_what_is_due()
            self.tell("on_step_end")
            if control.should_log:
                self.log_step(learning_rate)
            if control.should_evaluate:
                self.evaluate()
            if control.should_save:
                self.save_checkpoint()
                self.tell("on_save")
        self.tell("on_train_end")

    # What training is: a subclass says

    @abstractmethod
    def create_optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer of this run."""

    @abstractmethod
    def create_scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
        """Make the schedule of the learning rate, moved on behind each of `num_steps` updates."""

    def num_targets(self, passes: Sequence[Any]) -> Tensor | None:
        """How many predictions a step is scored on, in all processes; None where each pass is a mean of its own."""
        return None

    @abstractmethod
    def compute_loss(self, model: nn.Module, batch: Any, num_targets: Tensor | None) -> Tensor:
        """Forward over one pass, to one number."""

    @abstractmethod
    def watch(self, loss: Tensor) -> None:
        """Look at the loss of a pass, behind its backward pass.

        Raises:
            CottentionError: training on makes no sense.
        """

    def log_step(self, learning_rate: float) -> None:
        """Say how training goes; most say nothing."""
        return

    def evaluate(self) -> None:
        """Measure the model; a loop that never asks for it needs none of these four."""
        raise NotImplementedError

    def save_checkpoint(self) -> None:
        """Write down all that the run goes on from."""
        raise NotImplementedError

    def load_state(self, checkpoint: Path) -> None:
        """Take up weights, optimizer, schedule and number of steps."""
        raise NotImplementedError

    def load_random_state(self, checkpoint: Path) -> None:
        """Take up the states of the random generators, right before the first step."""
        raise NotImplementedError

    # What a step consists of

    def batches_from(self, step: int) -> Iterator[dict[str, Any]]:
        """This process's micro batches from a step on, on the device."""
        size = self.args.per_device_train_batch_size
        num_read = step * size * self.args.gradient_accumulation_steps * self.processes.num_readers
        mine = InOrder(
            len(self.train_dataset),
            start=num_read,
            micro_batch_size=size,
            process_index=self.processes.reader,
            num_processes=self.processes.num_readers,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_size=size,
            sampler=mine,
            collate_fn=self.collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        read = iter(loader)  # here and not at the first batch: it draws a number, before a checkpoint's are put back
        return (to_device(batch, self.processes.device) for batch in read)

    def training_step(self, model: nn.Module, batch: Any, num_targets: Tensor | None) -> Tensor:
        """Forward and backward over one pass."""
        loss = self.compute_loss(model, batch, num_targets)
        loss.backward()
        loss = loss.detach()
        self.watch(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module) -> Tensor | float:
        """Measure the gradient, and clip it where that is wanted."""
        if self.args.max_grad_norm > 0:
            norm = nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        else:
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
        self._grad_norm = whole(norm)
        return self._grad_norm

    def say_what_is_due(self) -> None:
        """Set what the arguments ask for behind this step; callbacks may still change it."""
        step = self.state.global_step
        every = (self.args.logging_steps, self.args.eval_steps, self.args.save_steps)
        self.control.should_log, self.control.should_evaluate, self.control.should_save = (
            bool(self.stepwise and number and step % number == 0) for number in every
        )
        self.control.should_training_stop = step >= self.state.max_steps

    def tell(self, event: str, **more: Any) -> None:
        """Call a method of every callback."""
        for callback in self.callbacks:
            getattr(callback, event)(
                self.args,
                self.state,
                self.control,
                model=self.model,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_scheduler,
                **more,
            )

    def add_callback(self, callback: TrainerCallback) -> None:
        """Tell it too, last."""
        self.callbacks.append(callback)

    def remove_callback(self, kind: type[TrainerCallback]) -> None:
        """Tell those of a class no longer."""
        self.callbacks = [callback for callback in self.callbacks if not isinstance(callback, kind)]
