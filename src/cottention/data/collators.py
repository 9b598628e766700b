"""Windows to batches: next-token batches for GPT, masked batches for BERT.

Both take rows of `pack_windows` / `pack_mlm_windows` (dicts with input_ids, num_tokens, document_starts) and return a
dict of tensors for the model's forward. Neither keeps state between calls, so a batch depends only on its rows (and the
masking on seed and pass): number of workers, order and resuming do not change what the model sees.

    loader = DataLoader(windows, batch_size=8, collate_fn=CausalCollator(reset_at_documents=True))
    collator = MaskedLMCollator(tokenizer, seed=0)
    collator.set_epoch(1)                      # each pass masks other tokens; a row's own `pass_number` comes first
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cottention.data.masking import IGNORED, TokenMasking, shares_of
from cottention.errors import SettingsError


class CausalCollator:
    """Batches for next-token prediction; labels are Hugging Face labels, the model shifts them.

    A window's first token and padding are no targets. Everything else is, end-of-text included: it is the target of a
    document's last token and the input before the next document's first.

    Without `reset_at_documents` a batch is input_ids, labels [B, T] (and attention_mask, only where a row is padded):
    attention runs over all of a window. With it the rows are joined to [1, B*T] beside `cu_seqlens` (int32, bounds of
    rows and of documents inside them) and `position_ids` that start again at each bound: no document sees another.
    Then `shift_labels` holds the targets too, already shifted: a document's last token still has the end-of-text as its
    target, although that stands beyond the bound, where a model that shifts labels itself must not look.

    Args:
        reset_at_documents: keep documents apart.
    """

    def __init__(self, reset_at_documents: bool = False) -> None:
        self.reset_at_documents = reset_at_documents

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Join rows of one length to a batch."""
        input_ids = np.stack([np.asarray(row["input_ids"]) for row in rows]).astype(np.int64)  # [B, T]
        real = _is_real(rows, input_ids.shape[1])
        labels = np.where(real, input_ids, IGNORED)
        labels[:, 0] = IGNORED
        if self.reset_at_documents:
            return _flattened(rows, input_ids, labels)
        batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        return batch if real.all() else {**batch, "attention_mask": torch.from_numpy(real.astype(np.int64))}


class MaskedLMCollator:
    """Batches for masked-language modelling, by the rule of `TokenMasking`.

    Padding is never a target. What is masked follows from seed, pass over the data and the row's own tokens alone.

    transformers' DataCollatorForLanguageModeling draws from one stream, so that its masks change with the order of
    rows, the number of workers and a resumed run, and its random tokens include the special ones; hence this one.

    Args:
        tokenizer: tells the special tokens and the vocabulary.
        mlm_probability: share of the tokens that are targets, of rows that carry no share of their own under this name.
        seed: of the masking.
        whole_words: mask the pieces of a word together.

    Raises:
        SettingsError: the tokenizer has no mask token, the probability is not in (0, 1), or the seed is negative.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float = 0.15,
        seed: int = 0,
        *,
        whole_words: bool = False,
    ) -> None:
        self._masking = TokenMasking(tokenizer, mlm_probability, whole_words)
        if seed < 0:
            raise SettingsError(f"the seed of the masking must be 0 or more; got {seed}")
        self.pad_token_id: int = tokenizer.pad_token_id or 0  # pyright: ignore[reportAttributeAccessIssue]
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the masks of another pass over the data, for rows that carry no pass_number of their own."""
        self.epoch = epoch

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Join rows to a batch, padded to the longest, and mask it."""
        sequences = [np.asarray(row["input_ids"]) for row in rows]
        longest = max(map(len, sequences))
        input_ids = np.full((len(rows), longest), self.pad_token_id, dtype=np.int64)  # [B, T]
        for row, sequence in zip(input_ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        real = _is_real(rows, longest)
        lengths = real.sum(axis=1)
        passes = [int(row.get("pass_number", self.epoch)) for row in rows]
        per_row = zip(input_ids, lengths, passes, strict=True)
        draws = np.concatenate([self._draws(ids[:num_real], number) for ids, num_real, number in per_row], axis=1)
        labels = np.full_like(input_ids, IGNORED)
        # Without padding in between, how far a row is padded, which its neighbours decide, changes nothing.
        starts = np.cumsum(lengths) - lengths
        input_ids[real], labels[real] = self._masking.apply(input_ids[real], starts, draws, shares_of(rows))
        batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        return batch if real.all() else {**batch, "attention_mask": torch.from_numpy(real.astype(np.int64))}

    def _draws(self, tokens: np.ndarray, pass_number: int) -> np.ndarray:
        """Three uniform numbers per token, [3, T], from a generator that belongs to this row and pass."""
        # Tokens rather than a row number: they are known wherever the row comes from, whatever selected or shuffled it.
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
        key = (self.seed, pass_number, int.from_bytes(digest, "little"))
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random((3, len(tokens)))


def _is_real(rows: Sequence[Mapping[str, Any]], length: int) -> np.ndarray:
    """[B, T]: which positions hold a token; rows that do not say are whole."""
    num_tokens = np.array([row.get("num_tokens", len(row["input_ids"])) for row in rows])
    return np.arange(length) < num_tokens[:, None]


def _flattened(rows: Sequence[Mapping[str, Any]], input_ids: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    num_rows, length = input_ids.shape
    starts = [np.concatenate([[0], np.asarray(row["document_starts"])]) + i * length for i, row in enumerate(rows)]
    bounds = np.unique(np.concatenate([*starts, [num_rows * length]])).astype(np.int64)
    position_ids = np.arange(num_rows * length) - np.repeat(bounds[:-1], np.diff(bounds))
    return {
        "input_ids": torch.from_numpy(input_ids.reshape(1, -1)),
        "labels": torch.from_numpy(labels.reshape(1, -1)),
        "shift_labels": torch.from_numpy(np.append(labels.reshape(-1)[1:], IGNORED)[None]),
        "position_ids": torch.from_numpy(position_ids[None]),
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
    }
