"""Text to ids, in parallel and cached: the step between a corpus and its windows.

Columns of the result, one row per row of the corpus:

    input_ids       list of int32, no special tokens: text that spells one stays text, so data cannot end a document
    num_bytes       UTF-8 bytes of the row's text
    num_words       its words, between white space
    ends_document   False on every row but the last of a document

    tokens = tokenize_documents(corpus, tokenizer, num_proc=2)
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from cottention.data.arrow_cache import cached_map, fingerprint_of
from cottention.errors import DataError, did_you_mean

_VERSION = 2  # part of the cache key: raise it when the same input shall give another output
TOKEN_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "num_bytes": Value("int64"),
        "num_words": Value("int64"),
        "ends_document": Value("bool"),
    }
)
_BATCH_BYTES = 4 << 20


def tokenize_documents(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None) -> Dataset:
    """Turn text into ids, row by row, cached on disk.

    Args:
        dataset: rows with the columns text and, where a document has several rows, ends_document.
        tokenizer: adds no special tokens here.
        num_proc: processes; None tokenises in this one, where a fast tokenizer uses all cores by itself.

    Returns:
        Dataset with columns input_ids, num_bytes, num_words, ends_document.

    Raises:
        DataError: there is no text, or the cache cannot be used.
    """
    check_has_text(dataset)
    extra = [name for name in dataset.column_names if name not in ("text", "ends_document")]
    dataset = dataset.remove_columns(extra)
    key = ["tokens", _VERSION, fingerprint_of(dataset), _description_of(tokenizer)]
    size = _batch_size(dataset, 1000)
    return cached_map(dataset, _Tokenize(tokenizer), TOKEN_FEATURES, key=key, batch_size=size, num_proc=num_proc)


def check_has_text(dataset: Dataset) -> None:
    """Refuse a dataset without rows, or without the column "text".

    Raises:
        DataError: it is one of these.
    """
    names = dataset.column_names
    if "text" not in names:
        what = ", ".join(map(repr, names)) or "none"
        raise DataError(f"the dataset must have a column 'text'; it has {what}{did_you_mean('text', names)}")
    if not len(dataset):
        raise DataError("the dataset has no rows, so there is no text to tokenise")


def arrow_batches(dataset: Dataset) -> Iterator[pa.Table]:
    """Yield a dataset's rows as Arrow tables of some megabytes."""
    table: pa.Table
    for table in dataset.with_format("arrow").iter(_batch_size(dataset, 1 << 16)):  # pyright: ignore
        yield from _halved(table)


def _halved(table: pa.Table) -> Iterator[pa.Table]:
    """Yield a table in parts of some megabytes: the mean says little where long rows stand together."""
    if len(table) < 2 or table.nbytes <= 2 * _BATCH_BYTES:
        yield table
        return
    middle = len(table) // 2
    yield from _halved(table.slice(0, middle))
    yield from _halved(table.slice(middle))


class _Tokenize:
    """The mapped function, as a class so that it travels to other processes with its tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        texts = rows["text"]
        return {
            "input_ids": [ids for group in _groups(texts) for ids in self._encoded(group)],
            "num_bytes": [len(text.encode()) for text in texts],
            "num_words": [len(text.split()) for text in texts],
            "ends_document": rows.get("ends_document", [True] * len(texts)),
        }

    def _encoded(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Yield texts in groups of some megabytes: while it works, a tokenizer holds a hundred bytes and more per token."""
    group: list[str] = []
    num_characters = 0
    for text in texts:
        if group and num_characters + len(text) > _BATCH_BYTES:
            yield group
            group, num_characters = [], 0
        group.append(text)
        num_characters += len(text)
    yield group


def _description_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name what decides the ids; padding and truncation, which earlier calls leave behind, do not."""
    if not tokenizer.is_fast:
        return Hasher.hash(tokenizer)
    described = json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    return json.dumps({**described, "truncation": None, "padding": None}, sort_keys=True)


def _batch_size(dataset: Dataset, most: int) -> int:
    """How many rows make up some megabytes, by their mean size."""
    mean_bytes = dataset.data.nbytes // max(dataset.data.num_rows, 1) + 1
    return int(np.clip(_BATCH_BYTES // mean_bytes, 1, most))
