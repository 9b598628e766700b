"""Selective copying: symbols at random places of a row of noise, to be told in order at the end of it.

    .  s1  .  .  s2  s3  .  |  ?  ?  ?            asked at the marks: s1 s2 s3

A model must take in the symbols and leave out the noise, which no fixed pattern of distances can do. Described in Gu
and Dao, "Mamba" (arXiv 2312.00752, section 4.1.1) and Poli et al., MAD (arXiv 2403.17844).
"""

from __future__ import annotations

import numpy as np
import torch

from cottention.benchmarks.quality.cells import Cell
from cottention.benchmarks.quality.tasks import Batch, MadeTask, RowMaker, Task, TaskFiles
from cottention.errors import SettingsError
from cottention.files import IGNORE_INDEX

NOISE, MARK, FIRST_SYMBOL = 0, 1, 2


def make(cell: Cell, files: TaskFiles) -> Task:
    """Selective copying as a task of the study; no files are read."""
    vocab_size = cell.plan.settings.get("vocab_size", 32)
    symbols, length = cell.plan.settings["symbols"], cell.plan.length

    def with_symbols(count: int) -> RowMaker:
        return lambda rng, rows: copying_rows(rng, rows, length, count, vocab_size)

    tests = {str(count): with_symbols(count) for count in (symbols // 2, symbols)}
    return MadeTask(
        vocab_size=vocab_size,
        training=with_symbols(symbols),
        tests=tests,
        seed=cell.seed,
        batch_size=cell.plan.batch_size,
    )


def copying_rows(rng: np.random.Generator, num_rows: int, length: int, num_symbols: int, vocab_size: int) -> Batch:
    """Rows of selective copying.

    Args:
        rng: random numbers.
        num_rows: B.
        length: T, the marks included.
        num_symbols: symbols of a row, and marks at its end.
        vocab_size: noise, mark, and the symbols.

    Raises:
        SettingsError: there is no room.
    """
    room = length - num_symbols
    if room < num_symbols:
        raise SettingsError(f"{num_symbols} symbols and as many marks need a row of {2 * num_symbols}; got {length}")
    symbols = rng.integers(FIRST_SYMBOL, vocab_size, (num_rows, num_symbols))
    places = np.sort(rng.random((num_rows, room)).argsort(axis=1)[:, :num_symbols], axis=1)
    ids = np.full((num_rows, length), NOISE)
    np.put_along_axis(ids, places, symbols, axis=1)
    ids[:, room:] = MARK
    labels = np.full((num_rows, length), IGNORE_INDEX)
    labels[:, room:] = symbols
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels))
