"""Native with log_decay equals naive in float64 in every instruction set that runs here, whatever the call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.ops import CosineState, cosine_attention
from cottention.ops.native import binding
from tests.ops.helpers import TOLERANCE, Case, assert_same, make_case, run

pytestmark = pytest.mark.skipif(not binding.is_available(), reason="the native kernels were not built")

_ALL = binding.instruction_sets() if binding.is_available() else []
_KINDS: dict[str, dict[str, Any]] = {
    "causal": {"with_state": True, "output_final_state": True},
    "bidirectional": {"causal": False},
}
_both = pytest.mark.parametrize("kind", _KINDS.values(), ids=_KINDS)
_strengths = pytest.mark.parametrize("log_decay", [-0.01, -1.0, -5.0, -50.0])


@pytest.fixture(autouse=True, params=_ALL)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = binding.instruction_set()
    binding.use_instruction_set(request.param)
    yield request.param
    binding.use_instruction_set(before)


def _check(case: Case, dtype: torch.dtype = torch.float32, chunk_size: int | None = None) -> None:
    """Against chunk, which test_gated holds to naive in float64: naive would take seconds for some."""
    assert_same(run(case.to(dtype), "native", chunk_size=chunk_size), run(case, "chunk"), dtype)


@_both
@_strengths
@pytest.mark.parametrize("T", [0, 1, 2, 63, 64, 65])
def test_native_matches_naive_at_odd_lengths(T: int, log_decay: float, kind: dict[str, Any]) -> None:
    case = make_case(T=T, K=16, V=8, log_decay=log_decay, **kind)
    assert_same(run(case.to(torch.float32), "native"), run(case, "naive"), torch.float32)


@_both
@_strengths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_head_size(dtype: torch.dtype, log_decay: float, kind: dict[str, Any]) -> None:
    # the gradient of norm_const is a sum over all tokens, and next to nothing where they forget at once
    norm_const = log_decay != -50.0
    for K, V in ((64, 64), (33, 17), (3, 40)):
        case = make_case(T=129, K=K, V=V, mask="holes", norm_const=norm_const, log_decay=log_decay, **kind)
        _check(case, dtype)


@_both
@pytest.mark.parametrize("mask", ["right", "left", "holes", "empty_row"])
def test_padding_anywhere(mask: str, kind: dict[str, Any]) -> None:
    for log_decay, norm_const in ((-0.5, True), (-20.0, False)):
        _check(make_case(B=3, T=140, mask=mask, log_decay=log_decay, norm_const=norm_const, **kind))


@_both
@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [0, 16, 0, 17, 33, 0], [300, 1, 600], [0, 0], []])
def test_packed_sequences(lengths: list[int], kind: dict[str, Any]) -> None:
    for log_decay in (-0.2, -30.0):
        _check(make_case(lengths=lengths, log_decay=log_decay, **kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 16, 48, 128, 1000])
def test_chunk_size_does_not_matter(chunk_size: int, dtype: torch.dtype) -> None:
    for log_decay in (-0.2, -4.0):
        case = make_case(T=200, K=24, V=40, mask="holes", log_decay=log_decay, output_final_state=True)
        _check(case, dtype, chunk_size)


@_both
@pytest.mark.parametrize("log_decay", [0.0, -1e-4, -50.0, -1e30, -torch.inf])
def test_extremes_over_a_thousand_tokens(log_decay: float, kind: dict[str, Any]) -> None:
    """All tokens alike, but every third with the opposite extreme, and a stretch of each without the other."""
    case = make_case(B=1, T=1000, K=3, V=2, log_decay=-1.0, **kind)
    assert case.log_decay is not None
    case.log_decay[:], case.log_decay[:, ::3] = log_decay, -50.0 if log_decay == 0 else -1e-3
    case.log_decay[:, 300:400], case.log_decay[:, 400:500] = log_decay, -1e-3
    _check(case)


@_both
def test_digits_behind_a_strong_decay_stay(kind: dict[str, Any]) -> None:
    case = make_case(B=1, T=200, K=4, V=4, log_decay=-1e-3, **kind)
    assert case.log_decay is not None
    case.log_decay[:, 5:100] = -900.0
    _check(case)


def test_gradients_of_strong_decays_keep_their_own_digits() -> None:
    """They are small differences of what q and k have to say, over sequences that are long."""
    case = make_case(B=1, T=3000, H=1, K=8, V=8, log_decay=-1.0)
    assert case.log_decay is not None
    case.log_decay[:] = -6.0
    truth = run(case, "chunk")["dlog_decay"]
    found = run(case.to(torch.float32), "native")["dlog_decay"]
    assert 1e-4 < truth.abs().max() < 0.1
    assert (found - truth).abs().max() < 1e-5


@_both
@pytest.mark.parametrize("num_threads", [2, 3])
def test_splitting_over_threads_does_not_matter(num_threads: int, kind: dict[str, Any]) -> None:
    cases = [
        make_case(B=1, T=700, H=1, K=48, V=48, log_decay=-0.05, mask="holes", **kind),
        make_case(B=1, T=600, H=1, K=64, V=40, log_decay=-9.0, **kind),
        make_case(lengths=[500, 3, 0, 600], H=1, K=48, V=32, log_decay=-0.3, **kind),
    ]
    for case, dtype in zip((*cases, cases[0]), (*[torch.float32] * 3, torch.bfloat16), strict=True):
        truth = run(case, "chunk")
        torch.set_num_threads(num_threads)
        try:
            first = run(case.to(dtype), "native")
            again = run(case.to(dtype), "native")
        finally:
            torch.set_num_threads(1)
        assert_same(first, truth, dtype)
        for name, x in first.items():
            assert torch.equal(x, again[name]), f"{name} changes from call to call"


@_both
def test_turns_of_heads_and_a_last_one_that_is_short(kind: dict[str, Any]) -> None:
    """Heads take turns of 512 tokens, between which the state waits as it is."""
    for T, log_decay in ((513, -0.01), (1100, -0.4)):
        _check(make_case(B=1, T=T, H=3, K=8, V=8, log_decay=log_decay, **kind))


def test_a_decay_of_nothing_is_the_plain_operation_bit_for_bit() -> None:
    case = make_case(T=1200, mask="holes", with_state=True, output_final_state=True)
    decays = case.q.new_zeros(1, 1, 2).expand(2, 1200, 2)
    for dtype in (torch.float32, torch.bfloat16):
        found = run(replace(case, log_decay=decays).to(dtype), "native")
        assert found.pop("dlog_decay").shape == decays.shape
        for name, x in run(case.to(dtype), "native").items():
            assert torch.equal(found[name], x), name


@pytest.mark.parametrize("causal", [True, False])
def test_any_strides_are_taken_and_inputs_are_left_alone(causal: bool) -> None:
    case = make_case(T=70, K=8, V=8, causal=causal, mask="holes", log_decay=-1.0).to(torch.float32)
    assert case.log_decay is not None
    options: dict[str, Any] = {"causal": causal, "attention_mask": case.attention_mask, "implementation": "native"}
    given = (case.q, case.k, case.v)
    expected, _ = cosine_attention(*given, case.norm_const, **options, log_decay=case.log_decay)
    layouts = {
        "heads first": case.log_decay.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens first": case.log_decay.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": case.log_decay.repeat_interleave(2, dim=2)[..., ::2],
        "float64": case.log_decay.double(),
    }
    for name, log_decay in layouts.items():
        copy = log_decay.clone()
        for q, k, v in (given, torch.stack(given, dim=2).unbind(2)):
            o, _ = cosine_attention(q, k, v, case.norm_const, **options, log_decay=log_decay)
            torch.testing.assert_close(o, expected, rtol=0, atol=0, msg=name)
        assert torch.equal(log_decay, copy)


@pytest.mark.parametrize("causal", [True, False])
def test_one_decay_a_head_is_an_expanded_view(causal: bool) -> None:
    case = make_case(T=70, log_decay=-1.0, causal=causal).to(torch.float32)
    own = torch.tensor([-0.1, -2.0], requires_grad=True)
    gradients = []
    for implementation in ("native", "chunk"):
        given = (case.q, case.k, case.v, case.norm_const)
        log_decay = own.expand(2, 70, 2)
        o, _ = cosine_attention(*given, causal=causal, log_decay=log_decay, implementation=implementation)
        gradients.append(torch.autograd.grad(o.square().sum(), own)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_garbage_at_padding_does_not_leak(causal: bool, dtype: torch.dtype) -> None:
    case = make_case(B=3, T=70, K=20, V=20, mask="holes", causal=causal, log_decay=-0.5)
    assert case.attention_mask is not None
    assert case.log_decay is not None
    expected = run(case, "naive")
    q, k, v = (x.masked_fill(~case.attention_mask[..., None, None], torch.nan) for x in (case.q, case.k, case.v))
    log_decay = case.log_decay.masked_fill(~case.attention_mask[..., None], -torch.inf)
    results = run(replace(case, q=q, k=k, v=v, log_decay=log_decay).to(dtype), "native")
    assert_same(results, expected, dtype)
    for name in ("o", "dq", "dk", "dv", "dlog_decay"):
        assert (results[name][~case.attention_mask] == 0).all(), f"{name} is not exactly zero at padding"


def test_a_nan_is_never_hidden() -> None:
    case = make_case(T=100, K=20, V=20, log_decay=-3.0).to(torch.float32)
    assert case.log_decay is not None
    for name in ("q", "k", "v", "log_decay"):
        given: dict[str, Any] = {n: getattr(case, n).clone() for n in ("q", "k", "v", "log_decay")}
        given[name][:, 50] = torch.nan
        o, _ = cosine_attention(**given, norm_const=case.norm_const, causal=True, implementation="native")
        assert o[:, 50].isnan().any(), name
        assert not o[:, :32].isnan().any(), f"{name}: a NaN went back in time beyond its chunk"


def test_a_state_carried_over_any_split_gives_one_pass() -> None:
    case = make_case(T=700, K=16, V=16, log_decay=-0.1).to(torch.float32)
    options: dict[str, Any] = {"causal": True, "output_final_state": True, "implementation": "native"}
    given = (case.q, case.k, case.v)
    whole, final = cosine_attention(*given, case.norm_const, log_decay=case.log_decay, **options)
    pieces, state = [], None
    assert case.log_decay is not None
    for a, b in ((0, 1), (1, 50), (50, 50), (50, 600), (600, 700)):
        q, k, v, log_decay = (x[:, a:b] for x in (*given, case.log_decay))
        o, state = cosine_attention(q, k, v, case.norm_const, log_decay=log_decay, initial_state=state, **options)
        pieces.append(o)
    assert isinstance(state, CosineState)
    assert final is not None
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.kv, final.kv, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.seen, final.seen)


@pytest.mark.parametrize("causal", [True, False])
def test_compiled_and_differentiated_twice(causal: bool, instruction_set: str) -> None:
    if instruction_set != _ALL[-1]:
        pytest.skip("what PyTorch does is the same with all")
    case = make_case(T=40, log_decay=-0.5, causal=causal).to(torch.float32)
    leaves = [
        x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.norm_const, case.log_decay) if x is not None
    ]

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor, log_decay: Tensor) -> Tensor:
        return cosine_attention(q, k, v, m, causal=causal, log_decay=log_decay, implementation="native")[0]

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attend, compiled):
        o = function(*leaves)
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    first = torch.autograd.grad(attend(*leaves).square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(first[4].square().sum(), leaves)
    assert all(torch.isfinite(x).all() and x.abs().max() > 0 for x in second)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [-1e-6, -1e-3, -1.0])
def test_no_drift_over_a_million_tokens(strength: float) -> None:
    case = make_case(B=1, T=1_000_000, H=1, K=16, V=16, norm_const=False, log_decay=strength)
    outputs = []
    for dtype, implementation in ((torch.float64, "chunk"), (torch.float32, "native")):
        own = case.to(dtype)
        given = (own.q, own.k, own.v, None)
        o, _ = cosine_attention(*given, causal=True, log_decay=own.log_decay, implementation=implementation)
        outputs.append(o.double())
    truth, found = outputs
    error = (found - truth).abs()
    assert error.max() <= TOLERANCE[torch.float32] * truth.abs().max()
    assert error[:, 900_000:].max() <= 2 * error[:, :100_000].max() + 1e-6 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_ways_of_short_dtypes_are_rounded_once(dtype: torch.dtype, instruction_set: str) -> None:
    if instruction_set == "avx512bf16" and dtype == torch.bfloat16:
        pytest.skip("its products round their operands, so no other kernel has its sums")
    case = make_case(T=100, K=24, V=40, log_decay=-0.1, mask="holes", causal=False).to(dtype)
    grad = torch.randn(case.v.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def results(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v))
        o, _ = cosine_attention(
            *(q, k, v, case.norm_const),
            causal=False,
            attention_mask=case.attention_mask,
            log_decay=case.log_decay,
            implementation="native",
        )
        return [o, *torch.autograd.grad(o, (q, k, v), grad.to(dtype))]

    for name, found, whole in zip(("o", "dq", "dk", "dv"), results(dtype), results(torch.float32), strict=True):
        assert torch.equal(found, whole.to(dtype)), name


def test_results_too_small_are_flushed_in_the_kernels_alone() -> None:
    tiny = torch.tensor([1e-40])
    run(make_case(T=70, log_decay=-20.0).to(torch.float32), "native")
    assert (tiny * 1).item() == tiny.item() > 0
