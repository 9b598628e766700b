"""Sentence pairs to next-sentence examples: half of the seconds are exchanged for one of another document, on the fly.

Rows of the pairs hold `first` and `second` (ids without special tokens) and `document`; the rows of a document lie
together. What happens to a row follows from seed, pass over the data and row number alone, so any number of workers and
processes makes the same examples, and a run may stop and go on anywhere.

The exchanged second is that of a row of another document, so never the true one nor a neighbour. True pairs fill their
window, while two unrelated parts would be of any length together: a model could tell them apart by counting tokens. So
of sixteen rows drawn, the one whose second is nearest in length to the true one is taken. Should its text be the same
as that of the true one (a sentence that occurs twice), the pair counts as true.

    examples = PairExamples([pairs], max_length=128, seed=0)
    examples.examples(np.array([3, 14]), np.array([0, 0]))
    # [{"first": ..., "second": ..., "is_random": True, "row": 3, "pass_number": 0}, ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets

from cottention.data.tokenization import arrow_batches
from cottention.errors import DataError, SettingsError, did_you_mean

NUM_SPECIAL = 3
"""[CLS] first [SEP] second [SEP]"""
_COLUMNS = ("first", "second", "document")
_NUM_DRAWN = 16
_IN_PAIRS, _IN_MASKS = range(2)


def pair_generator(seed: int, pass_number: int, row: int, *, masks: bool) -> np.random.Generator:
    """The random numbers that belong to one row in one pass: those of its pair, or those of its masks."""
    return np.random.default_rng([seed, pass_number, row, _IN_MASKS if masks else _IN_PAIRS])


class PairExamples:
    """Rows of sentence pairs as examples, indexed by row and pass.

    Eight bytes of each document and two of each row are held in memory; the text stays on disk.

    Args:
        parts: datasets of pairs; documents of different parts are different documents.
        max_length: tokens of an example, its three special ones included.
        seed: decides what is exchanged.
        rows: these rows alone are examples, in this order; exchanged seconds come from all. None: all rows.
        name: what the text is called in a message.

    Raises:
        DataError: there is no pair, a single document only, a column is missing, or a document is torn apart.
        SettingsError: max_length or seed make no sense.
    """

    def __init__(
        self,
        parts: Sequence[Dataset],
        *,
        max_length: int,
        seed: int = 0,
        rows: np.ndarray | None = None,
        name: str = "the corpus",
    ) -> None:
        if max_length < NUM_SPECIAL + 2:
            raise SettingsError(f"a sentence pair needs at least {NUM_SPECIAL + 2} tokens; got {max_length}")
        if seed < 0:
            raise SettingsError(f"the seed of the pairs must be 0 or more; got {seed}")
        for part in parts:
            _check_columns(part)
        starts, lengths, num_rows = [], [], 0
        for part in parts:
            part_starts, part_lengths = _scanned(part)
            starts.append(part_starts + num_rows)
            lengths.append(part_lengths)
            num_rows += len(part)
        if not num_rows:
            raise DataError(f"{name} holds no sentence pair")
        self._starts = np.concatenate(starts)  # [documents]: first row of each
        if len(self._starts) < 2:
            raise DataError(
                f"{name} is one document, so no sentence of another can follow; next-sentence prediction needs two: "
                "set data.split_by to paragraph or line, or add text"
            )
        self._second_lengths = np.concatenate(lengths)  # [rows]
        # Joining copies nothing. In one process or many, reading goes to the mapped file.
        self._pairs = concatenate_datasets(list(parts)).with_format("arrow")
        self._max_length = max_length
        self._seed = seed
        self._rows = rows

    def __len__(self) -> int:
        return len(self._pairs) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example of the first pass."""
        return self.examples(np.array([index]), np.array([0]))[0]

    @property
    def num_documents(self) -> int:
        """Documents that seconds are drawn from."""
        return len(self._starts)

    def restricted(self, rows: np.ndarray) -> PairExamples:
        """These rows alone as examples, with seconds from all."""
        chosen = PairExamples.__new__(PairExamples)
        chosen.__dict__.update(self.__dict__, _rows=rows)
        return chosen

    def raw(self, indices: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Both parts of rows as they are stored."""
        table = self._pairs[self._row_numbers(indices).tolist()]
        return list(zip(_lists(table, "first"), _lists(table, "second"), strict=True))

    def examples(self, indices: np.ndarray, passes: np.ndarray) -> list[dict[str, Any]]:
        """Make examples, read together.

        Args:
            indices: `[N]` numbers below the length.
            passes: `[N]` pass over the data that each belongs to.

        Returns:
            Dicts of first, second (int32), is_random, row, pass_number.
        """
        rows = self._row_numbers(indices)
        draws = np.stack(
            [
                pair_generator(self._seed, int(number), int(row), masks=False).random(1 + _NUM_DRAWN)
                for row, number in zip(rows, passes, strict=True)
            ]
        )
        is_random = draws[:, 0] < 0.5
        others = np.where(is_random, self._elsewhere(rows, draws[:, 1:]), rows)
        table = self._pairs[rows.tolist()]
        firsts, true_seconds = _lists(table, "first"), _lists(table, "second")
        drawn = iter(_lists(self._pairs[others[is_random].tolist()], "second") if is_random.any() else [])
        made = []
        for i, first in enumerate(firsts):
            most = self._max_length - NUM_SPECIAL
            _, true_second = _shortened(first, true_seconds[i], most)
            # The text is compared as the model sees it: a stranger whose shown part is the true second's is none.
            first, second = _shortened(first, next(drawn) if is_random[i] else true_seconds[i], most)
            made.append(
                {
                    "first": first,
                    "second": second,
                    "is_random": bool(is_random[i]) and not np.array_equal(second, true_second),
                    "row": int(rows[i]),
                    "pass_number": int(passes[i]),
                }
            )
        return made

    def _row_numbers(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(indices) if self._rows is None else self._rows[indices]

    def _elsewhere(self, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """A row of another document for each, of those drawn the nearest in the length of its second."""
        ends = np.append(self._starts[1:], len(self._pairs))
        document = np.searchsorted(self._starts, rows, side="right") - 1
        start, size = self._starts[document][:, None], (ends - self._starts)[document][:, None]
        candidates = (draws * (len(self._pairs) - size)).astype(np.int64)  # numbers without the document's own rows
        candidates += np.where(candidates >= start, size, 0)  # [N, drawn]
        difference = self._second_lengths[candidates].astype(np.int64) - self._second_lengths[rows][:, None]
        nearest = np.abs(difference).argmin(axis=1)
        return np.take_along_axis(candidates, nearest[:, None], axis=1)[:, 0]


def _check_columns(pairs: Dataset) -> None:
    names = pairs.column_names
    for wanted in _COLUMNS:
        if wanted not in names:
            what = ", ".join(map(repr, names)) or "none"
            raise DataError(f"sentence pairs must have a column {wanted!r}; got {what}{did_you_mean(wanted, names)}")


def _scanned(pairs: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """First row of each document, and the number of tokens of every second."""
    starts, lengths, names = [], [], []
    last, num_rows = None, 0
    for table in arrow_batches(pairs.select_columns(["second", "document"])):
        documents = table["document"].to_numpy()
        begins = np.append(last is None or documents[0] != last, documents[1:] != documents[:-1])
        starts.append(np.flatnonzero(begins) + num_rows)
        names.append(documents[begins])
        lengths.append(pc.list_value_length(table["second"]).to_numpy().astype(np.uint16))  # pyright: ignore
        last, num_rows = documents[-1], num_rows + len(documents)
    if not starts:
        return np.array([], dtype=np.int64), np.array([], dtype=np.uint16)
    all_names = np.concatenate(names)
    if len(np.unique(all_names)) < len(all_names):
        raise DataError("the sentence pairs of a document must lie together; a document number comes again later")
    return np.concatenate(starts), np.concatenate(lengths)


def _lists(table: pa.Table, name: str) -> list[np.ndarray]:
    column = table[name]
    lengths = pc.list_value_length(column).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    flat = pc.list_flatten(column).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
    return np.split(flat, np.cumsum(lengths)[:-1])


def _shortened(first: np.ndarray, second: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the end of the longer one until both fit."""
    if len(first) + len(second) <= most:
        return first, second
    half = most // 2
    if len(second) <= half:
        return first[: most - len(second)], second
    if len(first) <= half:
        return first, second[: most - len(first)]
    return first[: most - half], second[:half]
