"""transformers' gated delta rule by `cosine_attention`, function beside function: values, states, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.integrations.delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from tests.integrations.families import relative, their_rule

_NAMES = {
    "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
    "torch_recurrent_gated_delta_rule": recurrent_gated_delta_rule,
}


def _inputs(T: int, *, B: int = 2, G: int = 2, H: int = 4, K: int = 8, V: int = 6, scale: float = 1.0) -> list[Tensor]:
    """query, key, value, g, beta and a state, in float64."""
    generator = torch.Generator().manual_seed(T)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = scale * random(B, T, G, K), scale * random(B, T, G, K)
    return [q, k, random(B, T, H, V), -random(B, T, H).exp(), 2 * random(B, T, H).sigmoid(), random(B, H, K, V)]


def _results(rule: Any, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Output, final state, and the gradient of each input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    *tokens, kv = leaves
    o, final = rule(*tokens, initial_state=kv, output_final_state=True, **options)
    weights = torch.linspace(0.5, 1.5, o.shape[1], dtype=o.dtype)[:, None, None]
    return [o, final, *torch.autograd.grad((o.square() * weights).sum() + final.square().sum(), leaves)]


def _assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float, least: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert relative(one.detach(), other.detach(), least) < tolerance


@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "as given"])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("name", _NAMES)
def test_values_states_and_gradients_are_theirs(name: str, T: int, normalise: bool) -> None:
    # without their norm, keys longer than 1 may make a state grow beyond all bounds
    inputs = _inputs(T, scale=1.0 if normalise else 0.3)
    options = {"use_qk_l2norm_in_kernel": normalise}
    expected = _results(their_rule("qwen3_next", name, torch.float64), inputs, **options)
    _assert_same(_results(_NAMES[name], inputs, **options), expected, 1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-9, 1e-5, 1e-3, 1e-1, 1e4])
@pytest.mark.parametrize("T", [1, 40])
def test_short_queries_and_keys_keep_what_their_eps_leaves_of_them(T: int, scale: float) -> None:
    inputs = _inputs(T, scale=scale)
    inputs[0][:, ::2] *= 1e-4
    theirs = their_rule("qwen3_next", "torch_chunk_gated_delta_rule", torch.float64)
    found = _results(chunk_gated_delta_rule, inputs, use_qk_l2norm_in_kernel=True)
    expected = _results(theirs, inputs, use_qk_l2norm_in_kernel=True)
    # What a zero is raised by to have a direction is 1e-13 of the least that theirs divides by, and gradients through
    # such a length are 1e3 times as large: beside values and states of length 1, that is the error to expect.
    least = 1.0 if scale < 1e-8 else 1e-6
    _assert_same(found, expected, 1e-7, least)
    in_float32 = _results(chunk_gated_delta_rule, [x.float() for x in inputs], use_qk_l2norm_in_kernel=True)
    _assert_same(in_float32, [x.float() for x in expected], 1e-5, least)


@pytest.mark.parametrize("K", [64, 128])
def test_float32_at_the_head_dims_of_models(K: int) -> None:
    inputs = _inputs(200, B=1, K=K, V=K)
    found = _results(chunk_gated_delta_rule, [x.float() for x in inputs], use_qk_l2norm_in_kernel=True)
    expected = _results(
        their_rule("qwen3_next", "torch_chunk_gated_delta_rule", torch.float64), inputs, use_qk_l2norm_in_kernel=True
    )
    _assert_same(found, [x.float() for x in expected], 1e-5)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", [1, 70])
def test_tensors_as_they_come_from_a_convolution(B: int, T: int) -> None:
    inputs = _inputs(T, B=B)
    *tokens, kv = inputs
    turned = [x.flatten(2).mT.contiguous().mT.unflatten(2, x.shape[2:]) for x in tokens[:3]]
    assert T == 1 or not turned[0].is_contiguous()
    found = _results(chunk_gated_delta_rule, [*turned, *tokens[3:], kv], use_qk_l2norm_in_kernel=True)
    expected = _results(chunk_gated_delta_rule, inputs, use_qk_l2norm_in_kernel=True)
    _assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_as_theirs_is(dtype: torch.dtype) -> None:
    *tokens, kv = _inputs(70)
    inputs = [*(x.to(dtype) for x in tokens[:3]), tokens[3].float(), tokens[4].to(dtype), kv.float()]
    theirs = their_rule("qwen3_next", "torch_chunk_gated_delta_rule", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which must not reach inside
        found = _results(chunk_gated_delta_rule, inputs, use_qk_l2norm_in_kernel=True)
    expected = _results(theirs, inputs, use_qk_l2norm_in_kernel=True)
    _assert_same(found, expected, 5 * torch.finfo(dtype).eps)


def test_no_state_is_returned_unless_asked_for() -> None:
    *tokens, _ = _inputs(5)
    for name, ours in _NAMES.items():
        found, expected = ours(*tokens), their_rule("qwen3_next", name, torch.float64)(*tokens)
        assert found[1] is None
        assert relative(found[0], expected[0]) < 1e-9


@pytest.mark.parametrize("how", ["cu_seqlens", "seq_idx"])
def test_packed_sequences_are_as_each_alone(how: str) -> None:
    lengths = [3, 65, 1, 20]
    *tokens, _ = _inputs(sum(lengths), B=1)
    kv = torch.randn(len(lengths), 4, 8, 6, dtype=torch.float64)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None]
    packing: dict[str, Any] = {"cu_seqlens": bounds} if how == "cu_seqlens" else {"seq_idx": numbers}
    found = _results(chunk_gated_delta_rule, [*tokens, kv], use_qk_l2norm_in_kernel=True, **packing)

    def alone(*tokens: Tensor, initial_state: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        parts = [torch.split(x, lengths, dim=1) for x in tokens]
        theirs = their_rule("qwen3_next", "torch_chunk_gated_delta_rule", torch.float64)
        texts = zip(*parts, initial_state.split(1), strict=True)
        each = [theirs(*text, initial_state=kv, **options) for *text, kv in texts]
        return torch.cat([o for o, _ in each], 1), torch.cat([kv for _, kv in each])

    _assert_same(found, _results(alone, [*tokens, kv], use_qk_l2norm_in_kernel=True), 1e-9)
