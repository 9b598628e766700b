"""State tracking: a row of permutations, and at each the product of all so far. Two elements make it parity.

    (01)  id  (01) (01)         asked: (01) (01) id (01)

A walk over the group of n! permutations, the word problem by which Merrill et al., "The Illusion of State in
State-Space Models" (arXiv 2404.08819) tell apart what recurrences can follow. Trained at one length, tested at longer
ones.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from cottention.benchmarks.quality.cells import Cell
from cottention.benchmarks.quality.tasks import Batch, MadeTask, RowMaker, Task, TaskFiles


def make(cell: Cell, files: TaskFiles) -> Task:
    """State tracking as a task of the study; no files are read."""
    table = product_table(cell.plan.settings["elements"])

    def of_length(length: int) -> RowMaker:
        return lambda rng, rows: tracking_rows(rng, rows, length, table)

    return MadeTask(
        vocab_size=len(table),
        training=of_length(cell.plan.length),
        tests={str(length): of_length(length) for length in cell.plan.settings["test_lengths"]},
        seed=cell.seed,
        batch_size=cell.plan.batch_size,
    )


def product_table(num_elements: int) -> np.ndarray:
    """`[n!, n!]`: the number of the permutation that comes of the row's after the column's; 0 is the identity."""
    permutations = list(itertools.permutations(range(num_elements)))
    number = {permutation: i for i, permutation in enumerate(permutations)}
    return np.array([[number[tuple(a[i] for i in b)] for b in permutations] for a in permutations])


def tracking_rows(rng: np.random.Generator, num_rows: int, length: int, table: np.ndarray) -> Batch:
    """Rows of random permutations, with the product so far as each one's label.

    Args:
        rng: random numbers.
        num_rows: B.
        length: T.
        table: of `product_table`.
    """
    ids = rng.integers(0, len(table), (num_rows, length))
    labels = ids.copy()
    for t in range(1, length):
        labels[:, t] = table[ids[:, t], labels[:, t - 1]]
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels))
