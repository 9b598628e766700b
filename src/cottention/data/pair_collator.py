"""Next-sentence examples to batches: [CLS] first [SEP] second [SEP], masked, packed end to end or padded.

Packed, a batch is one row with `cu_seqlens`, and nothing is computed on padding anywhere. What is masked follows from
seed, pass and row alone, whatever the form and whoever the neighbours.

    collator = PairCollator(tokenizer, seed=0)
    batch = collator(PairExamples([pairs], max_length=128).examples(rows, passes))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cottention.data.masking import IGNORED, TokenMasking, shares_of
from cottention.data.pair_examples import NUM_SPECIAL, pair_generator
from cottention.errors import SettingsError


class PairCollator:
    """Joins examples of `PairExamples` to what a BERT with both heads reads.

    Packed: input_ids, token_type_ids, position_ids, labels `[1, T]`, cu_seqlens `[N + 1]`, next_sentence_label `[N]`.
    Padded: input_ids, attention_mask, token_type_ids, labels `[N, longest]`, next_sentence_label `[N]`.

    Args:
        tokenizer: has [CLS], [SEP] and [MASK].
        mlm_probability: share of the tokens that are targets, of examples that carry no share of their own.
        seed: of the masking.
        whole_words: mask the pieces of a word together.
        unpadded: pack instead of padding.

    Raises:
        SettingsError: the tokenizer is not a BERT's, or a number makes no sense.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mlm_probability: float = 0.15,
        seed: int = 0,
        whole_words: bool = False,
        unpadded: bool = True,
    ) -> None:
        self._masking = TokenMasking(tokenizer, mlm_probability, whole_words)
        special: dict[str, Any] = {name: getattr(tokenizer, f"{name}_id") for name in ("cls_token", "sep_token")}
        if missing := [name for name, number in special.items() if number is None]:
            raise SettingsError(f"the tokenizer has no {', '.join(missing)}; sentence pairs need BERT's tokens")
        if seed < 0:
            raise SettingsError(f"the seed of the masking must be 0 or more; got {seed}")
        self._cls = np.array([special["cls_token"]])
        self._sep = np.array([special["sep_token"]])
        self._pad_token_id: int = tokenizer.pad_token_id or 0  # pyright: ignore[reportAttributeAccessIssue]
        self._seed = seed
        self._unpadded = unpadded

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Join and mask."""
        cls, sep = self._cls, self._sep
        ids = np.concatenate([part for one in examples for part in (cls, one["first"], sep, one["second"], sep)])
        lengths = np.array([len(one["first"]) + len(one["second"]) + NUM_SPECIAL for one in examples])
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(len(ids)) - np.repeat(starts, lengths)
        second_starts = np.array([len(one["first"]) + 2 for one in examples])  # behind the first [SEP]
        types = (positions >= np.repeat(second_starts, lengths)).astype(np.int64)
        draws = np.concatenate(
            [self._draws(one, int(length)) for one, length in zip(examples, lengths, strict=True)], axis=1
        )
        masked, labels = self._masking.apply(ids, starts, draws, shares_of(examples))
        is_random = np.array([one["is_random"] for one in examples], dtype=np.int64)
        label = {"next_sentence_label": torch.from_numpy(is_random)}
        if self._unpadded:
            flat = {"input_ids": masked, "token_type_ids": types, "position_ids": positions, "labels": labels}
            bounds = torch.from_numpy(np.append(starts, len(ids)).astype(np.int32))
            return {**{name: torch.from_numpy(row)[None] for name, row in flat.items()}, "cu_seqlens": bounds, **label}
        real = np.arange(lengths.max()) < lengths[:, None]  # [N, longest]
        filling = {"input_ids": self._pad_token_id, "token_type_ids": 0, "labels": IGNORED}
        batch = {"attention_mask": torch.from_numpy(real.astype(np.int64))}
        for (name, value), flat_values in zip(filling.items(), (masked, types, labels), strict=True):
            padded = np.full(real.shape, value, dtype=np.int64)
            padded[real] = flat_values
            batch[name] = torch.from_numpy(padded)
        return {**batch, **label}

    def _draws(self, example: Mapping[str, Any], length: int) -> np.ndarray:
        """Three uniform numbers per token."""
        generator = pair_generator(self._seed, example["pass_number"], example["row"], masks=True)
        return generator.random((3, length))
