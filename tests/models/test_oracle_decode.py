"""Decoding reproduces the original: by tokens, in chunks, in one pass, behind padding, and through generate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.helpers import FIXTURES, published_folder, published_model, relative_error

# (against the reference, among ourselves)
TOLERANCES = {torch.float64: (1e-11, 1e-12), torch.float32: (1e-5, 5e-6)}


@pytest.fixture(params=["fixtures", "shared"])
def where(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def reference(request: pytest.FixtureRequest, where: str) -> dict[str, Any]:
    root = FIXTURES if where == "fixtures" else request.getfixturevalue("oracle_dir")
    return dict(np.load(root / "decode" / "decode.npz"))


@pytest.fixture(params=list(TOLERANCES), ids=str)
def model(request: pytest.FixtureRequest, where: str) -> Any:
    return published_model(published_folder(request, where, "gpt_rot8"), request.param)


def in_parts(model: Any, tokens: Tensor, sizes: list[int], mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """Logits of a text that goes in a few tokens at a time, and the cache after it."""
    cache, parts, a = None, [], 0
    for size in sizes:
        part_mask = None if mask is None else mask[:, : a + size]
        with torch.no_grad():
            out = model(tokens[:, a : a + size], part_mask, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
        a += size
    return torch.cat(parts, dim=1), cache


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [40] + [1] * 20, [7, 1, 30, 22], [1, 59]], ids=str)
def test_any_split_equals_one_pass_and_the_original(model: Any, reference: dict[str, Any], sizes: list[int]) -> None:
    tolerance, own_tolerance = TOLERANCES[model.dtype]
    tokens = torch.from_numpy(reference["sequence"])[None]
    whole = model(tokens, use_cache=False).logits
    logits, cache = in_parts(model, tokens, sizes)
    assert relative_error(logits, whole.detach()) < own_tolerance
    assert relative_error(logits[0], reference["full_f64"]) < tolerance
    states = torch.stack([state.kv[0] for state in cache.states]).transpose(-1, -2)  # theirs is [V, K]
    assert relative_error(states, reference["final_state_f64"]) < tolerance


@pytest.mark.parametrize("sizes", [[66], [1] * 66, [5] * 13 + [1]], ids=str)
def test_left_padding_equals_no_padding(model: Any, reference: dict[str, Any], sizes: list[int]) -> None:
    tolerance, own_tolerance = TOLERANCES[model.dtype]
    pads = int(reference["left_pad_count"])
    tokens = torch.from_numpy(np.concatenate([np.zeros(pads, dtype=np.int64), reference["sequence"]]))[None]
    mask = (torch.arange(len(tokens[0])) >= pads)[None].long()
    logits, _ = in_parts(model, tokens, sizes, mask)
    assert relative_error(logits[0, pads:], reference["left_pad_full_f64"]) < tolerance
    # Rotary is relative, but its float32 angles are not: a shift by six moves the logits by 6e-8.
    assert relative_error(logits[0, pads:], reference["full_f64"]) < max(tolerance, 2e-7)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    unshifted = model(tokens, mask, position_ids=positions, use_cache=False).logits
    assert relative_error(unshifted[0, pads:], reference["full_f64"]) < max(tolerance, own_tolerance)


@pytest.mark.parametrize("prefill_chunk_size", [None, 1, 7, 100])
def test_generate_writes_the_original_tokens(
    model: Any, reference: dict[str, Any], prefill_chunk_size: int | None
) -> None:
    prompt = torch.from_numpy(reference["prompt"])[None]
    got = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=199,
        prefill_chunk_size=prefill_chunk_size,
    )
    assert got[0, 40:].tolist() == reference["greedy_tokens"].tolist()


@pytest.mark.parametrize("prefill_chunk_size", [None, 5])
def test_generate_writes_the_same_behind_left_padding(
    model: Any, reference: dict[str, Any], prefill_chunk_size: int | None
) -> None:
    prompt = torch.from_numpy(reference["prompt"])[None]
    pads = torch.zeros(1, 9, dtype=torch.int64)
    batch = torch.cat([torch.cat([pads, prompt], dim=1), torch.cat([prompt, prompt[:, :9]], dim=1)])
    mask = torch.ones_like(batch)
    mask[0, :9] = 0
    got = model.generate(
        batch,
        attention_mask=mask,
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=199,
        prefill_chunk_size=prefill_chunk_size,
    )
    assert got[0, 49:].tolist() == reference["greedy_tokens"].tolist()
