"""A run that ends in its time: the schedule follows the clock, and the number of steps is fitted again and again.

How many steps fit into some minutes is known only when they are over: neighbours come and go, and the first seconds of
a run say little. So the learning rate is a function of the share of the time that has gone, not of the steps, and
training.max_steps is a forecast, renewed every second from how fast the last ones were.

    deadline = Deadline(recipe, lambda: seconds_since_the_run_began)
    deadline.factor(step), deadline.num_steps
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cottention.training.optimizer import linear_schedule
from cottention.training.recipe import Recipe

_HORIZON_S = 20.0  # of the past that the forecast is made from
_BETWEEN_MARKS_S = 1.0
# A few slow steps at the start may take as long as the whole warmup was meant to, and Adam knows no scale before them.
_WARMUP_STEPS = 20
_FINE = 1_000_000  # parts of the run that `linear_schedule` counts as steps


class Deadline(TrainerCallback):
    """The clock of a run with training.minutes; comes before the callbacks that ask for the last step.

    Args:
        recipe: with training.minutes.
        elapsed_s: seconds of the run so far, those of earlier sessions and of its pauses among them.
    """

    def __init__(self, recipe: Recipe, elapsed_s: Callable[[], float]) -> None:
        assert recipe.training.minutes is not None
        self.num_steps = recipe.training.max_steps
        self._total_s = 60 * recipe.training.minutes
        self._warmup = min(1.0, recipe.num_warmup_steps / recipe.training.max_steps)
        self._warmup_steps = min(_WARMUP_STEPS, recipe.num_warmup_steps)
        self._elapsed_s = elapsed_s
        self._marks: deque[tuple[float, int]] = deque()

    def progress(self) -> float:
        """How much of the time has gone, from 0 to 1."""
        return min(1.0, self._elapsed_s() / self._total_s)

    def factor(self, step: int) -> float:
        """Of the learning rate, at update `step` (from 0) if it begins now."""
        planned = linear_schedule(
            round(self.progress() * _FINE), num_warmup_steps=round(self._warmup * _FINE), num_steps=_FINE
        )
        return min(planned, step / self._warmup_steps) if self._warmup_steps else planned

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Forecast from the recipe, until there are steps to count."""
        state.max_steps = max(self.num_steps, state.global_step + 2)
        self._marks = deque([(self._elapsed_s(), state.global_step)])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """End the run when its time is over, else say anew how many steps it will have."""
        now, step = self._elapsed_s(), state.global_step
        since, first = self._marks[0]
        step_s = (now - since) / max(1, step - first)
        left_s = self._total_s - now
        if left_s < step_s / 2:  # one more would end later than the run does now before its time
            self.num_steps = state.max_steps = step
            control.should_training_stop = True
            return
        if now - self._marks[-1][0] < _BETWEEN_MARKS_S and state.max_steps > step + 1:
            return
        self._marks.append((now, step))
        while len(self._marks) > 2 and now - self._marks[1][0] >= _HORIZON_S:
            self._marks.popleft()
        # The loop ends at max_steps before it asks here, so that lies ahead as long as there is time.
        self.num_steps = state.max_steps = step + max(2, round(left_s / step_s))
