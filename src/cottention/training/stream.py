"""The order of the training data as a pure function of the seed: the n-th example of a run is known without the others.

Every pass over the data is a new permutation, and a run is one long stream of examples, cut into micro batches. So a
resumed run continues at its position by arithmetic, and the last batch of a pass is as full as every other.

A run whose windows become longer has a stream of each length, one behind the other, under one numbering. One that hides
fewer and fewer tokens has the share beside each example.

    stream = ExampleStream(windows, num_examples=steps * batch, seed=0)
    stream[1000]     # {"input_ids": ..., "pass_number": 3}
    PhasedStream([stream, ExampleStream(long_windows, num_examples=more, seed=0)])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cottention.data.documents import DocumentWindows
from cottention.data.pair_examples import PairExamples


class ExampleStream(Dataset[dict[str, Any]]):
    """`num_examples` draws from a dataset: permutation after permutation."""

    def __init__(self, dataset: Any, *, num_examples: int, seed: int) -> None:
        """Describe the stream; nothing is read yet.

        Args:
            dataset: sentence pairs, documents, or anything with a length and integer indices; each item is a dict.
            num_examples: length of the stream.
            seed: decides the order.
        """
        self.dataset = dataset
        self.num_examples = num_examples
        self.seed = seed
        self._pass = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]]:
        """Examples of a micro batch, read together: one by one costs many times as much."""
        indices = [self.index_at(position) for position in positions]
        passes = [position // len(self.dataset) for position in positions]
        if isinstance(self.dataset, (PairExamples, DocumentWindows)):
            return self.dataset.examples(np.array(indices), np.array(passes))
        columns = self.dataset[indices]
        rows = zip(*columns.values(), strict=True)
        return [{**dict(zip(columns, row, strict=True)), "pass_number": n} for row, n in zip(rows, passes, strict=True)]

    def index_at(self, position: int) -> int:
        """Row of the dataset that stands at a position of the stream."""
        number, offset = divmod(position, len(self.dataset))
        if number != self._pass:
            self._pass = number
            self._order = np.random.default_rng([self.seed, number]).permutation(len(self.dataset))
        return int(self._order[offset])


class PhasedStream(Dataset[dict[str, Any]]):
    """Streams one behind the other; the part of a run that an example belongs to is its "phase"."""

    def __init__(self, streams: Sequence[ExampleStream]) -> None:
        self.streams = list(streams)
        self._ends = list(accumulate(len(stream) for stream in streams))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]]:
        """Examples of a micro batch, which is of one phase: a phase is a whole number of optimizer steps."""
        phase = next(number for number, end in enumerate(self._ends) if positions[0] < end)
        start = self._ends[phase] - len(self.streams[phase])
        rows = self.streams[phase].__getitems__([position - start for position in positions])
        return [{**row, "phase": phase} for row in rows]


class FallingShares(Dataset[dict[str, Any]]):
    """A stream whose examples carry the share of their tokens that is hidden, as "mlm_probability"."""

    def __init__(
        self, stream: ExampleStream | PhasedStream, *, first: float, last: float, examples_per_step: int
    ) -> None:
        """Describe the stream.

        Args:
            stream: the examples.
            first: share at the first optimizer step.
            last: share at the last one; in between it moves in a straight line.
            examples_per_step: how many examples have one share.
        """
        self.stream = stream
        self.first, self.last = first, last
        self.examples_per_step = examples_per_step
        self.progress: Callable[[], float] | None = None
        """How much of the run is done, from 0 to 1, where a clock and not the number of examples says so."""

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]]:
        """Examples of a micro batch, each with its share."""
        rows = self.stream.__getitems__(positions)
        return [
            {**row, "mlm_probability": self.share_at(position)} for row, position in zip(rows, positions, strict=True)
        ]

    def share_at(self, position: int) -> float:
        """The share of the example at a position of the stream."""
        last_step = (len(self) - 1) // self.examples_per_step
        done = self.progress() if self.progress else position // self.examples_per_step / max(1, last_step)
        return self.first + (self.last - self.first) * done


class PassCollator:
    """Makes the batch of a micro batch; one of long windows becomes several passes of fewer.

    Args:
        collator: makes a batch of examples.
        num_passes: passes of a micro batch, by phase.
    """

    def __init__(self, collator: Callable[[Sequence[dict[str, Any]]], dict[str, Any]], num_passes: Sequence[int]):
        self._collator = collator
        self._num_passes = num_passes

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One batch, or {"passes": [batch, ...]}."""
        num_passes = self._num_passes[rows[0]["phase"]]
        if num_passes == 1:
            return self._collator(rows)
        size = len(rows) // num_passes
        return {"passes": [self._collator(rows[start : start + size]) for start in range(0, len(rows), size)]}


class InOrder(torch.utils.data.Sampler[int]):
    """Positions 0, 1, 2, ...: the stream already is in random order.

    Args:
        length: of the stream.
        start: position to begin at.
        micro_batch_size: positions that belong together.
        process_index: of this process; micro batches go round the processes, the same way in every step.
        num_processes: that read the stream together.
    """

    def __init__(
        self, length: int, *, start: int = 0, micro_batch_size: int = 1, process_index: int = 0, num_processes: int = 1
    ) -> None:
        self._starts = range(start + process_index * micro_batch_size, length, micro_batch_size * num_processes)
        self._size = micro_batch_size

    def __len__(self) -> int:
        return len(self._starts) * self._size

    def __iter__(self) -> Any:
        return (position for start in self._starts for position in range(start, start + self._size))
