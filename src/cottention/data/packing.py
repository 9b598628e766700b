"""Tokenised documents to fixed windows, streamed: join, cut; every token is used, only the tail is left.

`pack_windows` joins the documents of a GPT corpus in order and cuts every `window` tokens:

    <eos> d1 d1 d1 <eos> d2 d2 ... dn <eos>

One end-of-text between two documents closes the first (as the target of its last token) and opens the second (as the
input that predicts its first token), so no document needs two of them, a cut inside a document adds none, and a model
can be asked for a fresh text by giving it this one token. `pack_mlm_windows` joins BERT documents with [SEP] and wraps
each window as [CLS] ... [SEP].

Columns of the windows (numpy format):

    input_ids         [window] int32, fixed size
    num_tokens        int32: real tokens; `window` except in a padded last row
    document_starts   list of int32: where documents begin: at their opening end-of-text (GPT) or first token (BERT)

A window's first token has nothing before it and is nobody's target. Pass `remove_unused_columns=False` to a Trainer,
else it takes document_starts away before the collator sees it.

    tokens = tokenize_documents(corpus, tokenizer, num_proc=2)
    windows = pack_windows(tokens, 1024, tokenizer.eos_token_id)
    print(packing_report(tokens, windows))
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from cottention.bars import progress
from cottention.data.arrow_cache import cached_dataset, fingerprint_of
from cottention.data.tokenization import arrow_batches
from cottention.data.tokenization import tokenize_documents as tokenize_documents  # the step before; used together
from cottention.errors import DataError, SettingsError

_VERSION = 1  # part of every cache key: raise it when the same input shall give another output


@dataclass(frozen=True, kw_only=True)
class PackingReport:
    """What became of a corpus."""

    num_documents: int
    """Documents, long ones counted once."""
    num_bytes: int
    """UTF-8 bytes of their text."""
    num_tokens: int
    """Tokens of the joined text, with end-of-text (GPT) or [CLS] and [SEP] (BERT)."""
    num_windows: int
    """Rows to train on."""
    num_dropped: int
    """Tokens behind the last whole window, left out."""
    num_padding: int
    """Positions of the last window that hold no token."""

    def __str__(self) -> str:
        per_token = self.num_bytes / max(self.num_tokens, 1)
        tail = f"{self.num_padding:,} positions padded" if self.num_padding else f"{self.num_dropped:,} tokens dropped"
        return (
            f"{self.num_documents:,} documents, {self.num_bytes:,} bytes, {self.num_tokens:,} tokens "
            f"({per_token:.2f} bytes each) in {self.num_windows:,} windows, {tail} at the end"
        )


def pack_windows(
    dataset: Dataset,
    window: int,
    eos_token_id: int | None,
    *,
    tail: str = "drop",
    pad_token_id: int | None = None,
) -> Dataset:
    """Join tokenised documents with end-of-text and cut windows for next-token prediction.

    Args:
        dataset: what `tokenize_documents` returns.
        window: tokens per row, at least 2.
        eos_token_id: the end-of-text token; before the first document, between two, and after the last.
        tail: tokens behind the last whole window: "drop" (training) or "pad" to a window of their own.
        pad_token_id: what fills it; the end-of-text token when None. The collator masks it by `num_tokens`.

    Returns:
        Dataset with columns input_ids, num_tokens, document_starts.

    Raises:
        SettingsError: no end-of-text token, a window below 2, an unknown tail.
        DataError: the corpus fills no window.
    """
    if eos_token_id is None:
        raise SettingsError("the tokenizer has no end-of-text token (eos_token); documents cannot be told apart")
    _check_cutting(window, 2, tail)
    joined = join_documents(dataset, eos_token_id, outer=True)
    filling = eos_token_id if pad_token_id is None else pad_token_id
    tables = (_table(ids, num, starts, window) for ids, num, starts in _cut(joined, window, tail, filling))
    key = ["windows", _VERSION, fingerprint_of(dataset), window, eos_token_id, tail, filling]
    return _windows(tables, window, key, dataset)


def pack_mlm_windows(
    dataset: Dataset,
    window: int,
    *,
    cls_token_id: int | None,
    sep_token_id: int | None,
    pad_token_id: int | None,
    tail: str = "drop",
) -> Dataset:
    """Join tokenised documents with [SEP] and cut windows [CLS] ... [SEP] for masked-language modelling.

    Args:
        dataset: what `tokenize_documents` returns.
        window: tokens per row, the two special ones included; at least 3.
        cls_token_id: first token of each row.
        sep_token_id: last token of each row, and between two documents.
        pad_token_id: fills the last row with tail="pad".
        tail: tokens behind the last whole window: "drop" (training) or "pad" to a window of their own.

    Returns:
        Dataset with columns input_ids, num_tokens, document_starts.

    Raises:
        SettingsError: a special token is missing, a window below 3, an unknown tail.
        DataError: the corpus fills no window.
    """
    named = {"cls_token": cls_token_id, "sep_token": sep_token_id, "pad_token": pad_token_id}
    if missing := [name for name, token_id in named.items() if token_id is None]:
        raise SettingsError(f"the tokenizer has no {', '.join(missing)}; masked-language modelling needs BERT's tokens")
    assert cls_token_id is not None
    assert sep_token_id is not None
    assert pad_token_id is not None
    _check_cutting(window, 3, tail)
    joined = join_documents(dataset, sep_token_id, outer=False)
    tables = (
        _wrapped(ids, num, starts, cls_token_id, sep_token_id)
        for ids, num, starts in _cut(joined, window - 2, tail, pad_token_id)
    )
    key = ["mlm-windows", _VERSION, fingerprint_of(dataset), window, *named.values(), tail]
    return _windows(tables, window, key, dataset)


def packing_report(tokens: Dataset, windows: Dataset) -> PackingReport:
    """Count what went into the windows and what did not.

    Args:
        tokens: what `tokenize_documents` returned.
        windows: what `pack_windows` or `pack_mlm_windows` made of it.
    """
    num_tokens = num_bytes = num_documents = 0
    begins = True
    for table in arrow_batches(tokens):
        ends = ends_of(table)
        num_tokens += int(lengths_of(table).sum())
        num_bytes += int(table["num_bytes"].to_numpy().sum())
        num_documents += int(begins) + int(ends[:-1].sum())  # beginnings: the last document may lack its end
        begins = ends[-1]
    num_kept = sum(int(table["num_tokens"].to_numpy().sum()) for table in arrow_batches(windows))
    window = len(windows[0]["input_ids"])
    # A GPT row may open with a document's end-of-text; a BERT row has [CLS] before its first document and [SEP] behind.
    is_gpt = int(windows[0]["document_starts"][0]) == 0
    num_tokens += num_documents + 1 if is_gpt else num_documents - 1 + 2 * len(windows)
    return PackingReport(
        num_documents=num_documents,
        num_bytes=num_bytes,
        num_tokens=num_tokens,
        num_windows=len(windows),
        num_dropped=num_tokens - num_kept,
        num_padding=len(windows) * window - num_kept,
    )


def _check_cutting(window: int, smallest: int, tail: str) -> None:
    if window < smallest:
        raise SettingsError(f"a window must hold at least {smallest} tokens; got {window}")
    if tail not in ("drop", "pad"):
        raise SettingsError(f"tail must be drop or pad; got {tail!r}")


def lengths_of(table: pa.Table) -> np.ndarray:
    """Tokens of each row."""
    return pc.list_value_length(table["input_ids"]).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]


def ends_of(table: pa.Table) -> np.ndarray:
    """Whether each row is the last of its document."""
    if "ends_document" not in table.column_names:
        return np.ones(len(table), dtype=bool)
    return table["ends_document"].to_numpy()


def join_documents(tokens: Dataset, separator: int, *, outer: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokenised documents as one stream, in pieces of some megabytes.

    Args:
        tokens: what `tokenize_documents` returns.
        separator: the token between two documents.
        outer: put one before the first document and behind the last too; a document then begins at the separator before
            it, otherwise at its first token.

    Yields:
        Ids (int32), and the positions among them where documents begin.
    """
    begins_next, is_first = True, True
    with progress("Packing", "row", total=len(tokens), delay=3, leave=False) as bar:
        for table in arrow_batches(tokens):
            lengths = lengths_of(table)
            flat = pc.list_flatten(table["input_ids"]).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
            ends = ends_of(table)
            begins = np.concatenate([[begins_next], ends[:-1]])
            separated = begins.copy()
            if is_first and not outer:
                separated[0] = False
            row_starts = np.cumsum(lengths) - lengths + np.cumsum(separated) - separated  # of the separator, if any
            ids = np.empty(len(flat) + separated.sum(), dtype=np.int32)
            is_separator = np.zeros(len(ids), dtype=bool)
            is_separator[row_starts[separated]] = True
            ids[is_separator] = separator
            ids[~is_separator] = flat
            yield ids, (row_starts if outer else row_starts + separated)[begins]
            begins_next, is_first = bool(ends[-1]), False
            bar.update(len(table))
    if outer and not is_first:
        yield np.array([separator], dtype=np.int32), np.array([], dtype=np.int64)


def _cut(
    joined: Iterator[tuple[np.ndarray, np.ndarray]], length: int, tail: str, filling: int
) -> Iterator[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]:
    """Yield rows cut from the stream: ids [n, length], real tokens per row [n], document starts per row."""
    ids, starts = np.array([], dtype=np.int32), np.array([], dtype=np.int64)
    for more_ids, more_starts in joined:
        starts = np.concatenate([starts, more_starts + len(ids)])
        ids = np.concatenate([ids, more_ids])
        num_rows = len(ids) // length
        if num_rows:
            end = num_rows * length
            yield ids[:end].reshape(-1, length), np.full(num_rows, length), _per_row(starts, num_rows, length)
            ids, starts = ids[end:], starts[starts >= end] - end
    if tail == "pad" and len(ids):
        padded = np.full((1, length), filling, dtype=np.int32)
        padded[0, : len(ids)] = ids
        yield padded, np.array([len(ids)]), [starts]


def _per_row(starts: np.ndarray, num_rows: int, length: int) -> list[np.ndarray]:
    bounds = np.searchsorted(starts, np.arange(num_rows + 1) * length)
    return [starts[low:high] % length for low, high in itertools.pairwise(bounds)]


def _table(ids: np.ndarray, num_tokens: np.ndarray, starts: list[np.ndarray], window: int) -> pa.Table:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in starts])]).astype(np.int32)
    return pa.table(
        {
            "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1), pa.int32()), window),
            "num_tokens": pa.array(num_tokens, pa.int32()),
            "document_starts": pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(starts), pa.int32())),
        }
    )


def _wrapped(ids: np.ndarray, num_tokens: np.ndarray, starts: list[np.ndarray], cls: int, sep: int) -> pa.Table:
    """Put [CLS] before the content of each row and [SEP] right behind it."""
    num_rows, length = ids.shape
    rows = np.empty((num_rows, length + 2), dtype=np.int32)
    rows[:, 0] = cls
    rows[:, 1:-1] = ids
    rows[:, -1] = ids[:, -1]  # padding where the row is padded, else overwritten
    rows[np.arange(num_rows), num_tokens + 1] = sep
    return _table(rows, num_tokens + 2, [row + 1 for row in starts], length + 2)


def _windows(tables: Iterator[pa.Table], window: int, key: list, tokens: Dataset) -> Dataset:
    features = Features(
        {
            "input_ids": List(Value("int32"), length=window),
            "num_tokens": Value("int32"),
            "document_starts": List(Value("int32")),
        }
    )
    dataset = cached_dataset(tables, features, key=key)
    if not len(dataset):
        num_tokens = sum(int(lengths_of(table).sum()) for table in arrow_batches(tokens))
        raise DataError(f"the corpus has {num_tokens:,} tokens, too few for one window of {window}; shorten the window")
    return dataset.with_format("numpy")
