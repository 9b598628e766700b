"""What a run will cost, found out without beginning it: nothing is written.

Of a pretraining nothing is read either. The model is built; one pass over random tokens, forward and backward, and one
step of the optimizer are timed here and now, a few times after the first. Of a fine-tuning the rows are read, since
their number decides the steps, and its first steps are timed. From these come

    memory      16 bytes a parameter (float32 weights, gradients, two moments of AdamW), and what the forward pass keeps
                for the backward pass of a micro batch, counted tensor by tensor; the most of the batches seen
    minutes     steps x (passes of a step x time of a pass + time of the optimizer), without evaluations and checkpoints

Both are of one process on this machine, which may be busier or idler tomorrow.

    print(dry_run(load_recipe("quickstart_gpt")).described())
    run = task_run("runs/bert/model", task="cola", data="glue/", output_dir="runs/glue", settings=FinetuneSettings())
    print(dry_run_finetuning(run, seeds=[1, 2, 3]).described())
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from cottention.data.arrow_cache import temporary_cache
from cottention.training.arguments import compute_type
from cottention.training.finetuning import FinetuneRun, opened
from cottention.training.objectives import objective_of
from cottention.training.optimizer import build_optimizer
from cottention.training.pretraining import build_model
from cottention.training.progress import duration
from cottention.training.recipe import Recipe
from cottention.training.recipe_files import replace_settings

_BYTES_A_PARAMETER = 16
_TIMES = 3
_FIRST_STEPS = 9  # of a fine-tuning, whose batches are of different lengths
_LONG_ENOUGH_S = 10.0  # of timing; a slow pass needs no second look
# The first sign that is in a parameter's name says which part it belongs to.
_PARTS = (
    ("head", ("lm_head.", "cls.", "pooler.", "classifier.", "score.")),
    ("norms", ("LayerNorm.", "ln_")),
    ("embeddings", ("wte.", "embeddings.")),
    ("attention", ("attn.", "attention.")),
    ("feed-forward", ("mlp.", "intermediate.", "output.")),
)


@dataclass(frozen=True, kw_only=True)
class _Cost:
    """What any training costs."""

    parameters: dict[str, int]
    """Of each part; a matrix that two parts share is counted at the first."""
    state_bytes: int
    """Weights, gradients and moments."""
    activation_bytes: int
    """What a micro batch keeps for its backward pass."""
    steps: int
    """Updates of one training."""
    step_s: float
    """Time of an update on this machine."""
    device: str
    """Where it was timed."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def run_s(self) -> float:
        """Time of all updates."""
        return self.steps * self.step_s

    def as_dict(self) -> dict[str, Any]:
        """The same in plain types, for JSON."""
        values = dataclasses.asdict(self)
        return {**values, "total_parameters": self.total, "run_s": self.run_s}

    def _described(self, *, training: str, batch: str, timed: str, without: str) -> str:
        parts = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        needed = self.state_bytes + self.activation_bytes
        state, kept = _size(self.state_bytes), _size(self.activation_bytes)
        return (
            f"parameters: {self.total:,} ({parts})\n"
            f"memory: about {_size(needed)} (weights, gradients and optimizer {state}, a {batch} {kept}), beside "
            "Python and its libraries\n"
            f"training: {training}\n"
            f"time: about {duration(self.run_s)} in one process on this {self.device} ({self.step_s:.3g} s a step, "
            f"timed with {timed}), without {without}\n"
            "nothing was written"
        )


@dataclass(frozen=True, kw_only=True)
class DryRun(_Cost):
    """What a pretraining will be."""

    tokens: int
    """Tokens that the updates read, at most; where windows become longer, an update's time is by its tokens."""

    def described(self) -> str:
        """Some lines for people."""
        return self._described(
            training=f"{self.steps:,} steps, {self.tokens:,} tokens at most",
            batch="micro batch",
            timed="random tokens",
            without="evaluations and checkpoints",
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneDryRun(_Cost):
    """What a fine-tuning will be; `steps` are those of a seed."""

    title: str
    """The task, or the file of the rows."""
    num_rows: dict[str, int]
    """Examples of each split."""
    batch_size: int
    """Rows of a step."""
    epochs: int
    """Passes over the training rows."""
    num_seeds: int
    """Trainings."""

    @property
    def run_s(self) -> float:
        """Time of all updates of all seeds."""
        return self.num_seeds * super().run_s

    def described(self) -> str:
        """Some lines for people."""
        rows = ", ".join(f"{split} {count:,}" for split, count in self.num_rows.items())
        cost = self._described(
            training=(
                f"{self.steps:,} steps of {self.batch_size} rows a seed (epochs: {self.epochs}), "
                f"{self.num_seeds * self.steps:,} in all (seeds: {self.num_seeds})"
            ),
            batch="batch",
            timed="the first rows",
            without="measuring and saving",
        )
        return f"rows of {self.title}: {rows}\n{cost}"


def dry_run(recipe: Recipe) -> DryRun:
    """Find out what a run of this recipe costs here.

    Args:
        recipe: all choices; its text is not looked at, and a compiled model is timed uncompiled.

    Raises:
        MemoryError, RuntimeError: not even one window fits.
    """
    recipe = replace_settings(recipe, {"training.compile": False})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng():
        set_seed(recipe.training.seed)
        model = build_model(recipe).to(device).train()  # pyright: ignore[reportArgumentType]  # as in loading.py
        # A window at a time costs a CPU what many do; a GPU is only full with all of them.
        num_windows = recipe.training.micro_batch_size if device.type == "cuda" else 1
        pass_s, optimizer_s, kept = _measure(recipe, model, num_windows, device)
    training = recipe.training
    step_s = pass_s * training.global_batch_size / num_windows + optimizer_s
    if training.minutes is not None:  # then max_steps is a forecast
        recipe = replace_settings(recipe, {"training.max_steps": max(1, round(60 * training.minutes / step_s))})
        training = recipe.training
    tokens = recipe.tokens_after(training.max_steps)
    parameters = _parameters(model)
    return DryRun(
        parameters=parameters,
        state_bytes=_BYTES_A_PARAMETER * sum(parameters.values()),
        activation_bytes=kept * training.micro_batch_size // num_windows,
        steps=training.max_steps,
        tokens=tokens,
        # Longer windows at the end of a run take longer by their tokens.
        step_s=step_s * tokens / (training.max_steps * recipe.tokens_per_step),
        device="GPU" if device.type == "cuda" else "CPU",
    )


def dry_run_finetuning(run: FinetuneRun, *, seeds: Sequence[int], overwrite: bool = False) -> FinetuneDryRun:
    """Find out what a fine-tuning costs here.

    Args:
        run: what would be trained, and where: a run of other settings is refused there.
        seeds: one training each.
        overwrite: a run that is there would be deleted.

    Raises:
        CottentionError: what the run itself would raise.
        MemoryError, RuntimeError: a batch does not fit.
    """
    with (
        temporary_cache(),
        tempfile.TemporaryDirectory() as folder,
        opened(run, seeds=seeds, overwrite=overwrite) as (runs, _),
        torch.random.fork_rng(),
    ):
        trainer = runs.trainer(seeds[0], Path(folder))
        with _counting(trainer.model) as kept:
            watch = _FirstSteps(kept)
            trainer.add_callback(watch)
            trainer.train()
    parameters = _parameters(trainer.model)
    return FinetuneDryRun(
        title=runs.title,
        num_rows=runs.description["num_rows"],
        batch_size=trainer.args.per_device_train_batch_size,
        epochs=trainer.settings.epochs,
        num_seeds=len(seeds),
        parameters=parameters,
        state_bytes=_BYTES_A_PARAMETER * sum(parameters.values()),
        activation_bytes=watch.kept_bytes,
        steps=trainer.args.max_steps,
        step_s=watch.step_s,
        device="GPU" if trainer.processes.device.type == "cuda" else "CPU",
    )


class _FirstSteps(TrainerCallback):
    """Times the first steps of a training, then stops it; nothing is measured or saved."""

    def __init__(self, kept: dict[int, int]) -> None:
        self.kept_bytes = 0
        self._kept = kept
        self._ends: list[float] = []  # the start first

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Begin to count."""
        self._ends.append(time.perf_counter())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Count; ask to stop."""
        self._ends.append(time.perf_counter())
        self.kept_bytes = max(self.kept_bytes, sum(self._kept.values()))
        self._kept.clear()
        control.should_evaluate = control.should_save = False
        enough = len(self._ends) > _FIRST_STEPS or self._ends[-1] - self._ends[0] > _LONG_ENOUGH_S
        control.should_training_stop = control.should_training_stop or enough

    @property
    def step_s(self) -> float:
        """The mean of a step; without the first, which makes the moments, where there are others."""
        ends = self._ends[1:] if len(self._ends) > 2 else self._ends
        return (ends[-1] - ends[0]) / (len(ends) - 1)


def _measure(
    recipe: Recipe, model: PreTrainedModel, num_windows: int, device: torch.device
) -> tuple[float, float, int]:
    """Seconds of a pass and of an update, and the bytes that a pass keeps."""
    batch = _random_batch(recipe, num_windows, device)
    optimizer = build_optimizer(model, recipe.optimizer)
    bf16 = compute_type(recipe, device) == torch.bfloat16

    def run_pass() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()

    with _counting(model) as kept:
        run_pass()
    pass_s = _seconds(run_pass, device)
    optimizer.step()  # makes the moments
    return pass_s, _seconds(optimizer.step, device), sum(kept.values())


@contextmanager
def _counting(model: PreTrainedModel) -> Iterator[dict[int, int]]:
    """Where memory lies that passes inside keep for their backward pass, beside the weights, and its bytes."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The mean of some times, few where each is long."""
    started, elapsed_s, count = time.perf_counter(), 0.0, 0
    while count < _TIMES and elapsed_s < _LONG_ENOUGH_S:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        elapsed_s = time.perf_counter() - started
        count += 1
    return elapsed_s / count


def _random_batch(recipe: Recipe, num_windows: int, device: torch.device) -> dict[str, Tensor]:
    """Full windows of any tokens, as many of them hidden as the recipe hides."""
    shape = (num_windows, recipe.data.sequence_length)
    input_ids = torch.randint(1, recipe.model.vocab_size, shape, device=device)
    return {"input_ids": input_ids, **objective_of(recipe).random_labels(input_ids)}


def _parameters(model: PreTrainedModel) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = next((part for part, signs in _PARTS if any(sign in name for sign in signs)), "other")
        counts[part] += parameter.numel()
    order = ("embeddings", "attention", "feed-forward", "norms", "head", "other")
    return {part: counts[part] for part in order if counts[part]}


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
