"""What a task is to the study: batches by number, a loss at labelled positions, scores on one of two splits.

Batch `step` of a seed is the same for every variant, wherever a run that was interrupted goes on. The splits "choose"
and "score" are never trained on, and differ: a learning rate is chosen on the one, what is reported is the other's.

    task = make_task(cell, TaskFiles(texts=Path("../shared/data/lm"), work=Path("runs/quality")))
    batch = task.batch(step=0)
    scores = task.scores(model, "choose")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cottention.benchmarks.quality.cells import Cell
from cottention.files import IGNORE_INDEX
from cottention.models import CottentionGPTForCausalLM
from cottention.models.fused_loss import head_cross_entropy

SPLITS = ("train", "choose", "score")


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what is to be told at each.

    Attributes:
        inputs: `[B, T]`; `[B, T, 2]` where a token is two symbols, whose embeddings are added.
        labels: `[B, T]`, IGNORE_INDEX where nothing is asked.
        goes_on: whether the rows continue those of the batch before; None: each stands alone, and no state is kept.
    """

    inputs: Int[Tensor, "B T"] | Int[Tensor, "B T 2"]
    labels: Int[Tensor, "B T"]
    goes_on: bool | None = None

    def split(self, num_rows: int) -> list[tuple[float, Batch]]:
        """Parts of so many rows at most, with each one's share of the labels."""
        asked = int((self.labels != IGNORE_INDEX).sum())
        pairs = zip(self.inputs.split(num_rows), self.labels.split(num_rows), strict=True)
        return [(int((labels != IGNORE_INDEX).sum()) / asked, Batch(inputs, labels)) for inputs, labels in pairs]


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """Where a task finds what it reads, and may keep what it makes of it."""

    texts: Path
    work: Path


class Task(Protocol):
    """One way of asking a model."""

    vocab_size: int

    def batch(self, step: int) -> Batch:
        """What is trained on at a step."""
        ...

    def scores(self, model: CottentionGPTForCausalLM, split: str) -> dict[str, Any]:
        """Plain numbers; "loss", nats of a label, is what a sweep chooses by."""
        ...

    def data(self) -> str:
        """What it was read from, where that is not the task's own making."""
        ...


_MAKERS = {
    "text": "language",
    "mqar": "recall",
    "stacked-mqar": "recall",
    "copying": "copying",
    "permutations": "tracking",
}
"""In which file the maker of a task is: `make(cell, files)`."""


def make_task(cell: Cell, files: TaskFiles) -> Task:
    """The task of a cell, with its data."""
    module = import_module(f"cottention.benchmarks.quality.{_MAKERS[cell.plan.task]}")
    return module.make(cell, files)


def hidden_states(model: CottentionGPTForCausalLM, inputs: Tensor, **settings: Any) -> Any:
    """The output of the blocks; symbols of one token are added up."""
    if inputs.dim() == 2:
        return model.transformer(inputs, **settings)
    return model.transformer(inputs_embeds=model.transformer.wte(inputs).sum(-2), **settings)


def labelled_loss(model: CottentionGPTForCausalLM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean nats of the labels; nothing is computed where there is none."""
    asked = labels != IGNORE_INDEX
    return head_cross_entropy(model.lm_head, hidden[asked], labels[asked])


RowMaker = Callable[[np.random.Generator, int], Batch]


class MadeTask:
    """A task whose rows are made as they are needed, no two alike.

    Args:
        vocab_size: symbols.
        training: makes a number of rows.
        tests: likewise, by the name under which its accuracy is reported; the first is what a sweep chooses by.
        seed: of the training rows.
        batch_size: rows of a step.
        num_scored: rows of each test.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        training: RowMaker,
        tests: dict[str, RowMaker],
        seed: int,
        batch_size: int,
        num_scored: int = 512,
    ) -> None:
        self.vocab_size = vocab_size
        self._training, self._tests = training, tests
        self._seed, self._batch_size, self._num_scored = seed, batch_size, num_scored

    def data(self) -> str:
        """Nothing is read."""
        return "made"

    def batch(self, step: int) -> Batch:
        """New rows, the same for every variant."""
        return self._training(_generator("train", self._seed, step), self._batch_size)

    @torch.no_grad()
    def scores(self, model: CottentionGPTForCausalLM, split: str) -> dict[str, Any]:
        """Accuracy of each test, and the mean loss of those rows that are as in training."""
        accuracies, device = {}, model.device
        for i, (name, make) in enumerate(self._tests.items()):
            right = asked = 0
            for part in range(self._num_scored // 64):
                batch = make(_generator(split, i, part), 64)
                labels = batch.labels.to(device)
                logits = model.lm_head(hidden_states(model, batch.inputs.to(device), use_cache=False)[0])
                is_asked = labels != IGNORE_INDEX
                right += int((logits.argmax(-1) == labels)[is_asked].sum())
                asked += int(is_asked.sum())
            accuracies[name] = right / asked
        alike = self._training(_generator(split, len(self._tests), 0), 256)
        hidden = hidden_states(model, alike.inputs.to(device), use_cache=False)[0]
        return {"loss": labelled_loss(model, hidden, alike.labels.to(device)).item(), "accuracy": accuracies}


def _generator(split: str, *numbers: int) -> np.random.Generator:
    """Random numbers of a split; numpy's are the same on every machine."""
    return np.random.default_rng([SPLITS.index(split), *numbers])
