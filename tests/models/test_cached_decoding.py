"""Cached decoding equals the full forward at every position: padding, any chunks, reordering, saving, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cottention.models import CosineCache, CottentionGPTForCausalLM
from tests.models.helpers import ATTENTION_TYPES, gpt_config, randomised, some_tokens

LENGTHS = (150, 101, 1)  # of the texts, which end together


def gpt(attention_type: str) -> Any:
    model = CottentionGPTForCausalLM(gpt_config(attention_type, n_positions=256))
    return randomised(model, torch.float32)


def full(model: Any, text: Tensor) -> Tensor:
    with torch.no_grad():
        return model(text[None], use_cache=False).logits[0]


def batch() -> tuple[list[Tensor], Tensor, Tensor]:
    """The texts alone, and padded on the left with their mask."""
    longest = max(LENGTHS)
    texts = [some_tokens(1, length, seed=length)[0] for length in LENGTHS]
    ids = torch.stack([torch.cat([torch.zeros(longest - len(text), dtype=torch.int64), text]) for text in texts])
    mask = torch.stack([(torch.arange(longest) >= longest - len(text)).long() for text in texts])
    return texts, ids, mask


def cached(model: Any, ids: Tensor, mask: Tensor, sizes: list[int], change: Any = None) -> Tensor:
    """Logits of a batch that goes in a few columns at a time; `change` is done to the cache between them."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, logits, start = None, [], 0
    for size in sizes:
        end = start + size
        with torch.no_grad():
            out = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
        logits.append(out.logits)
        cache = out.past_key_values if change is None else change(out.past_key_values)
        start = end
    return torch.cat(logits, dim=1)


def sizes_of(chunk: int, num_prompt: int = 140) -> list[int]:
    """A prompt in chunks, then single tokens."""
    chunks = [chunk] * (num_prompt // chunk) + ([num_prompt % chunk] if num_prompt % chunk else [])
    return [*chunks, *[1] * (max(LENGTHS) - num_prompt)]


def assert_equal_at_every_position(logits: Tensor, model: Any, texts: list[Tensor]) -> None:
    for row, text in zip(logits, texts, strict=True):
        expected = full(model, text)
        error = (row[-len(text) :] - expected).abs().max() / expected.abs().max()
        assert error < 1e-4


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 140])
def test_left_padding_and_chunks_of_any_size(attention_type: str, chunk: int) -> None:
    model, (texts, ids, mask) = gpt(attention_type), batch()
    assert_equal_at_every_position(cached(model, ids, mask, sizes_of(chunk)), model, texts)


@pytest.mark.parametrize("chunk", [1, 7, 64, 140])
def test_a_state_that_is_saved_and_loaded_between_all_parts(chunk: int, tmp_path: Path) -> None:
    def through_a_file(cache: CosineCache) -> CosineCache:
        save_file(cache.to_tensors(), tmp_path / "state")
        return CosineCache.from_tensors(load_file(tmp_path / "state"))

    model, (texts, ids, mask) = gpt("cosine"), batch()
    assert_equal_at_every_position(cached(model, ids, mask, sizes_of(chunk), through_a_file), model, texts)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_beams_that_change_places_at_every_step(attention_type: str) -> None:
    model, prompt = gpt(attention_type), some_tokens(1, 40, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        cache = out.past_key_values
        cache.batch_repeat_interleave(4)
        beams = prompt.repeat(4, 1)
        for _ in range(25):
            from_where = torch.randint(4, (4,), generator=generator)
            following = torch.randint(1, 61, (4, 1), generator=generator)
            cache.reorder_cache(from_where)
            beams = torch.cat([beams[from_where], following], dim=1)
            logits = model(following, past_key_values=cache, use_cache=True).logits[:, -1]
            expected = model(beams, use_cache=False).logits[:, -1]
            assert (logits - expected).abs().max() / expected.abs().max() < 1e-4


def test_columns_that_are_counted_anew_change_nothing() -> None:
    def restarted(cache: CosineCache) -> CosineCache:
        cache.restart_columns()
        assert cache.get_seq_length() == 0
        return cache

    model, (texts, ids, mask) = gpt("cosine"), batch()
    positions, cache, logits, start = (mask.cumsum(-1) - 1).clamp(min=0), None, [], 0
    for size in sizes_of(7):
        columns = slice(start, start + size)
        with torch.no_grad():
            out = model(ids[:, columns], mask[:, columns], positions[:, columns], cache, use_cache=True)
        logits.append(out.logits)
        cache, start = restarted(out.past_key_values), start + size
    assert_equal_at_every_position(torch.cat(logits, dim=1), model, texts)
