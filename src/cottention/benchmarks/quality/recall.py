"""Multi-query associative recall: pairs of a key and a value, then the keys again, at which the values are asked for.

    k1 v1 k2 v2 ... kN vN   .  k2  .  .  kN  k1  .  ...          asked at the second k2: v2, and so on

From its description in Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models"
(arXiv 2312.04927, section 4 and appendix): keys are drawn without repetition, each is asked for once, and the distance
between a pair and its query follows a power law, so that most queries come soon. Differs: what stands between the
queries are symbols of their own, never keys, so that every answer is unambiguous; values are drawn with repetition.

Plain, a key and its value are two tokens. Stacked, they are one token, the sum of two embeddings: what a state can
hold, without what it takes to join neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cottention.benchmarks.quality.cells import Cell
from cottention.benchmarks.quality.tasks import Batch, MadeTask, RowMaker, Task, TaskFiles
from cottention.errors import SettingsError
from cottention.files import IGNORE_INDEX

POWER = 0.01
"""Gap g has a probability proportional to g ** (POWER - 1)."""

BLANK = 0
"""Beside a key that asks, in a stacked token."""


def make(cell: Cell, files: TaskFiles) -> Task:
    """Recall as a task of the study; no files are read."""
    settings: dict[str, Any] = dict(cell.plan.settings)
    vocab_size = settings.get("vocab_size", 512)
    stacked = cell.plan.task == "stacked-mqar"

    def with_pairs(pairs: int) -> RowMaker:
        return lambda rng, rows: recall_rows(rng, rows, cell.plan.length, pairs, vocab_size, stacked=stacked)

    return MadeTask(
        vocab_size=vocab_size,
        training=with_pairs(settings["pairs"]),
        tests={str(pairs): with_pairs(pairs) for pairs in settings["test_pairs"]},
        seed=cell.seed,
        batch_size=cell.plan.batch_size,
        num_scored=settings.get("num_scored", 512),
    )


def recall_rows(
    rng: np.random.Generator, num_rows: int, length: int, num_pairs: int, vocab_size: int, *, stacked: bool
) -> Batch:
    """Rows of recall.

    Args:
        rng: random numbers.
        num_rows: B.
        length: T; has room for the pairs, and for a query of each behind them.
        num_pairs: N.
        vocab_size: symbol 0 is the blank; then an eighth of fillers, and as many keys as values.
        stacked: whether a key and its value are one token, `[B, T, 2]`.

    Raises:
        SettingsError: there is no room, or there are too few keys.
    """
    fillers = max(1, vocab_size // 8)
    keys = (vocab_size - 1 - fillers) // 2
    first_key, first_value = 1 + fillers, 1 + fillers + keys
    begin = num_pairs if stacked else 2 * num_pairs
    room = length - begin
    if room < num_pairs or keys < num_pairs:
        raise SettingsError(
            f"{num_pairs} pairs need as many keys and a row of {begin + num_pairs} tokens; got {keys} and {length}"
        )
    key = first_key + _distinct(rng, num_rows, num_pairs, keys)  # [B, N]
    value = first_value + rng.integers(0, keys, (num_rows, num_pairs))
    query = begin + _places(rng, num_rows, num_pairs, room)
    ids = rng.integers(1, 1 + fillers, (num_rows, length))
    labels = np.full((num_rows, length), IGNORE_INDEX)
    np.put_along_axis(ids, query, key, axis=1)
    np.put_along_axis(labels, query, value, axis=1)
    if stacked:
        ids[:, :begin] = key
        beside = np.full((num_rows, length), BLANK)
        beside[:, :begin] = value
        ids = np.stack([ids, beside], axis=-1)
    else:
        ids[:, 0:begin:2], ids[:, 1:begin:2] = key, value
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels))


def _distinct(rng: np.random.Generator, num_rows: int, count: int, among: int) -> np.ndarray:
    """`[num_rows, count]` numbers below `among`, none twice in a row."""
    return rng.random((num_rows, among)).argsort(axis=1)[:, :count]


def _places(rng: np.random.Generator, num_rows: int, count: int, room: int) -> np.ndarray:
    """`[num_rows, count]` different places in the room, early ones likelier by the power law, in random order.

    The largest of log p + Gumbel noise are a draw without replacement by p.
    """
    log_p = (POWER - 1) * np.log(np.arange(1, room + 1))
    noisy = log_p + rng.gumbel(size=(num_rows, room))
    return noisy.argsort(axis=1)[:, ::-1][:, :count].copy()
