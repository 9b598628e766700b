"""Labelled rows to batches, for BERTs and GPTs: texts, pairs, and words with a tag each.

A BERT reads [CLS] first [SEP] second [SEP]. A GPT reads each text with its end-of-text behind it, whose last state has
seen everything: `with_text_ends` writes that into the tokenizer, so that whoever opens the saved model reads alike.

    tokenizer = with_text_ends(tokenizer)
    encoded = encode_texts(rows, tokenizer, max_length=256)         # columns input_ids, num_first, was_cut, label
    batch = LabelCollator(pad_token_id=0, packed=True, kind="several")([encoded.rows[i] for i in (3, 1, 2)])
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, List, Value
from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cottention.data.arrow_cache import cached_map, fingerprint_of
from cottention.data.glue_batches import EncodedRows, GlueCollator, encode_rows
from cottention.errors import SettingsError
from cottention.files import IGNORE_INDEX

_VERSION = 1  # part of the cache key: raise it when the same rows shall give other tokens
_ROWS_PER_BATCH = 1000
_CHARACTERS_PER_BATCH = 1 << 22  # a tokenizer holds a hundred bytes for each
_LEAST_LENGTH = 5  # [CLS] a [SEP] b [SEP]
_NO_LENGTH = 1 << 40  # what transformers writes where a tokenizer has no longest text is larger


def with_text_ends(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as a classifier's: a BERT's as it is, a GPT's with end-of-text behind every text.

    Raises:
        SettingsError: it has neither [CLS] and [SEP] nor end-of-text.
    """
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        return tokenizer
    end = tokenizer.eos_token_id
    if end is None:
        raise SettingsError("the tokenizer must have [CLS] and [SEP], or an end-of-text token; it has neither")
    ids: Any = tokenizer("a", verbose=False)["input_ids"]
    if ids[-1] == end:
        return tokenizer
    made: Any = copy.deepcopy(tokenizer)
    backend, token = made.backend_tokenizer, str(tokenizer.eos_token)
    ends = processors.TemplateProcessing(
        single=f"$A {token}", pair=f"$A {token} $B:1 {token}:1", special_tokens=[(token, end)]
    )
    before = backend.post_processor
    backend.post_processor = ends if before is None else processors.Sequence([before, ends])
    return made


def encode_texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedRows:
    """Tokenise texts and pairs; the longer text of a pair is cut.

    Args:
        rows: columns first, second and perhaps label.
        tokenizer: of `with_text_ends`.
        max_length: tokens of a row at most.
    """
    _check_length(max_length)
    longest = max(_longest(rows, "first") + _longest(rows, "second"), 1)
    size = int(np.clip(_CHARACTERS_PER_BATCH // longest, 1, _ROWS_PER_BATCH))
    return encode_rows(rows, tokenizer, max_length, batch_size=size)


def encode_words(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedRows:
    """Tokenise texts that are cut into words.

    Args:
        rows: columns words and perhaps label, of each word.
        tokenizer: of `with_text_ends`.
        max_length: tokens of a row at most.

    Returns:
        Columns input_ids, num_first, was_cut, starts (the place of each word's first token, -1 where it was cut off or
        has none), and label where there is one.
    """
    _check_length(max_length)
    backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009  # the base class does not declare it
    _set_free(backend)
    features = {"input_ids": List(Value("int32")), "num_first": Value("int32"), "was_cut": Value("bool")}
    features |= {"starts": List(Value("int32"))}
    if "label" in rows.column_names:
        features["label"] = List(Value("int64"))
    key = ["tagged tokens", _VERSION, fingerprint_of(rows), backend.to_str(), max_length]
    work = _EncodeWords(tokenizer, max_length)
    encoded = cached_map(rows, work, Features(features), key=key, batch_size=_ROWS_PER_BATCH)
    _set_free(backend)
    return EncodedRows(rows=encoded, num_cut=int(np.sum(encoded["was_cut"])))


def longest_row(asked: int | None, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> int:
    """Tokens of a row at most: as asked, else as the tokenizer says that the model was trained, within its positions.

    Raises:
        SettingsError: more is asked than the model has positions for.
    """
    if asked is not None:
        _check_length(asked)
        if limit is not None and asked > limit:
            raise SettingsError(f"max_length must be at most the model's {limit} positions; got {asked}")
        return asked
    trained: Any = tokenizer.model_max_length
    lengths = [length for length in (limit, trained if trained and trained < _NO_LENGTH else None) if length]
    return max(_LEAST_LENGTH, min(lengths)) if lengths else _NO_LENGTH


class LabelCollator(GlueCollator):
    """Joins encoded rows to a batch.

    Args:
        kind: "classes", "number", "several", or "words" for a tag to each word.
        **options: of `GlueCollator`.
    """

    def __init__(self, *, kind: str, **options: Any) -> None:
        super().__init__(**options)
        self.kind = kind

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Join; labels as the model's loss takes them."""
        batch = super().__call__([{name: row[name] for name in ("input_ids", "num_first")} for row in rows])
        if "label" not in rows[0]:
            return batch
        labels = [row["label"] for row in rows]
        if self.kind == "words":
            batch["labels"] = self._token_labels(rows, labels)
        else:
            batch["labels"] = torch.tensor(labels, dtype=torch.int64 if self.kind == "classes" else torch.float32)
        return batch

    def _token_labels(self, rows: Sequence[Mapping[str, Any]], labels: list[Any]) -> Tensor:
        per_row = []
        for row, tags in zip(rows, labels, strict=True):
            at, tags = np.asarray(row["starts"], dtype=np.int64), np.asarray(tags, dtype=np.int64)
            tokens = np.full(len(row["input_ids"]), IGNORE_INDEX, dtype=np.int64)
            tokens[at[at >= 0]] = tags[at >= 0]
            per_row.append(torch.from_numpy(tokens))
        if self.packed:
            return torch.cat(per_row)[None]
        return torch.nn.utils.rnn.pad_sequence(per_row, batch_first=True, padding_value=IGNORE_INDEX)


class _EncodeWords:
    """The step of `cached_map`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, Sequence[Any]]:
        found = words_to_tokens(self.tokenizer, batch["words"], self.max_length)
        return {**found, "label": batch.get("label", ())}


def words_to_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]], max_length: int
) -> dict[str, list[Any]]:
    """Columns input_ids, num_first, was_cut, starts of texts in words; see `encode_words`."""
    spaced = tokenizer.cls_token_id is None  # byte-level tokens of a word that follows another begin with the space
    given = [[f" {word}" if spaced and at else word for at, word in enumerate(words)] for words in rows]
    found: Any = tokenizer(
        given, is_split_into_words=True, truncation=True, max_length=min(max_length, 1 << 30), verbose=False
    )
    starts = []
    for words, encoding in zip(rows, found.encodings, strict=True):
        first = np.full(len(words), -1, dtype=np.int64)
        for at, word in reversed(list(enumerate(encoding.word_ids))):
            if word is not None:
                first[word] = at
        starts.append(first.tolist())
    return {
        "input_ids": found["input_ids"],
        "num_first": [len(ids) for ids in found["input_ids"]],
        "was_cut": [bool(encoding.overflowing) for encoding in found.encodings],
        "starts": starts,
    }


def _check_length(max_length: int) -> None:
    if max_length < _LEAST_LENGTH:
        raise SettingsError(f"max_length must be at least {_LEAST_LENGTH}; got {max_length}")


def _longest(rows: Dataset, column: str) -> int:
    return pc.max(pc.binary_length(rows.data.column(column))).as_py() or 0  # pyright: ignore


def _set_free(backend: Any) -> None:
    backend.no_truncation()
    backend.no_padding()
