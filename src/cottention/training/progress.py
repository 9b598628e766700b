"""What a run shows while it works, and how it is stopped.

`ProgressBar` draws a bar with loss, tokens per second and the remaining time on stderr; where stderr is no terminal it
logs a line now and then instead. `RunControl` turns SIGTERM, Ctrl-C and their like into one last checkpoint, and adds
an evaluation and a log line at the last step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import harmonic_mean
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cottention.logging import get_logger
from cottention.stopping import handlers
from cottention.training.metrics import short_number
from cottention.training.recipe import Recipe

_SECONDS_BETWEEN_LINES = 30.0
_SPEEDS_KEPT = 20  # logged ones whose mean says how long the rest takes: one slow moment is no forecast

logger = get_logger(__name__)


class ProgressBar(TrainerCallback):
    """Bar on a terminal, log lines elsewhere; process 0 only."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, str] = {}
        self._speeds: deque[float] = deque(maxlen=_SPEEDS_KEPT)
        self._next_line = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Open the bar."""
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True
            )
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.total = state.max_steps  # a forecast, where the clock ends the run
            self._bar.update(state.global_step - self._bar.n)

    def on_log(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_others: Any,
    ) -> None:
        """Take over the newest figures."""
        if "loss" in logs:
            self._shown["loss"] = f"{logs['loss']:.3f}"
            self._shown["tokens/s"] = short_number(logs["tokens_per_s"])
            self._speeds.append(max(logs["tokens_per_s"], 0.1))
        if "val_loss" in logs:
            self._shown["held-out"] = f"{logs['val_loss']:.3f} at step {state.global_step}"
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)
        elif state.is_world_process_zero and "loss" in logs and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            left = self._recipe.tokens_after(state.max_steps) - self._recipe.tokens_after(state.global_step)
            left_s = left / harmonic_mean(self._speeds)  # each lap has as many tokens
            values = ", ".join(f"{name} {value}" for name, value in self._shown.items())
            logger.info("step %d of %d: %s, %s left", state.global_step, state.max_steps, values, duration(left_s))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class RunControl(TrainerCallback):
    """Decides about the last step, whether it is the recipe's or a signal's."""

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        """The signal that ended the run early."""
        self._group: Any = None  # of torch.distributed, where several processes train

    def agree_among(self, num_processes: int) -> None:
        """Let a signal that reaches one process stop all of them, after the same step."""
        # On the CPU: a flag on a GPU could only be read by waiting for the step's kernels.
        self._group = torch.distributed.new_group(range(num_processes), backend="gloo")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Ask for what the last step needs."""
        self._agree()
        if state.global_step >= state.max_steps:
            self.stopped_by = None  # came too late to matter
            control.should_log = control.should_evaluate = control.should_save = True
        elif self.stopped_by is not None:
            # No log line here: an uninterrupted run would not have one either.
            control.should_training_stop = control.should_save = True

    def _agree(self) -> None:
        if self._group is not None:
            number = torch.tensor(self.stopped_by or 0)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self._group)
            self.stopped_by = signal.Signals(int(number)) if number else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take a signal that asks to end as a wish to stop after the step; the second one acts as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        owner = os.getpid()
        before = handlers()

        def ask_to_stop(number: int, _frame: FrameType | None) -> None:
            if os.getpid() != owner:
                return  # a process that loads data; Ctrl-C reaches it too, and its work is still wanted
            self.stopped_by = signal.Signals(number)
            logger.info("%s: saving a checkpoint after this step", self.stopped_by.name)
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, ask_to_stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def duration(seconds: float) -> str:
    """8 s, 4 min 10 s, 3 h 20 min, 5 d 2 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
