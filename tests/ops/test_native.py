"""The native kernels equal naive in float64 in every instruction set that runs here, whatever the shape or layout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cottention.ops import CosineState, cosine_attention
from cottention.ops.native import binding
from tests.ops.helpers import Case, assert_same, make_case, run

pytestmark = pytest.mark.skipif(not binding.is_available(), reason="the native kernels were not built")

_ALL = binding.instruction_sets() if binding.is_available() else []


@pytest.fixture(autouse=True, params=_ALL)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = binding.instruction_set()
    binding.use_instruction_set(request.param)
    yield request.param
    binding.use_instruction_set(before)


def _check(case: Case, dtype: torch.dtype = torch.float32, chunk_size: int | None = 16) -> None:
    truth = run(case, "naive")
    assert_same(run(case.to(dtype), "native", chunk_size=chunk_size), truth, dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 63, 64, 65, 257])
def test_native_matches_naive_at_odd_lengths(T: int, causal: bool) -> None:
    _check(make_case(T=T, K=16, V=32, causal=causal), chunk_size=None)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", ["right", "left", "holes", "empty_row"])
def test_native_matches_naive_with_padding(mask: str, causal: bool) -> None:
    _check(make_case(B=3, mask=mask, causal=causal))
    _check(make_case(B=3, T=70, mask=mask, causal=causal, with_state=causal, output_final_state=causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (33, 17)])
def test_native_matches_naive_in_every_dtype(dtype: torch.dtype, causal: bool, K: int, V: int) -> None:
    case = make_case(T=129, K=K, V=V, mask="holes", causal=causal, with_state=causal, output_final_state=causal)
    _check(case, dtype)
    _check(case, dtype, chunk_size=64)


@pytest.mark.parametrize(("K", "V"), [(2, 1), (3, 17), (17, 3), (31, 65), (100, 48), (512, 5), (5, 512)])
def test_native_matches_naive_at_any_head_size(K: int, V: int) -> None:
    _check(make_case(T=70, K=K, V=V, with_state=True, output_final_state=True))
    _check(make_case(T=70, K=K, V=V, causal=False))


@pytest.mark.parametrize("causal", [True, False])
def test_with_one_key_dim_a_unit_vector_is_a_sign(causal: bool) -> None:
    case = make_case(T=70, K=1, V=3, causal=causal)
    results, truth = run(case.to(torch.float32), "native"), run(case, "naive")
    for name in ("dq", "dk"):  # zero but for rounding, which division by a small norm enlarges
        size = getattr(case, name[1]).abs()
        assert (results.pop(name).double() * size).abs().max() < 1e-5 * truth["dv"].abs().max(), name
        del truth[name]
    assert_same(results, truth, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 16, 48, 100, 128, 1000])
def test_chunk_size_does_not_matter(chunk_size: int, dtype: torch.dtype) -> None:
    _check(make_case(T=200, K=24, V=40, mask="holes"), dtype, chunk_size)


@pytest.mark.parametrize("mask", [None, "left", "holes", "empty_row"])
@pytest.mark.parametrize(("T", "S"), [(1, 33), (33, 1), (40, 17), (0, 5), (5, 0)])
def test_native_matches_naive_in_cross_attention(T: int, S: int, mask: str | None) -> None:
    _check(make_case(T=T, S=S, causal=False, mask=mask))


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [0, 16, 0, 17, 33, 0], [300, 1, 300], [0, 0], []])
def test_native_matches_naive_when_packed(lengths: list[int]) -> None:
    _check(make_case(lengths=lengths, causal=False))
    _check(make_case(lengths=lengths, with_state=True, output_final_state=True))
    _check(make_case(lengths=lengths, with_state=False, output_final_state=True))


@pytest.mark.parametrize("causal", [True, False])
def test_native_matches_naive_without_a_divisor_or_tokens(causal: bool) -> None:
    _check(make_case(norm_const=False, causal=causal, mask="holes"))
    _check(make_case(T=0, causal=causal, with_state=causal, output_final_state=causal))
    _check(make_case(B=0, causal=causal))


@pytest.mark.parametrize("num_threads", [2, 5])
@pytest.mark.parametrize("kind", ["one head", "states", "packed", "bidirectional", "cross", "heads"])
def test_splitting_over_threads_does_not_matter(kind: str, num_threads: int) -> None:
    case = {
        "one head": make_case(B=1, T=1500, H=1, K=48, V=48),
        "states": make_case(B=1, T=1400, H=2, K=40, V=32, mask="holes", with_state=True, output_final_state=True),
        "packed": make_case(lengths=[800, 3, 0, 900], H=1, K=48, V=32, with_state=True, output_final_state=True),
        "bidirectional": make_case(B=1, T=1400, H=1, K=48, V=48, causal=False, mask="holes"),
        "cross": make_case(B=1, T=300, S=1800, H=1, K=48, V=48, causal=False, mask="left"),
        "heads": make_case(B=1, T=1200, H=7, K=32, V=24),
    }[kind]
    torch.set_num_threads(num_threads)
    try:
        first = run(case.to(torch.float32), "native")
        again = run(case.to(torch.float32), "native")
    finally:
        torch.set_num_threads(1)
    assert_same(first, run(case, "naive"), torch.float32)
    for name, x in first.items():
        assert torch.equal(x, again[name]), f"{name} changes from call to call"


@pytest.mark.parametrize("causal", [True, False])
def test_any_strides_are_taken_and_inputs_are_left_alone(causal: bool) -> None:
    case = make_case(T=70, K=8, V=8, causal=causal, mask="holes").to(torch.float32)
    given = (case.q, case.k, case.v)
    options: dict[str, Any] = {"causal": causal, "attention_mask": case.attention_mask, "implementation": "native"}
    expected, _ = cosine_attention(*given, case.norm_const, **options)
    layouts = {
        "heads first": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given],
        "fused": torch.stack(given, dim=2).unbind(2),
        "every other": [x.repeat_interleave(2, dim=3)[..., ::2] for x in given],
        "offset": [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in given],
    }
    for name, (q, k, v) in layouts.items():
        copies = [x.clone() for x in (q, k, v)]
        o, _ = cosine_attention(q, k, v, case.norm_const, **options)
        torch.testing.assert_close(o, expected, rtol=0, atol=0, msg=name)
        assert all(torch.equal(x, copy) for x, copy in zip((q, k, v), copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_garbage_at_padding_does_not_leak(causal: bool, dtype: torch.dtype) -> None:
    case = make_case(B=3, K=20, V=20, mask="holes", causal=causal)
    assert case.attention_mask is not None
    hidden = ~case.attention_mask[..., None, None]
    q, v = (x.masked_fill(hidden, float("nan")) for x in (case.q, case.v))
    k = case.k.masked_fill(hidden, float("inf"))
    results = run(Case(q, k, v, case.norm_const, causal, case.attention_mask).to(dtype), "native")
    assert_same(results, run(case, "naive"), dtype)
    for name in ("o", "dq", "dk", "dv"):
        assert (results[name][~case.attention_mask] == 0).all(), f"{name} is not exactly zero at padding"


def test_a_nan_is_never_hidden() -> None:
    case = make_case(T=100, K=20, V=20).to(torch.float32)
    for name in ("q", "k", "v"):
        given = {n: getattr(case, n).clone() for n in ("q", "k", "v")}
        given[name][:, 50, :, 3] = float("nan")
        q, k, v = given.values()
        o, _ = cosine_attention(q, k, v, case.norm_const, causal=True, implementation="native")
        assert o[:, 50].isnan().any(), name
        assert not o[:, :32].isnan().any(), f"{name}: a NaN went back in time beyond its chunk"


def test_zero_and_tiny_vectors_have_the_published_gradient() -> None:
    case = make_case(T=10)
    case.q[:, 3], case.k[:, 4] = 0, 0
    case.q[:, 5] *= 2e-13  # below the smallest norm, and still half of it: nothing is projected away
    case.k[:, 6] *= 2e-13
    results, truth = run(case.to(torch.float32), "native"), run(case, "naive")
    for name, tokens in (("dq", (3, 5)), ("dk", (4, 6))):
        relative = (results[name].double() - truth[name]).abs().amax(-1) / truth[name].abs().amax(-1).clamp(min=1)
        assert relative.max() < 1e-4, name
        for t in tokens:
            assert results[name][:, t].abs().max() > 1e10  # dq_hat / 1e-12


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6])
def test_the_norm_is_taken_of_very_small_and_large_vectors(scale: float) -> None:
    case = make_case(T=40, K=16, V=16).to(torch.float32)
    given = (case.q * scale, case.k * scale, case.v)
    found, _ = cosine_attention(*given, case.norm_const, causal=True, implementation="native")
    q, k, v = (x.double() for x in given)
    expected, _ = cosine_attention(q, k, v, case.norm_const, causal=True, implementation="naive")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_counts_continue_from_far_away() -> None:
    case = make_case(T=40, with_state=True, output_final_state=True)
    assert case.initial_state is not None
    case.initial_state.seen.copy_(torch.tensor([1_000_000_007, 2**40]))
    _check(case)


def test_a_state_carried_over_any_split_gives_one_pass() -> None:
    case = make_case(T=100, K=16, V=16).to(torch.float32)
    options: dict[str, Any] = {"causal": True, "output_final_state": True, "implementation": "native"}
    whole, final = cosine_attention(case.q, case.k, case.v, case.norm_const, **options)
    pieces, state = [], None
    for a, b in ((0, 1), (1, 50), (50, 50), (50, 100)):
        q, k, v = (x[:, a:b] for x in (case.q, case.k, case.v))
        o, state = cosine_attention(q, k, v, case.norm_const, initial_state=state, **options)
        pieces.append(o)
    assert isinstance(state, CosineState)
    assert final is not None
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.kv, final.kv, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.seen, final.seen)
