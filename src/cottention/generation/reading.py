"""Reads texts into the state that they are continued from, chunk by chunk: the memory is that of one chunk.

A cosine model keeps the state alone, which has one size however long the text was: of the tokens, the last one is left,
which the model has not read yet and from which the first new one comes. A hybrid does the same, and keeps the keys of
its softmax layers too. A softmax model keeps keys and values, and `generate` goes on with the whole text.

    reading = read_rows(model, [token_ids, other_ids], chunk=2048)
    model.generate(reading.input_ids, attention_mask=reading.attention_mask, past_key_values=reading.cache)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cottention.models import CosineCache
from cottention.models.versions import cache_of

TAIL = 4
"""Last tokens of a text that are kept: how the next one reads depends on the character before, 4 tokens at most."""


@dataclass(frozen=True, kw_only=True)
class ReadState:
    """What a cosine model knows of one text: enough to go on with it, and of one size whatever its length.

    A hybrid with full attention knows every key of those layers beside it.
    """

    cache: CosineCache
    """State of one row, all tokens but the last."""
    tail: tuple[int, ...]
    """The last tokens, `TAIL` at most; the very last is read when the text goes on."""
    occurred: Tensor
    """[vocabulary] bool: tokens that the text has, which is what a repetition penalty asks."""
    num_tokens: int
    """Tokens of the text."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A batch of texts as `generate` continues them."""

    cache: Any
    """What the model has read; None when that is nothing."""
    input_ids: Tensor
    """[B, 1] the last tokens, for a softmax model [B, T] all."""
    attention_mask: Tensor
    """Like `input_ids`, 1 = real."""
    tails: tuple[tuple[int, ...], ...]
    """Each text's last tokens, `TAIL` at most."""
    occurred: Tensor
    """[B, vocabulary] bool, tokens that each text has."""


def read_rows(
    model: PreTrainedModel, rows: Sequence[np.ndarray], *, chunk: int, start: ReadState | None = None
) -> Reading:
    """Read all but the last token of every text.

    Args:
        model: a CottentionGPTForCausalLM.
        rows: each text's tokens; none of them empty, unless there is a `start`.
        chunk: tokens of each text read at a time.
        start: of the text that all of these go on from; models with states only.
    """
    keeps_states = model.config.keeps_states
    occurred = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=model.device)
    cache = None
    if start is not None:
        rows = [np.concatenate([np.asarray(start.tail[-1:], dtype=np.int32), row]) for row in rows]
        cache = CosineCache.from_tensors(start.cache.to_tensors())
        cache.batch_repeat_interleave(len(rows))
        occurred |= start.occurred.to(model.device)
    for row, has in zip(rows, occurred, strict=True):
        has[torch.from_numpy(np.unique(row).astype(np.int64)).to(model.device)] = True
    cache = (_prefill_states if keeps_states else _prefill_softmax)(model, rows, chunk, cache)
    if keeps_states:
        input_ids = torch.tensor([[int(row[-1])] for row in rows], device=model.device)
        attention_mask = torch.ones_like(input_ids)
        if cache is not None:
            cache.restart_columns()
    else:
        input_ids, attention_mask = _columns(rows, 0, max(map(len, rows)), model.device)
    before = () if start is None else start.tail[:-1]
    tails = tuple((*before, *row[-TAIL:].tolist())[-TAIL:] for row in rows)
    return Reading(cache=cache, input_ids=input_ids, attention_mask=attention_mask, tails=tails, occurred=occurred)


def read_one(model: PreTrainedModel, row: np.ndarray, *, chunk: int, start: ReadState | None = None) -> ReadState:
    """Read one text with a cosine or hybrid model, to go on from it later, any number of times; see `read_rows`."""
    reading = read_rows(model, [row], chunk=chunk, start=start)
    return ReadState(
        cache=_unread(model) if reading.cache is None else reading.cache,
        tail=reading.tails[0],
        occurred=reading.occurred[0],
        num_tokens=len(row) + (0 if start is None else start.num_tokens),
    )


def state_bytes(cache: Any) -> int:
    """Bytes of all tensors that a transformers cache holds."""
    layers = getattr(cache, "layers", None) or ()
    return sum(_bytes_in(value) for layer in layers for value in vars(layer).values())


def _bytes_in(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_in, value)) if isinstance(value, (tuple, list)) else 0


def _prefill_states(model: PreTrainedModel, rows: Sequence[np.ndarray], chunk: int, cache: Any) -> Any:
    longest = max(map(len, rows))
    is_padded = any(len(row) != longest for row in rows)
    first = 0 if cache is None else cache.next_position[:, None]
    for start in range(0, longest - 1, chunk):
        ids, mask = _columns(rows, start, min(start + chunk, longest - 1), model.device)
        where: dict[str, Any] = {}
        if is_padded:
            # A row's own count, in which padding has no part, so a padded text is read as if it stood alone.
            pads = torch.tensor([[longest - len(row)] for row in rows], device=model.device)
            positions = torch.arange(start, start + ids.shape[1], device=model.device) - pads
            where = {"attention_mask": mask, "position_ids": positions.clamp(min=0) + first}
        # Without the head: nobody asks for these tokens' logits.
        cache = cache_of(model.base_model(ids, past_key_values=cache, use_cache=True, **where))
    return cache


def _prefill_softmax(model: PreTrainedModel, rows: Sequence[np.ndarray], chunk: int, cache: Any) -> Any:
    longest = max(map(len, rows))
    ids, mask = _columns(rows, 0, longest, model.device)
    # The same positions that `generate` counts.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for start in range(0, longest - 1, chunk):
        end = min(start + chunk, longest - 1)
        output = model.base_model(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = cache_of(output)
    return cache


def _columns(rows: Sequence[np.ndarray], start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns of the batch, texts ending together: tokens and mask, which is 0 where a row has not begun.

    There stands the row's own first token, which a repetition penalty has counted anyway.
    """
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), end - start), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
        pads = longest - len(row)
        begin = max(pads - start, 0)
        row_ids[:begin] = row[0]
        row_ids[begin:] = row[max(start - pads, 0) : max(end - pads, 0)]
        row_mask[begin:] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _unread(model: PreTrainedModel) -> CosineCache:
    """The cache before the first token, as tensors, so that it can be saved."""
    body: Any = model.base_model
    cache = CosineCache(len(body.h))
    for layer, block in zip(cache.layers, body.h, strict=True):
        layer.advance(block.attn.empty_state(1), num_tokens=0)
    cache.next_position = torch.zeros(1, dtype=torch.int64, device=model.device)
    return cache
