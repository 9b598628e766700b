"""Held-out documents as batches of inputs and targets; every token, and each document's end, is a target exactly once.

    input     <eos>  d1  d2 ... d(n-1)  dn
    target     d1    d2  d3 ...   dn   <eos>

Two ways to read one that is longer than a pass: `document_windows` cuts it into windows that a model reads each from a
fresh start, side by side or overlapping; `continued_batches` cuts it into pieces for a model that carries its state
from one to the next.

    for inputs, targets in batches_of(document_windows(tokens, eos_token_id, 1024, stride=512), batch_size=8): ...
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from cottention.data.tokenization import arrow_batches
from cottention.files import IGNORE_INDEX as IGNORED

_BATCHES_SORTED = 64  # windows of so many batches are sorted by length, so that short documents share their padding

Window = tuple[np.ndarray, np.ndarray]


def document_windows(
    tokens: Dataset, eos_token_id: int, context: int, stride: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (inputs, targets) of at most `context` tokens, document by document; each token is a target once.

    Args:
        tokens: what `tokenize_documents` returns; a document may have several rows.
        eos_token_id: first input and last target of each document.
        context: most inputs per window.
        stride: inputs that a window moves on; those that it shares with the one before ask for nothing again, but are
            read. None: `context`, nothing is shared.
    """
    rows = (
        (ids.values.to_numpy(), ends)
        for table in arrow_batches(tokens)
        for ids, ends in zip(table["input_ids"], table["ends_document"].to_pylist(), strict=True)
    )
    return _windows_of(rows, eos_token_id, context, context if stride is None else stride)


def batches_of(windows: Iterable[Window], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pad windows of about one length to batches: inputs and targets [B, T], targets IGNORED where there is none."""
    waiting: list[Window] = []
    for window in windows:
        waiting.append(window)
        if len(waiting) == batch_size * _BATCHES_SORTED:
            yield from _sorted_batches(waiting, batch_size)
            waiting = []
    yield from _sorted_batches(waiting, batch_size)


def continued_batches(
    tokens: Dataset, eos_token_id: int, context: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield (inputs, targets, begins): documents side by side, `context` tokens of each at a time.

    Where `begins` is set the rows are new documents, otherwise those of the batch before, less the ones at the end that
    are over. Memory follows `context` and `batch_size`, whatever the length of a document and their number.

    Args:
        tokens: what `tokenize_documents` returns.
        eos_token_id: first input and last target of each document.
        context: most inputs of a document in one batch.
        batch_size: documents side by side.
    """
    documents = _documents_of(tokens)
    while part := list(itertools.islice(documents, batch_size * _BATCHES_SORTED)):
        part.sort(key=lambda document: -document[2])  # so that those which are over stand at the end
        for start in range(0, len(part), batch_size):
            side_by_side = [
                _windows_of(_rows_between(tokens, first, behind), eos_token_id, context, context)
                for first, behind, _ in part[start : start + batch_size]
            ]
            begins = True
            while pieces := [piece for piece in (next(each, None) for each in side_by_side) if piece is not None]:
                yield *_padded(pieces), begins
                begins = False


def _windows_of(
    rows: Iterable[tuple[np.ndarray, bool]], eos_token_id: int, context: int, stride: int
) -> Iterator[Window]:
    opening = np.array([eos_token_id], dtype=np.int32)
    waiting, num_old = opening, 0  # what the next window begins with, and how much of that has been an input already
    for ids, ends in rows:
        waiting = np.concatenate([waiting, ids, *([opening] if ends else [])])
        while len(waiting) > context:
            yield _window(waiting[: context + 1], num_old)
            waiting, num_old = waiting[stride:], context - stride
        if ends:
            if len(waiting) > num_old + 1:  # one new token alone was a target already
                yield _window(waiting, num_old)
            waiting, num_old = opening, 0
    if len(waiting) > num_old + 1:  # of a document that the rows do not end
        yield _window(waiting, num_old)


def _window(ids: np.ndarray, num_old: int) -> Window:
    targets = ids[1:].copy()
    targets[:num_old] = IGNORED
    return ids[:-1], targets


def _sorted_batches(windows: list[Window], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    windows = sorted(windows, key=lambda window: -len(window[0]))
    for start in range(0, len(windows), batch_size):
        yield _padded(windows[start : start + batch_size])


def _padded(windows: list[Window]) -> tuple[Tensor, Tensor]:
    inputs = np.zeros((len(windows), max(len(ids) for ids, _ in windows)), dtype=np.int64)
    targets = np.full_like(inputs, IGNORED)
    for row, (ids, next_ids) in enumerate(windows):
        inputs[row, : len(ids)] = ids
        targets[row, : len(ids)] = next_ids
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def _documents_of(tokens: Dataset) -> Iterator[tuple[int, int, int]]:
    """Yield each document's first row, the row behind its last, and its number of targets."""
    first, row, num_targets = 0, 0, 0
    for table in arrow_batches(tokens):
        lengths = pc.list_value_length(table["input_ids"])  # pyright: ignore[reportAttributeAccessIssue]
        for length, ends in zip(lengths.to_pylist(), table["ends_document"].to_pylist(), strict=True):
            row, num_targets = row + 1, num_targets + length
            if ends:
                yield first, row, num_targets + 1
                first, num_targets = row, 0
    if first < row:  # the rows do not end it
        yield first, row, num_targets


def _rows_between(tokens: Dataset, first: int, behind: int) -> Iterator[tuple[np.ndarray, bool]]:
    rows = tokens.with_format("numpy")
    for number in range(first, behind):
        row = rows[number]
        yield np.asarray(row["input_ids"], dtype=np.int32), bool(row["ends_document"])
