"""The chunked form equals the naive one in values and gradients, over shapes, paddings, packings and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cottention.ops import CosineState, cosine_attention, cosine_attention_step
from cottention.ops.native import is_available
from tests.ops.helpers import Case, assert_same, make_case, run


def _check(case: Case, chunk_size: int | None = 16, dtype: torch.dtype = torch.float64) -> None:
    truth = run(case, "naive")
    assert_same(run(case.to(dtype), "chunk", chunk_size=chunk_size), truth, dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 257])
def test_chunk_matches_naive_at_odd_lengths(T: int, causal: bool) -> None:
    _check(make_case(T=T, causal=causal), chunk_size=None)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", ["right", "left", "holes", "empty_row"])
@pytest.mark.parametrize("seed", range(3))
def test_chunk_matches_naive_with_padding(mask: str, causal: bool, seed: int) -> None:
    _check(make_case(B=3, mask=mask, causal=causal, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_chunk_matches_naive_in_every_dtype(dtype: torch.dtype, causal: bool) -> None:
    _check(make_case(T=129, K=16, V=16, mask="holes", causal=causal), dtype=dtype)


@pytest.mark.parametrize("implementation", ["naive", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float64(implementation: str, dtype: torch.dtype) -> None:
    case = make_case(T=200, K=16, V=16, with_state=True, output_final_state=True)
    assert_same(run(case.to(dtype), implementation), run(case, "naive"), dtype)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 64, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_chunk_size_does_not_matter(chunk_size: int, causal: bool) -> None:
    _check(make_case(T=40, mask="holes", causal=causal), chunk_size=chunk_size)


@pytest.mark.parametrize("mask", [None, "right", "left", "holes", "empty_row"])
@pytest.mark.parametrize(("T", "S"), [(1, 33), (33, 1), (17, 40), (40, 17), (0, 5), (5, 0)])
def test_chunk_matches_naive_in_cross_attention(T: int, S: int, mask: str | None) -> None:
    _check(make_case(T=T, S=S, causal=False, mask=mask))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [0, 16, 0, 17, 33, 0], [100, 3, 64, 31], [0, 0], []])
def test_chunk_matches_naive_when_packed(lengths: list[int], causal: bool) -> None:
    _check(make_case(lengths=lengths, causal=causal))


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [0, 16, 0, 17, 33, 0], [100, 3, 64, 31], [300, 1, 300], [0, 0]])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunk_matches_naive_when_packed_with_states(lengths: list[int], with_state: bool) -> None:
    _check(make_case(lengths=lengths, with_state=with_state, output_final_state=True))
    _check(make_case(lengths=lengths, with_state=True, output_final_state=False))


@pytest.mark.parametrize("mask", [None, "right", "left", "holes", "empty_row"])
@pytest.mark.parametrize("T", [0, 1, 16, 65, 300])
def test_chunk_matches_naive_with_states(T: int, mask: str | None) -> None:
    _check(make_case(B=3, T=T, mask=mask, with_state=True, output_final_state=True))
    _check(make_case(B=3, T=T, mask=mask, with_state=True, output_final_state=False))
    _check(make_case(B=3, T=T, mask=mask, with_state=False, output_final_state=True))


@pytest.mark.parametrize("causal", [True, False])
def test_chunk_matches_naive_without_a_divisor(causal: bool) -> None:
    _check(make_case(norm_const=False, causal=causal, mask="holes"))


@pytest.mark.parametrize(("K", "V"), [(1, 1), (3, 17), (17, 3), (64, 32)])
def test_chunk_matches_naive_when_key_and_value_dims_differ(K: int, V: int) -> None:
    _check(make_case(K=K, V=V, with_state=True, output_final_state=True))


@pytest.mark.parametrize("causal", [True, False])
def test_an_empty_batch_or_sequence_gives_an_empty_output(causal: bool) -> None:
    _check(make_case(T=0, causal=causal))
    _check(make_case(B=0, causal=causal))


def test_segments_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(lengths=[50, 3, 170, 0, 20], with_state=True, output_final_state=True)
    padded = make_case(B=3, T=131, mask="holes", with_state=True, output_final_state=True)
    bidirectional = make_case(lengths=[50, 3, 170, 0, 20], causal=False)
    for segment_bytes in (1, 20_000, 1 << 30):
        monkeypatch.setattr("cottention.ops.segments._SEGMENT_BYTES", segment_bytes)
        for each in (case, padded, bidirectional):
            _check(each)


@pytest.mark.parametrize("causal", [True, False])
def test_any_strides_are_taken_and_inputs_are_left_alone(causal: bool) -> None:
    case = make_case(T=70, K=8, V=8, causal=causal, mask="holes")
    head_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v)]
    fused = torch.stack([case.q, case.k, case.v], dim=2).unbind(2)
    every_other = [x.repeat_interleave(2, dim=3)[..., ::2] for x in (case.q, case.k, case.v)]
    expected, _ = cosine_attention(
        case.q, case.k, case.v, case.norm_const, causal=causal, attention_mask=case.attention_mask
    )
    for q, k, v in (head_first, fused, every_other):
        copies = [x.clone() for x in (q, k, v)]
        o, _ = cosine_attention(q, k, v, case.norm_const, causal=causal, attention_mask=case.attention_mask)
        torch.testing.assert_close(o, expected, rtol=0, atol=0)
        assert all(torch.equal(x, copy) for x, copy in zip((q, k, v), copies, strict=True))


def test_expanded_upstream_gradients_are_taken() -> None:
    case = make_case(T=70)
    q = case.q.clone().requires_grad_()
    cosine_attention(q, case.k, case.v, case.norm_const, causal=True)[0].sum().backward()
    twin = case.q.clone().requires_grad_()
    cosine_attention(twin, case.k, case.v, case.norm_const, causal=True, implementation="naive")[0].sum().backward()
    torch.testing.assert_close(q.grad, twin.grad, rtol=1e-12, atol=1e-12)


def test_gradient_flows_through_the_final_state_alone() -> None:
    case = make_case(T=70)
    for implementation in ("naive", "chunk"):
        k = case.k.clone().requires_grad_()
        _, state = cosine_attention(
            case.q, k, case.v, case.norm_const, causal=True, output_final_state=True, implementation=implementation
        )
        assert state is not None
        (gradient,) = torch.autograd.grad(state.kv.square().sum(), k)
        if implementation == "naive":
            expected = gradient
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_fresh_memory_full_of_nan_does_not_leak(causal: bool) -> None:
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    try:
        assert torch.empty(3).isnan().all()
        _check(make_case(B=3, T=130, mask="holes", causal=causal), chunk_size=64)
        _check(make_case(lengths=[70, 0, 3, 100], causal=causal), chunk_size=64)
        if causal:
            _check(make_case(lengths=[70, 0, 3], with_state=True, output_final_state=True), chunk_size=64)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("implementation", ["naive", "chunk"])
@pytest.mark.parametrize("causal", [True, False])
def test_garbage_at_padding_does_not_leak(implementation: str, causal: bool) -> None:
    case = make_case(B=3, mask="holes", causal=causal)
    assert case.attention_mask is not None
    padded = ~case.attention_mask[..., None, None]
    dirty = Case(
        case.q.masked_fill(padded, float("nan")),
        case.k.masked_fill(padded, float("inf")),
        case.v.masked_fill(padded, float("nan")),
        case.norm_const,
        causal,
        case.attention_mask,
    )
    assert_same(run(dirty, implementation), run(case, "naive"), torch.float64)


@pytest.mark.parametrize("implementation", ["chunk", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("H", "K", "V", "T"), [(4, 64, 64, 1100), (1, 8, 8, 2000), (3, 16, 5, 64)])
def test_a_row_is_the_same_alone_and_in_a_batch_bit_for_bit(
    H: int, K: int, V: int, T: int, causal: bool, dtype: torch.dtype, implementation: str
) -> None:
    if implementation == "native" and (not is_available() or dtype == torch.float64):
        pytest.skip("the native kernels were not built, or not for this dtype")
    case = make_case(B=5, T=T, H=H, K=K, V=V, mask="right", causal=causal, output_final_state=causal).to(dtype)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(5, T, H, V, generator=generator).to(dtype)

    def results(rows: list[int]) -> list[torch.Tensor]:
        q, k, v = leaves = [x[rows].clone().requires_grad_() for x in (case.q, case.k, case.v)]
        assert case.attention_mask is not None
        o, state = cosine_attention(
            q,
            k,
            v,
            case.norm_const,
            causal=causal,
            attention_mask=case.attention_mask[rows],
            output_final_state=causal,
            implementation=implementation,
        )
        found = [o, *torch.autograd.grad(o, leaves, upstream[rows])]
        return found if state is None else [*found, state.kv]

    whole = results([0, 1, 2, 3, 4])
    for rows in ([0], [2, 3], [4]):
        for found, expected in zip(results(rows), whole, strict=True):
            assert torch.equal(found, expected[rows])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["naive", "chunk", "native"])
def test_nan_at_padding_reaches_nothing_in_values_or_gradients(implementation: str, causal: bool) -> None:
    if implementation == "native" and not is_available():
        pytest.skip("the native kernels were not built")
    case = make_case(T=70, mask="holes", causal=causal).to(torch.float32)
    assert case.attention_mask is not None
    padding = ~case.attention_mask[..., None, None]
    results = []
    for filling in (0.0, float("nan")):
        q, k, v = leaves = [x.masked_fill(padding, filling).requires_grad_() for x in (case.q, case.k, case.v)]
        options: dict[str, Any] = {"attention_mask": case.attention_mask, "implementation": implementation}
        o, _ = cosine_attention(q, k, v, case.norm_const, causal=causal, **options)
        results.append([o, *torch.autograd.grad(o, leaves, torch.ones_like(o).masked_fill(padding, filling))])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_nan_at_a_padded_step_reaches_nothing_in_values_or_gradients() -> None:
    case = make_case(B=2, T=1, with_state=True)
    assert case.initial_state is not None
    padding = torch.tensor([True, False])[:, None, None]
    results = []
    for filling in (0.0, float("nan")):
        q, k, v = (x[:, 0].masked_fill(padding, filling).requires_grad_() for x in (case.q, case.k, case.v))
        leaves = [q, k, v, case.initial_state.kv.clone().requires_grad_()]
        state = CosineState(leaves[3], case.initial_state.seen)
        o, new = cosine_attention_step(q, k, v, case.norm_const, state, attention_mask=~padding[:, 0, 0])
        upstream = torch.ones_like(o).masked_fill(padding, filling)
        results.append([o, new.kv, *torch.autograd.grad(o, leaves, upstream)])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)
