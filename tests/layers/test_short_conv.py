"""The short convolution: against torch's own, its derivatives, and what it must not see."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

from cottention.layers.short_conv import ShortConv, between_texts, convolve
from cottention.ops.native import binding

# Rounding of one sum of `width` products: torch's conv1d adds in another order.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def conv_of(width: int, causal: bool, dtype: torch.dtype = torch.float64, channels: int = 6) -> ShortConv:
    conv = ShortConv(channels, width, causal=causal).to(dtype)
    with torch.no_grad():
        conv.weight.copy_(torch.randn_like(conv.weight))
    return conv


def by_torch(conv: ShortConv, x: Tensor) -> Tensor:
    after = conv.width - 1 - conv.num_before
    padded = pad(x, (0, 0, conv.num_before, after)).transpose(1, 2)
    return silu(conv1d(padded, conv.weight[:, None], groups=x.shape[-1]).transpose(1, 2))


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7])
def test_values_and_gradients_are_those_of_torchs_convolution(width: int, causal: bool, dtype: torch.dtype) -> None:
    conv, tolerance = conv_of(width, causal, dtype), TOLERANCES[dtype]
    for T in (1, 2, 5, 40):
        x = torch.randn(3, T, 6, dtype=dtype, requires_grad=True)
        grad = torch.randn(3, T, 6, dtype=dtype)
        got, expected = conv(x)[0], by_torch(conv, x)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        gradients = [torch.autograd.grad(y, (x, conv.weight), grad) for y in (got, expected)]
        torch.testing.assert_close(*gradients, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_no_tokens_are_no_error(dtype: torch.dtype) -> None:
    for causal, B in itertools.product((True, False), (0, 2)):
        conv, x = conv_of(4, causal, dtype), torch.randn(B, 0, 6, dtype=dtype, requires_grad=True)
        y, inputs = conv(x, keep_inputs=True)
        assert y.shape == (B, 0, 6)
        assert inputs is not None
        assert inputs.shape == (B, 3, 6)
        y.sum().backward()
        assert conv.weight.grad is not None
        assert not conv.weight.grad.any()
        row = x.new_zeros(1, 0, 6)
        packed = between_texts(row, 4, conv.num_before, cu_seqlens=torch.tensor([0, 0]))
        assert conv(row, packed)[0].shape == (1, 0, 6)


def test_a_centred_convolution_sees_as_many_on_both_sides() -> None:
    for width, seen in ((1, [4]), (2, [3, 4]), (3, [3, 4, 5]), (4, [2, 3, 4, 5])):
        conv = conv_of(width, causal=False)
        x = torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
        (reached,) = torch.autograd.grad(conv(x)[0][0, 4].sum(), x)
        assert reached[0].abs().sum(-1).nonzero().flatten().tolist() == seen


@pytest.mark.parametrize("causal", [True, False])
def test_it_starts_near_the_identity(causal: bool) -> None:
    x = torch.randn(2, 50, 64)
    y = ShortConv(64, 4, causal=causal)(x)[0]
    assert (y - silu(x)).abs().max() < 0.4 < (y - x).abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_derivatives_of_every_kind_are_there(dtype: torch.dtype) -> None:
    rows, weight = torch.randn(2, 7, 3, dtype=dtype), torch.randn(3, 4, dtype=dtype)

    def squared(rows: Tensor, weight: Tensor) -> Tensor:
        return convolve(rows, weight).pow(2).sum()

    hessian = torch.func.hessian(squared)(rows, weight)
    twice = torch.autograd.functional.hessian(lambda x: squared(x, weight), rows)
    torch.testing.assert_close(hessian, twice, rtol=1e-4, atol=1e-4)
    tangent = torch.randn_like(rows)
    forward = torch.func.jvp(lambda x: squared(x, weight), (rows,), (tangent,))[1]
    backward = torch.func.grad(squared)(rows, weight)
    torch.testing.assert_close(forward, (backward * tangent).sum())
    if dtype == torch.float64:
        inputs = (rows.requires_grad_(), weight.requires_grad_())
        assert torch.autograd.gradcheck(convolve, inputs, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(convolve, inputs)


@pytest.mark.skipif(not binding.is_available(), reason="needs the native library")
@pytest.mark.parametrize("name", binding.instruction_sets() if binding.is_available() else [])
def test_the_kernels_of_each_instruction_set_give_the_plain_sum(name: str) -> None:
    before_now = binding.instruction_set()
    binding.use_instruction_set(name)
    try:
        for R, T, C, W, before, after in (
            (1, 1, 1, 1, 0, 0),
            (2, 63, 65, 4, 3, 0),
            (3, 64, 64, 3, 1, 1),
            (1, 65, 130, 7, 0, 0),
            (2, 200, 5, 64, 63, 0),
            (2, 3, 70, 4, 0, 0),  # no output at all
            (0, 5, 8, 2, 1, 0),
            (1, 130, 8, 2, 70, 70),  # further than a turn of the kernel
        ):
            for dtype, activates in itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True)):
                x = torch.randn(R, C, T, dtype=dtype).mT.requires_grad_()  # numbers of a token lie apart
                weight = torch.randn(C, W, requires_grad=True)
                y = convolve(x, weight, before, after, activates=activates)
                exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
                expected = convolve(*exact, before, after, activates=activates)
                grad = torch.randn_like(y)
                found = torch.autograd.grad(y, (x, weight), grad)
                gradients = torch.autograd.grad(expected, exact, grad.double())
                assert [each.dtype for each in (y, *found)] == [dtype, dtype, torch.float32]
                tolerance = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
                for ours, theirs in zip((y, found[0]), (expected, gradients[0]), strict=True):
                    largest = 1 + (theirs.detach().abs().max() if theirs.numel() else 0)
                    assert (ours - theirs).abs().le(tolerance * largest).all()
                torch.testing.assert_close(found[1].double(), gradients[1], rtol=1e-5, atol=1e-4)
    finally:
        binding.use_instruction_set(before_now)


@pytest.mark.skipif(not binding.is_available(), reason="needs the native library")
def test_silu_in_the_kernels_reaches_far_numbers() -> None:
    far = torch.tensor([-torch.inf, -1e30, -200.0, -80.0, -1e-30, 0.0, 1e-30, 80.0, 1e30, torch.inf, torch.nan])
    x = far[None, :, None].requires_grad_()
    y = convolve(x, torch.ones(1, 1), activates=True)
    torch.testing.assert_close(y[0, 1:10, 0], silu(far)[1:10], rtol=1e-6, atol=1e-4)
    assert y[0, -1].isnan()
    (gradient,) = torch.autograd.grad(y[0, 1:9].sum(), x)
    same = far.clone().requires_grad_()
    (expected,) = torch.autograd.grad(silu(same)[1:9].sum(), same)
    torch.testing.assert_close(gradient[0, 1:9, 0], expected[1:9], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_no_number_in_another_text_or_in_padding_reaches_nothing(causal: bool) -> None:
    conv = conv_of(4, causal)
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    alone = conv(x[:, 3:7])[0]
    x[:, :3] = x[:, 7:] = torch.nan
    x.requires_grad_()
    spaced: list[Any] = [
        {"cu_seqlens": torch.tensor([0, 3, 3, 7, 9], dtype=torch.int32)},
        {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 0, 0]])},
    ]
    for told in spaced:
        y = conv(x, between_texts(x, 4, conv.num_before, **told))[0]
        torch.testing.assert_close(y[:, 3:7], alone)
        (gradient,) = torch.autograd.grad(y[:, 3:7].sum(), x)
        assert gradient[:, 3:7].isfinite().all()
        if "attention_mask" in told:
            assert not gradient[:, :3].any()
            assert not gradient[:, 7:].any()


def test_inputs_of_fewer_tokens_than_taps_go_on() -> None:
    conv, x = conv_of(5, causal=True), torch.randn(2, 6, 6, dtype=torch.float64)
    y, inputs = [], None
    for t in range(6):
        each, inputs = conv(x[:, t : t + 1], None, inputs, keep_inputs=True)
        y.append(each)
    torch.testing.assert_close(torch.cat(y, dim=1), conv(x)[0])
    torch.testing.assert_close(inputs, x[:, -4:])


def test_tokens_that_are_not_those_of_the_mask_are_refused() -> None:
    x = torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match=r"^attention_mask must have shape \[B, T\] = \[2, 5\]; got \[2, 6\]$"):
        between_texts(x, 4, 3, attention_mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"^cu_seqlens needs a batch of one packed row, B=1; got B=2$"):
        between_texts(x, 4, 3, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"^cu_seqlens must end at the number of tokens, T=5; got 4$"):
        between_texts(x[:1], 4, 3, cu_seqlens=torch.tensor([0, 4]))
