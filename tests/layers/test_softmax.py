"""softmax_attention equals softmax attention written out, under every kind of mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cottention.layers import softmax_attention


def written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool, attention_mask: Tensor | None = None) -> Tensor:
    scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    T, S = scores.shape[-2:]
    if causal:
        scores = scores.masked_fill(torch.ones(T, S).tril(S - T) == 0, float("-inf"))
    if attention_mask is not None:
        scores = scores.masked_fill(attention_mask[:, None, None] == 0, float("-inf"))
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


def qkv(B: int = 2, T: int = 7, S: int | None = None) -> list[Tensor]:
    sizes = ((B, T, 3, 8), (B, T if S is None else S, 3, 8), (B, T if S is None else S, 3, 8))
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T", [1, 7])
def test_equals_the_formula(causal: bool, T: int) -> None:
    q, k, v = qkv(T=T)
    torch.testing.assert_close(softmax_attention(q, k, v, causal=causal), written_out(q, k, v, causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 0]])
def test_real_tokens_ignore_padding(causal: bool, mask: list[int]) -> None:
    q, k, v = qkv()
    attention_mask = torch.tensor([mask, [1] * 7])
    got = softmax_attention(q, k, v, causal=causal, attention_mask=attention_mask)
    real = attention_mask.bool()
    torch.testing.assert_close(got[real], written_out(q, k, v, causal, attention_mask)[real])
    assert got.isfinite().all()


@pytest.mark.parametrize("T", [1, 3])
def test_queries_continue_cached_keys(T: int) -> None:
    q, k, v = qkv(T=T, S=9)
    whole_q = torch.cat([torch.randn(2, 9 - T, 3, 8, dtype=torch.float64), q], dim=1)
    got = softmax_attention(q, k, v, causal=True)
    torch.testing.assert_close(got, softmax_attention(whole_q, k, v, causal=True)[:, -T:])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    got = softmax_attention(q, k, v, causal=True, attention_mask=mask)
    torch.testing.assert_close(got, softmax_attention(whole_q, k, v, causal=True, attention_mask=mask)[:, -T:])


@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_separate(causal: bool) -> None:
    q, k, v = qkv(B=1, T=12)
    cu_seqlens = torch.tensor([0, 5, 5, 6, 12], dtype=torch.int32)
    got = softmax_attention(q, k, v, causal=causal, cu_seqlens=cu_seqlens)
    parts = [softmax_attention(q[:, a:b], k[:, a:b], v[:, a:b], causal=causal) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(got, torch.cat(parts, dim=1))


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_of_padding_has_finite_gradients(causal: bool) -> None:
    tensors = [x.requires_grad_() for x in qkv()]
    mask = torch.tensor([[0] * 7, [1] * 7])
    softmax_attention(*tensors, causal=causal, attention_mask=mask).sum().backward()
    for x in tensors:
        assert x.grad is not None
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_no_query_is_left_without_a_key(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's CPU kernel turns 0 / 0 into 0; not every backend of every version does.
    from cottention.layers import softmax

    masks = []

    def record(*args: Any, attn_mask: Tensor, **settings: Any) -> Tensor:
        masks.append(attn_mask)
        return scaled_dot_product_attention(*args, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(softmax, "scaled_dot_product_attention", record)
    softmax_attention(*qkv(), causal=causal, attention_mask=torch.tensor([[0] * 7, [0, 0, 1, 1, 1, 0, 0]]))
    assert masks[0].any(dim=-1).all()
    assert not masks[0].all()


def test_an_empty_pack_is_empty() -> None:
    q, k, v = qkv(B=1, T=0)
    assert softmax_attention(q, k, v, causal=True, cu_seqlens=torch.tensor([0])).shape == (1, 0, 3, 8)


def test_contradictions_are_named() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[B, S\] = \[2, 7\]; got \[2, 5\]"):
        softmax_attention(q, k, v, causal=True, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="cu_seqlens needs a batch of one packed row, B=1; got B=2"):
        softmax_attention(q, k, v, causal=True, cu_seqlens=torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="attention_mask and cu_seqlens exclude each other"):
        softmax_attention(
            q[:1], k[:1], v[:1], causal=True, cu_seqlens=torch.tensor([0, 7]), attention_mask=torch.ones(1, 7)
        )
    with pytest.raises(ValueError, match="at least as many keys as queries; got 7 queries and 5 keys"):
        softmax_attention(q, k[:, :5], v[:, :5], causal=True)
