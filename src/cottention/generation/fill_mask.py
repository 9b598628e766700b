"""Fills the masks of texts with a BERT: the likeliest tokens for each mask, several masks a text, texts in batches.

Logits are computed at the masks alone: at every position of a batch they would be the largest thing in memory.

    for filled in fill_mask(model, tokenizer, ["The capital of France is [MASK]."], top_k=3):
        print(filled.best_text, filled.masks[0])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.errors import SettingsError
from cottention.generation.encoding import encode
from cottention.models.configuration import check_vocabulary


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One token for one mask."""

    token: str
    """As in the vocabulary; a leading ## joins it to the word before."""
    token_id: int
    """Its number."""
    probability: float
    """Of this token at this mask, the other masks being unknown."""


@dataclass(frozen=True, kw_only=True)
class FilledText:
    """What one text became."""

    text: str
    """As given."""
    best_text: str
    """The text with each mask's likeliest token in its place."""
    masks: tuple[tuple[Candidate, ...], ...]
    """For each mask, from left to right, its candidates, the likeliest first."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)


def fill_mask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    top_k: int = 5,
    *,
    batch_size: int = 32,
) -> list[FilledText]:
    """Find the likeliest tokens for every mask.

    Args:
        model: a CottentionBertForMaskedLM.
        tokenizer: the model's own; its mask token marks the places to fill.
        texts: one text or several.
        top_k: candidates for each mask.
        batch_size: texts read together; the result does not depend on it.

    Returns:
        One entry per text, in the order given.

    Raises:
        SettingsError: a text has no mask or is too long, a number makes no sense, or the tokenizer is not the model's.
        DataError: a text is none.
    """
    check_vocabulary(tokenizer, model.config)
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not 1 <= top_k <= model.config.vocab_size:
        raise SettingsError(f"top_k must be from 1 to the vocabulary's {model.config.vocab_size}; got {top_k}")
    if batch_size < 1:
        raise SettingsError(f"batch_size must be at least 1; got {batch_size}")
    # All texts are checked before the first is read, so that a mistake in the last one costs nothing.
    rows = [_encode(model, tokenizer, text, number, len(texts)) for number, text in enumerate(texts, start=1)]
    # Texts of like length together waste the least on padding.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    filled: dict[int, FilledText] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        results = _fill_batch(model, tokenizer, [texts[index] for index in chosen], [rows[i] for i in chosen], top_k)
        filled.update(zip(chosen, results, strict=True))
    return [filled[index] for index in range(len(texts))]


@torch.inference_mode()
def _fill_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], rows: list[list[int]], top_k: int
) -> list[FilledText]:
    longest = max(map(len, rows))
    pad_id = tokenizer.pad_token_id or 0
    input_ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], device=model.device)
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=model.device)
    hidden = model.base_model(input_ids, attention_mask=real).last_hidden_state  # [B, T, D]
    is_mask = (input_ids == tokenizer.mask_token_id) & (real == 1)
    head: Any = model.cls.predictions  # pyright: ignore[reportAttributeAccessIssue]
    logits = head(hidden[is_mask])  # [masks of the batch, vocab]
    best = logits.float().softmax(-1).topk(top_k)

    results, first = [], 0
    for text, row, num_masks in zip(texts, rows, is_mask.sum(1).tolist(), strict=True):
        masks = tuple(
            _candidates(tokenizer, best.values[mask], best.indices[mask]) for mask in range(first, first + num_masks)
        )
        first += num_masks
        results.append(FilledText(text=text, best_text=_filled(tokenizer, text, row, masks), masks=masks))
    return results


def _candidates(tokenizer: PreTrainedTokenizerBase, probabilities: Tensor, token_ids: Tensor) -> tuple[Candidate, ...]:
    ids: list[int] = token_ids.tolist()
    return tuple(
        Candidate(token=_name(tokenizer, token_id), token_id=token_id, probability=probability)
        for token_id, probability in zip(ids, probabilities.tolist(), strict=True)
    )


def _name(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    # A model may have more embeddings than its tokenizer has tokens.
    token = tokenizer.convert_ids_to_tokens(token_id)
    return token if isinstance(token, str) else f"[{token_id}]"


def _filled(
    tokenizer: PreTrainedTokenizerBase, text: str, row: list[int], masks: tuple[tuple[Candidate, ...], ...]
) -> str:
    """Put the likeliest tokens where the text itself has its masks, so that the rest stays as it was written."""
    parts = text.split(str(tokenizer.mask_token))
    if len(parts) != len(masks) + 1:
        # The tokenizer normalised something into a mask; then only its own view of the text is left.
        ids = iter([candidates[0].token_id for candidates in masks])
        filled = [next(ids) if token == tokenizer.mask_token_id else token for token in row]
        return str(tokenizer.decode(filled, skip_special_tokens=True))
    whole = parts[0]
    for candidates, part in zip(masks, parts[1:], strict=True):
        whole = _appended(tokenizer, whole, candidates[0]) + part
    return whole


def _appended(tokenizer: PreTrainedTokenizerBase, text: str, candidate: Candidate) -> str:
    if candidate.token.startswith("##"):
        return text.rstrip() + candidate.token[2:]
    # Byte-level tokens bring their own space, and the text may have one before its mask.
    written = str(tokenizer.decode([candidate.token_id])) or candidate.token
    return text + (written.lstrip(" ") if text.endswith(" ") else written)


def _encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, number: int, num_texts: int
) -> list[int]:
    which = "the text" if num_texts == 1 else f"text {number}"
    if tokenizer.mask_token_id is None:
        raise SettingsError("this model's tokenizer has no mask token")
    token_ids = encode(tokenizer, text, which).tolist()
    if tokenizer.mask_token_id not in token_ids:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise SettingsError(f"{which} has no {tokenizer.mask_token} to fill; got {shown!r}")
    limit = model.config.longest_text
    if limit is not None and len(token_ids) > limit:
        raise SettingsError(f"{which} has {len(token_ids)} tokens; this model has {limit} positions")
    return token_ids
