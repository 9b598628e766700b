"""Softmax attention over a window equals the formula with a window's mask, whatever is padded, packed or cached."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig
from transformers.masking_utils import create_sliding_window_causal_mask

from cottention import SoftmaxAttention
from cottention.layers import WindowState, softmax_attention, softmax_map
from cottention.models.versions import CACHE_NAME

LENGTHS = (1, 2, 63, 64, 65, 129, 257, 300)
WINDOWS = (1, 2, 7, 63, 64, 65, 100, 1000)


def written_out(q: Tensor, k: Tensor, v: Tensor, window: int, real: Tensor | None = None) -> Tensor:
    """Token by token: the last `window` real tokens up to itself."""
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    real = torch.ones(B, S, dtype=torch.bool) if real is None else real
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype)
    for b in range(B):
        for t in range(T):
            if not real[b, S - T + t]:
                continue
            (seen,) = real[b, : S - T + t + 1].nonzero(as_tuple=True)
            seen = seen[-window:]
            scores = torch.einsum("hk,shk->hs", q[b, t], k[b, seen]) / q.shape[-1] ** 0.5
            o[b, t] = torch.einsum("hs,shv->hv", scores.softmax(-1), v[b, seen])
    return o


def qkv(B: int, T: int, S: int | None = None) -> list[Tensor]:
    S = T if S is None else S
    return [torch.randn(B, n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (T, S, S)]


def some_mask(B: int, S: int, kind: str) -> Tensor | None:
    columns = torch.arange(S)
    masks = {
        "none": None,
        "left": torch.stack([columns >= S // 3] * B),
        "right": torch.stack([columns < S - S // 3] * B),
        "holes": torch.rand(B, S) > 0.4,
        "nothing": torch.zeros(B, S, dtype=torch.bool),
    }
    return masks[kind]


def check(T: int, S: int, window: int, kind: str) -> None:
    q, k, v = qkv(2, T, S)
    mask = some_mask(2, S, kind)
    real = torch.ones(2, T, dtype=torch.bool) if mask is None else mask[:, S - T :]
    got = softmax_attention(q, k, v, causal=True, attention_mask=mask, sliding_window=window)
    assert got.isfinite().all()
    expected = written_out(q, k, v, window, mask)
    torch.testing.assert_close(got[real], expected[real])
    if not real.any():
        return
    toward = torch.randn_like(got).masked_fill(~real[..., None, None], 0)
    grads = torch.autograd.grad((got * toward).sum(), (q, k, v))
    for grad, truth in zip(grads, torch.autograd.grad((expected * toward).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, truth)


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes", "nothing"])
@pytest.mark.parametrize(("T", "S", "window"), [(150, 150, 3), (70, 70, 50), (1, 40, 5), (5, 210, 64), (140, 150, 11)])
def test_equals_the_formula(T: int, S: int, window: int, kind: str) -> None:
    if kind == "nothing":
        q, k, v = qkv(2, T, S)
        mask = some_mask(2, S, kind)
        assert softmax_attention(q, k, v, causal=True, attention_mask=mask, sliding_window=window).isfinite().all()
    else:
        check(T, S, window, kind)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_drawn_shapes_equal_the_formula(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    S = draw.choice(LENGTHS)
    T = draw.choice([S, S, max(S // 2, 1), 1])
    check(T, S, draw.choice(WINDOWS), draw.choice(["none", "left", "right", "holes"]))


@pytest.mark.parametrize("T", [40, 200])
def test_the_band_is_the_one_of_transformers(T: int) -> None:
    make: Any = MistralConfig
    config = make(sliding_window=17, attn_implementation="sdpa")
    embeds = torch.zeros(1, T, config.hidden_size)
    position_ids = torch.arange(T)[None]
    settings: dict[str, Any] = {CACHE_NAME: None}
    theirs = create_sliding_window_causal_mask(
        config=config, inputs_embeds=embeds, attention_mask=None, position_ids=position_ids, **settings
    )
    assert theirs is not None
    q, k, v = qkv(1, T)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=theirs
    ).transpose(1, 2)
    torch.testing.assert_close(softmax_attention(q, k, v, causal=True, sliding_window=17), expected)
    seen = softmax_map(q, k, causal=True, sliding_window=17) > 0
    assert torch.equal(seen, theirs.bool().expand_as(seen))


@pytest.mark.parametrize("window", [3, 70])
def test_packed_equals_separate(window: int) -> None:
    q, k, v = qkv(1, 330)
    bounds = torch.tensor([0, 1, 1, 200, 330], dtype=torch.int32)
    got = softmax_attention(q, k, v, causal=True, cu_seqlens=bounds, sliding_window=window)
    parts = [slice(a, b) for a, b in ((0, 1), (1, 200), (200, 330))]
    for part in parts:
        alone = softmax_attention(q[:, part], k[:, part], v[:, part], causal=True, sliding_window=window)
        torch.testing.assert_close(got[:, part], alone)


def layer_of(window: Any, **settings: Any) -> Any:
    layer = SoftmaxAttention(24, 3, causal=True, sliding_window=window, **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return layer.eval()


@pytest.mark.parametrize("window", [1, 2, 5, 90])
def test_a_state_holds_the_window_and_goes_on_from_any_split(window: int) -> None:
    layer, x = layer_of(window, rotary_dim=4), torch.randn(3, 150, 24, dtype=torch.float64)
    mask = torch.rand(3, 150) > 0.3
    whole, _ = layer(x, attention_mask=mask)
    cuts = [0, 3, 4, 5, 6, 6, 80, 149, 150]
    state, parts = None, []
    for a, b in pairwise(cuts):
        o, state = layer(x[:, a:b], attention_mask=mask[:, a:b], initial_state=state, output_final_state=True)
        parts.append(o)
        assert isinstance(state, WindowState)
        assert state.k.shape[1] < window or (window == 1 and state.k.shape[1] == 0)
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask], whole[mask])
    assert isinstance(state, WindowState)
    assert torch.equal(state.seen, mask.sum(-1))


def test_holes_change_nothing() -> None:
    layer, x = layer_of(6, rotary_dim=4), torch.randn(1, 90, 24, dtype=torch.float64)
    (where,) = (torch.rand(200) > 0.5).nonzero(as_tuple=True)
    where = where[:90]
    spread, mask = torch.randn(1, 200, 24, dtype=torch.float64), torch.zeros(1, 200, dtype=torch.int64)
    spread[:, where], mask[:, where] = x[:, : len(where)], 1
    torch.testing.assert_close(layer(spread, attention_mask=mask)[0][:, where], layer(x[:, : len(where)])[0])


def test_memory_is_that_of_a_band() -> None:
    """The largest tensor that the graph holds grows with T, not with its square."""
    largest = []
    for T in (1024, 2048):
        sizes: list[int] = []
        q, k, v = (x.float().detach().requires_grad_() for x in qkv(1, T))

        def note(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            softmax_attention(q, k, v, causal=True, sliding_window=32)
        largest.append(max(sizes))
    assert largest[1] < 2.2 * largest[0] < 1024 * 1024


def test_impossible_windows_are_named() -> None:
    q, k, v = qkv(1, 5)
    with pytest.raises(ValueError, match=r"^sliding_window must be at least 1 token, of causal=True; got 0"):
        softmax_attention(q, k, v, causal=True, sliding_window=0)
    with pytest.raises(ValueError, match=r"^sliding_window must be .*got 3 and causal=False"):
        SoftmaxAttention(24, 3, causal=False, sliding_window=3)
    with pytest.raises(TypeError, match=r"^sliding_window must be an int or None; got '3'"):
        layer_of("3")
