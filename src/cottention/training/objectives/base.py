"""What every way of training answers, and what they share.

The loop asks an objective for the number of targets of a step, for the loss of each pass and its parts, and for what a
checkpoint has to hold beside the weights. A pretraining objective also turns opened text into examples and a model.

    class Mine(PretrainingObjective): ...
    OBJECTIVES["mine"] = Mine
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.data.documents import DocumentWindows
from cottention.data.pair_examples import PairExamples
from cottention.generation.loading import Kind
from cottention.training.held_out import HeldOut, count_targets
from cottention.training.held_out_carried import CarriedHeldOut
from cottention.training.lanes import LaneStream
from cottention.training.processes import Processes
from cottention.training.recipe import Recipe
from cottention.training.stream import ExampleStream, FallingShares, PhasedStream

_IN_FINGERPRINT = 64

Examples = Dataset | PairExamples | DocumentWindows
Stream = ExampleStream | PhasedStream | FallingShares | LaneStream


class Objective(ABC):
    """How one pass is scored."""

    losses: tuple[str, ...] = ("loss",)
    """The loss, and its parts by the names that the model gives them and a line of metrics has."""

    @abstractmethod
    def num_targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How many predictions one pass is scored on; a step is divided by the sum over its passes and processes."""

    @abstractmethod
    def loss(self, model: Any, batch: Mapping[str, Tensor], num_targets: Tensor | None) -> dict[str, Tensor]:
        """Forward over one pass: every name of `losses`, divided by the targets of the whole step."""

    def begin(self, model: PreTrainedModel, device: Any, rank: int, num_ranks: int) -> None:
        """Make what is kept from step to step, on this process; most keep nothing."""
        return

    def state_to_save(self, processes: Processes) -> tuple[str, dict[str, Tensor]] | None:
        """What a checkpoint holds of it, all processes' together: a file's name and its tensors; called on all."""
        return None

    def take_up(self, checkpoint: Path) -> None:
        """Go on from what `state_to_save` gave.

        Raises:
            CheckpointError: it is not there, or of another model.
        """
        return


class OpenedText(NamedTuple):
    """Tokens of documents, before an objective makes examples of them."""

    tokenizer: PreTrainedTokenizerBase
    """What made them."""
    train: Dataset
    """To train on."""
    held_out: Dataset
    """Of documents that are not trained on."""


@dataclass(frozen=True, kw_only=True)
class PreparedText:
    """Everything that training needs to know about text."""

    objective: type[PretrainingObjective]
    """What the examples were made for."""
    tokenizer: PreTrainedTokenizerBase
    """Trained for this run, or the recipe's."""
    train: Examples
    """Windows, sentence pairs or documents to train on."""
    long: Dataset | PairExamples | None
    """Those of the last part of the run, where they are longer."""
    collator: Any
    """Turns examples of the stream into a batch."""
    held_out: HeldOut | CarriedHeldOut
    """Measures a model on the held-out text, data.eval_tokens at most."""

    def stream(self, recipe: Recipe) -> Stream:
        """All examples of a run, in their order."""
        return self.objective(recipe).stream(self)

    def training_collator(self, recipe: Recipe) -> Any:
        """Turns a micro batch of the stream into one batch, or into as many as its longer examples need."""
        return self.objective(recipe).collator(self)

    def epochs_after(self, step: int, recipe: Recipe) -> float:
        """How often so many steps have read the text."""
        return self.objective(recipe).epochs_after(step, self)

    def fingerprint(self) -> str:
        """Name the examples to train on by their number and a sample of them: a run may go on with no others."""
        digest = hashlib.blake2b(digest_size=16)
        for examples in (self.train, self.long):
            if examples is not None:
                digest.update(str(len(examples)).encode())
                for ids in _sample(examples, _IN_FINGERPRINT):
                    digest.update(np.asarray(ids, dtype=np.int64).tobytes())
        return digest.hexdigest()


class PretrainingObjective(Objective):
    """A way of training that a recipe asks for.

    Args:
        recipe: all choices.
    """

    reads_pairs = False
    """Whether examples are made of sentence pairs, not of tokens."""
    reads_token_corpora = False
    """Whether data.source may be tokens that were made before."""

    laid_out_by_steps: tuple[str, ...] = ()
    """Settings of data that, where they are given, make the order of the text depend on training.max_steps."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    @property
    @abstractmethod
    def model_kind(self) -> Kind:
        """What its models are to those who open them."""

    @abstractmethod
    def random_labels(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Labels for windows of any tokens `[B, T]`, as many as a batch has: what a step costs is tried with them."""

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether some parameters never get a gradient; looking for them costs time at each step."""
        return False

    @abstractmethod
    def new_model(self, fields: Mapping[str, Any]) -> PreTrainedModel:
        """The freshly initialised model of a config with these fields."""

    @abstractmethod
    def examples(self, opened: Any) -> PreparedText:
        """Cut what was opened into examples.

        Args:
            opened: `OpenedText`, or `PairText` where `reads_pairs`.

        Raises:
            DataError: the text is too short.
            SettingsError: the tokenizer lacks a token.
        """

    def stream(self, text: PreparedText) -> Stream:
        """All examples of a run, in their order."""
        training = self.recipe.training
        num_examples = training.max_steps * training.global_batch_size
        return ExampleStream(text.train, num_examples=num_examples, seed=training.seed)

    def collator(self, text: PreparedText) -> Any:
        """Turns a micro batch into a batch, or into {"passes": [batch, ...]}."""
        return text.collator

    def epochs_after(self, step: int, text: PreparedText) -> float:
        """How often so many steps have read the text."""
        return step / len(text.train) * self.recipe.training.global_batch_size

    def num_targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Tokens to predict."""
        return count_targets(batch, self.recipe.arch)

    def loss(self, model: Any, batch: Mapping[str, Tensor], num_targets: Tensor | None) -> dict[str, Tensor]:
        """What the model makes of a pass."""
        return self._named(model(**batch, num_items_in_batch=num_targets))

    def _named(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: outputs[name] for name in self.losses}


def spread(examples: Any, most: int) -> Any:
    """At most so many examples, evenly spread over all."""
    if len(examples) <= max(1, most):
        return examples
    rows = np.linspace(0, len(examples) - 1, max(1, most)).round().astype(int)
    return examples.select(rows) if isinstance(examples, Dataset) else examples.restricted(rows)


def _sample(examples: Examples, most: int) -> Iterator[Any]:
    """Tokens of some examples."""
    some = spread(examples, most)
    if isinstance(some, PairExamples):
        for first, second in some.raw(np.arange(len(some))):
            yield from (first, second)
    else:
        for index in range(len(some)):
            yield some[index]["input_ids"]
