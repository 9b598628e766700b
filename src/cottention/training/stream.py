"""The order of the training data as a pure function of the seed: the n-th example of a run is known without the others.

Every pass over the data is a new permutation, and a run is one long stream of examples, cut into micro batches. So a
resumed run continues at its position by arithmetic, and the last batch of a pass is as full as every other.

    stream = ExampleStream(windows, num_examples=steps * batch, seed=0)
    stream[1000]     # {"input_ids": ..., "pass_number": 3}
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class ExampleStream(Dataset[dict[str, Any]]):
    """`num_examples` draws from a dataset: permutation after permutation."""

    def __init__(self, dataset: Any, *, num_examples: int, seed: int) -> None:
        """Describe the stream; nothing is read yet.

        Args:
            dataset: anything with a length and integer indices; each item is a dict.
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
        return {**self.dataset[self.index_at(position)], "pass_number": position // len(self.dataset)}

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]]:
        """Examples of a micro batch, read together: one by one costs many times as much."""
        columns = self.dataset[[self.index_at(position) for position in positions]]
        passes = [position // len(self.dataset) for position in positions]
        rows = zip(*columns.values(), strict=True)
        return [{**dict(zip(columns, row, strict=True)), "pass_number": n} for row, n in zip(rows, passes, strict=True)]

    def index_at(self, position: int) -> int:
        """Row of the dataset that stands at a position of the stream."""
        number, offset = divmod(position, len(self.dataset))
        if number != self._pass:
            self._pass = number
            self._order = np.random.default_rng([self.seed, number]).permutation(len(self.dataset))
        return int(self._order[offset])


class InOrder(torch.utils.data.Sampler[int]):
    """Positions 0, 1, 2, ...: the stream already is in random order."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        return iter(range(self.length))
