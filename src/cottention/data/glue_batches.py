"""GLUE's rows to batches: token ids once, on disk; batches without padding where that is quicker.

A packed batch is one row of all texts with their bounds (`cu_seqlens`), so no arithmetic goes into padding: of SST-2's
sentences in random order, half of a padded batch would be padding. Results are the same either way.

    encoded = encode_glue(rows, tokenizer, max_length=128)
    batch = GlueCollator(pad_token_id=0, packed=True)([encoded.rows[i] for i in (3, 1, 2)])
    logits = model(**batch).logits       # [3, labels]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cottention.data.arrow_cache import cached_map, fingerprint_of
from cottention.errors import SettingsError

_VERSION = 1  # part of the cache key: raise it when the same rows shall give other tokens
_ROWS_PER_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """A split as tokens."""

    rows: Dataset
    """Columns input_ids, num_first (tokens of the first text, its special tokens included), was_cut, and label where
    the split has labels."""
    num_cut: int
    """Rows that were longer than the limit."""


def encode_glue(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedRows:
    """Tokenise rows of `load_glue`: [CLS] first [SEP], or [CLS] first [SEP] second [SEP].

    Args:
        rows: columns first, second and perhaps label.
        tokenizer: a BERT's.
        max_length: tokens of a row at most; of a pair the longer text is cut.

    Raises:
        SettingsError: the tokenizer is no BERT's, or there is no room for any text.
    """
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise SettingsError("the tokenizer must have [CLS] and [SEP], as a BERT's has; it has not")
    if max_length < 5:  # [CLS] a [SEP] b [SEP]
        raise SettingsError(f"max_length must be at least 5; got {max_length}")
    return encode_rows(rows, tokenizer, max_length)


def encode_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, *, batch_size: int = _ROWS_PER_BATCH
) -> EncodedRows:
    """Tokenise rows with whatever the tokenizer puts around texts and pairs.

    Args:
        rows: columns first, second and perhaps label.
        tokenizer: the model's.
        max_length: tokens of a row at most; of a pair the longer text is cut.
        batch_size: rows in memory at a time.
    """
    features = Features(
        {"input_ids": List(Value("int32")), "num_first": Value("int32"), "was_cut": Value("bool")}
        | ({"label": rows.features["label"]} if "label" in rows.column_names else {})
    )
    backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009  # the base class does not declare it
    _set_free(backend)
    key = ["glue tokens", _VERSION, fingerprint_of(rows), backend.to_str(), max_length]
    encoded = cached_map(rows, _Encode(tokenizer, max_length), features, key=key, batch_size=batch_size)
    _set_free(backend)
    return EncodedRows(rows=encoded, num_cut=int(np.sum(encoded["was_cut"])))


def _set_free(backend: Any) -> None:
    """Take off the limit that the last call left in the tokenizer: it would be saved with it, and change its name."""
    backend.no_truncation()
    backend.no_padding()


class _Encode:
    """The step of `cached_map`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, Sequence[Any]]:
        has_pairs = any(batch["second"])
        found: Any = self.tokenizer(
            batch["first"],
            batch["second"] if has_pairs else None,
            truncation="longest_first",
            max_length=self.max_length,
            verbose=False,
        )
        return {
            "input_ids": found["input_ids"],
            "num_first": [encoding.type_ids.count(0) for encoding in found.encodings],
            "was_cut": [bool(encoding.overflowing) for encoding in found.encodings],
            "label": batch.get("label", ()),
        }


class GlueCollator:
    """Joins encoded rows to a batch for a BERT.

    Args:
        pad_token_id: fills up shorter rows of a padded batch.
        packed: one row `[1, T]` with `cu_seqlens` instead of `[B, T]` with `attention_mask`.
        num_token_types: of the model; with 1 every token has type 0.
    """

    def __init__(self, *, pad_token_id: int, packed: bool, num_token_types: int = 2) -> None:
        self.pad_token_id = pad_token_id
        self.packed = packed
        self.num_token_types = num_token_types

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Join; token types are 1 from the second text on, labels keep their type."""
        texts = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
        types = [(np.arange(len(row["input_ids"])) >= row["num_first"]).astype(np.int64) for row in rows]
        if self.packed:
            bounds = np.cumsum([0, *map(len, texts)]).astype(np.int32)
            batch = {
                "input_ids": torch.from_numpy(np.concatenate(texts)[None]),
                "token_type_ids": torch.from_numpy(np.concatenate(types)[None]),
                "cu_seqlens": torch.from_numpy(bounds),
            }
        else:
            batch = {
                "input_ids": _padded(texts, self.pad_token_id),
                "token_type_ids": _padded(types, 0),
                "attention_mask": _padded([np.ones_like(text) for text in texts], 0),
            }
        if self.num_token_types < 2:
            del batch["token_type_ids"]
        if "label" in rows[0]:
            labels = [row["label"] for row in rows]
            kind = torch.float32 if isinstance(labels[0], float) else torch.int64
            batch["labels"] = torch.tensor(labels, dtype=kind)
        return batch


def _padded(rows: list[np.ndarray], value: int) -> Tensor:
    joined = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)  # [B, T]
    for whole, row in zip(joined, rows, strict=True):
        whole[: len(row)] = row
    return torch.from_numpy(joined)


def packs_best(attention_type: str, device: torch.device) -> bool:
    """Whether packed batches are the quicker ones: always, but for softmax on a GPU, which attends text by text."""
    return attention_type == "cosine" or device.type == "cpu"
