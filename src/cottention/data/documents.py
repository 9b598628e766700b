"""A random window of every document in each pass: how the published GPTs were trained, with true ends only.

A document is its tokens and one end-of-text. One that fits into a window is read whole; of a longer one each pass reads
another stretch, whose end is a document's end only where it is. Where a stretch begins follows from seed, pass and the
document's number alone, so any number of workers and processes reads the same, and a run may stop and go on anywhere.

    documents = DocumentWindows(tokenize_documents(corpus, tokenizer), 1024, tokenizer.eos_token_id, seed=0)
    batch = collate_documents(documents.examples(np.array([3, 14]), passes=np.array([0, 0])))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, Value
from torch import Tensor

from cottention.data.arrow_cache import cached_dataset, fingerprint_of
from cottention.data.collators import IGNORED
from cottention.data.packing import ends_of, lengths_of
from cottention.data.tokenization import arrow_batches
from cottention.errors import DataError, SettingsError

_VERSION = 1  # part of every cache key: raise it when the same input shall give another output
_ROWS = Features({"offset": Value("int64")})
_DOCUMENTS = Features({"first_row": Value("int64"), "end_row": Value("int64")})


class _Part(NamedTuple):
    """Tokens `start` to `stop` of a row."""

    row: int
    start: int
    stop: int


class DocumentWindows:
    """Documents as examples, indexed by number and pass. Everything stays on disk, where each document lies in which
    rows too.

    Args:
        tokens: what `tokenize_documents` returns.
        window: tokens of an example at most, end-of-text included; at least 2.
        eos_token_id: the end-of-text token.
        seed: decides where windows begin.
        rows: these documents alone are examples, in this order; None: all.

    Raises:
        SettingsError: no end-of-text token, or a window below 2.
        DataError: there is no document with a token.
    """

    def __init__(
        self,
        tokens: Dataset,
        window: int,
        eos_token_id: int | None,
        *,
        seed: int = 0,
        rows: np.ndarray | None = None,
    ) -> None:
        if eos_token_id is None:
            raise SettingsError("the tokenizer has no end-of-text token (eos_token); a document has no end to learn")
        if window < 2:
            raise SettingsError(f"a window must hold at least 2 tokens; got {window}")
        key = ["document-rows", _VERSION, fingerprint_of(tokens)]
        self._offsets = cached_dataset(_offsets(tokens), _ROWS, key=key).with_format("numpy")
        key = ["documents", _VERSION, fingerprint_of(tokens)]
        self._documents = cached_dataset(_documents(tokens), _DOCUMENTS, key=key).with_format("numpy")
        if not len(self._documents):
            raise DataError("the corpus has no document with a token in it")
        self._tokens = tokens.select_columns(["input_ids"]).with_format("arrow")
        self._window = window
        self._eos = eos_token_id
        self._seed = seed
        self._rows = rows

    def __len__(self) -> int:
        return len(self._documents) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example of the first pass."""
        return self.examples(np.array([index]), np.array([0]))[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, their ends included."""
        return int(self._offsets[len(self._offsets) - 1]["offset"]) + len(self._documents)

    def restricted(self, rows: np.ndarray) -> DocumentWindows:
        """These documents alone, in this order."""
        chosen = DocumentWindows.__new__(DocumentWindows)
        chosen.__dict__.update(self.__dict__, _rows=rows)
        return chosen

    def examples(self, indices: np.ndarray, passes: np.ndarray) -> list[dict[str, Any]]:
        """Windows of documents, read together.

        Args:
            indices: `[N]` numbers below the length.
            passes: `[N]` pass over the data that each belongs to.

        Returns:
            Dicts of input_ids (int32) and pass_number.
        """
        numbers = np.asarray(indices) if self._rows is None else self._rows[indices]
        where = self._documents[numbers.tolist()]
        plans = [
            self._plan(int(number), int(one_pass), int(first), int(end))
            for number, one_pass, first, end in zip(numbers, passes, where["first_row"], where["end_row"], strict=True)
        ]
        needed = sorted({part.row for parts, _ in plans for part in parts})
        texts = dict(zip(needed, self._tokens[needed]["input_ids"], strict=True))
        examples = []
        for (parts, ends), one_pass in zip(plans, passes, strict=True):
            ids = [texts[part.row].values.slice(part.start, part.stop - part.start).to_numpy() for part in parts]
            ids.append(np.array([self._eos] if ends else [], dtype=np.int32))
            examples.append({"input_ids": np.concatenate(ids).astype(np.int32), "pass_number": int(one_pass)})
        return examples

    def _plan(self, number: int, one_pass: int, first: int, end: int) -> tuple[list[_Part], bool]:
        """Which tokens of which rows, and whether the document's end comes behind them."""
        bounds = self._offsets[first : end + 1]["offset"]
        bounds = bounds - bounds[0]
        length = int(bounds[-1])
        start = 0
        if length + 1 > self._window:
            start = int(np.random.default_rng([self._seed, one_pass, number]).integers(length + 2 - self._window))
        stop = min(start + self._window, length)
        parts = []
        for row in range(int(np.searchsorted(bounds, start, side="right")) - 1, end - first):
            low, high = int(bounds[row]), int(bounds[row + 1])
            if low >= stop:
                break
            if high > low:
                parts.append(_Part(first + row, max(start - low, 0), min(stop, high) - low))
        return parts, start + self._window > length


def collate_documents(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pack examples end to end, no padding: input_ids, shift_labels `[1, T]` and cu_seqlens, int32."""
    texts = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
    targets = [np.append(ids[1:], IGNORED) for ids in texts]
    bounds = np.cumsum([0, *map(len, texts)]).astype(np.int32)
    return {
        "input_ids": torch.from_numpy(np.concatenate(texts)[None]),
        "shift_labels": torch.from_numpy(np.concatenate(targets)[None]),
        "cu_seqlens": torch.from_numpy(bounds),
    }


def _offsets(tokens: Dataset) -> Iterator[pa.Table]:
    """Tokens before each row, and before the end."""
    total = 0
    for table in arrow_batches(tokens):
        ends = np.cumsum(lengths_of(table), dtype=np.int64) + total
        yield pa.table({"offset": np.append(total, ends[:-1])})
        total = int(ends[-1])
    yield pa.table({"offset": np.array([total])})


def _documents(tokens: Dataset) -> Iterator[pa.Table]:
    """Rows of each document that has a token."""
    num_rows = first = num_tokens = 0  # before the table; of the document that is open, its first row and its tokens
    for table in arrow_batches(tokens):
        ends = np.flatnonzero(ends_of(table)) + 1
        totals = np.append(0, np.cumsum(lengths_of(table), dtype=np.int64))
        firsts = np.append(first, ends[:-1] + num_rows) if len(ends) else np.array([], dtype=np.int64)
        counts = np.diff(totals[np.append(0, ends)])
        if len(ends):
            counts[0] += num_tokens
            first, num_tokens = int(ends[-1]) + num_rows, 0
        num_tokens += int(totals[-1] - totals[ends[-1] if len(ends) else 0])
        full = counts > 0
        yield pa.table({"first_row": firsts[full], "end_row": (ends + num_rows)[full]})
        num_rows += len(table)
    if num_tokens:  # the last document may lack its end
        yield pa.table({"first_row": np.array([first]), "end_row": np.array([num_rows])})
