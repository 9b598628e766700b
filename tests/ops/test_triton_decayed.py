"""The Triton kernels that forget (log_decay), and the step, against naive in the interpreter: values and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.ops import CosineState, cosine_attention
from cottention.ops.plain import plain_step
from cottention.ops.triton.config import Tiles, override
from tests.ops.helpers import TOLERANCE, Case, assert_same, make_case, run

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

_WHOLE, _SEGMENTS = -1, 32
_FORMS = pytest.mark.parametrize("segment", [_WHOLE, _SEGMENTS], ids=["whole", "segments"])
_DIRECTIONS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
_STATES: dict[str, Any] = {"with_state": True, "output_final_state": True}


def _tiles(block_tokens: int, tile: int) -> dict[str, Tiles]:
    return dict.fromkeys(("forward", "backward"), Tiles(block_tokens, tile, num_warps=4, num_stages=2))


def _case(**changes: Any) -> Case:
    sizes: dict[str, Any] = {"B": 1, "H": 1, "T": 37, "K": 16, "V": 16, "log_decay": -1.0}
    return make_case(**(sizes | changes))


def _check(
    case: Case, segment: int | None, *, block: int = 16, tile: int = 32, dtype: torch.dtype = torch.float32
) -> None:
    with override(segment_tokens=segment, **_tiles(block, tile)):
        found = run(case.to(dtype), "triton")
    assert_same(found, run(case, "naive"), dtype)


@_FORMS
def test_padding_and_states(segment: int) -> None:
    _check(_case(B=2, mask="holes", **_STATES), segment)


@_FORMS
def test_packed_sequences_and_states(segment: int) -> None:
    _check(_case(lengths=[0, 16, 0, 17, 33, 0], **_STATES), segment)


@_FORMS
def test_bidirectional_attention_is_two_walks(segment: int) -> None:
    _check(_case(mask="holes", causal=False), segment)
    _check(_case(lengths=[5, 0, 35], causal=False), segment)


@_DIRECTIONS
def test_strong_decays_leave_the_weak_ones_their_digits(causal: bool) -> None:
    case = _case(T=70, log_decay=-50.0, causal=causal)
    _check(case, 64, block=64)
    assert case.log_decay is not None
    gone = case.log_decay.masked_fill(case.log_decay < -40, -torch.inf)
    with override(segment_tokens=_SEGMENTS, **_tiles(16, 32)):
        found = run(replace(case, log_decay=gone).to(torch.float32), "triton")
    assert_same(found, run(replace(case, log_decay=gone.clamp(min=-500)), "naive"), torch.float32)


@_DIRECTIONS
def test_head_dims_in_several_tiles(causal: bool) -> None:
    _check(_case(T=20, K=40, V=33, causal=causal, **(_STATES if causal else {})), _WHOLE, tile=16)


@pytest.mark.slow
@_DIRECTIONS
@_FORMS
@pytest.mark.parametrize("mask", ["right", "left", "empty_row"])
def test_other_padding(mask: str, segment: int, causal: bool) -> None:
    _check(_case(B=2, H=2, mask=mask, causal=causal), segment)


@pytest.mark.slow
@_DIRECTIONS
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_odd_lengths_with_tiles_of_64(T: int, causal: bool) -> None:
    case = _case(T=T, causal=causal, norm_const=False)
    for segment in (_WHOLE, 64):
        _check(case, segment, block=64)


@pytest.mark.slow
@_DIRECTIONS
@pytest.mark.parametrize(("K", "V"), [(2, 1), (3, 17), (48, 80), (160, 96), (64, 256)])
def test_any_head_dims_with_what_the_table_and_the_rules_choose(K: int, V: int, causal: bool) -> None:
    case = _case(T=70, K=K, V=V, causal=causal, mask="holes")
    assert_same(run(case.to(torch.float32), "triton"), run(case, "naive"), torch.float32)


@pytest.mark.slow
@_DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_to_rounding(dtype: torch.dtype, causal: bool) -> None:
    _check(_case(causal=causal, mask="holes", H=2), _SEGMENTS, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("log_decay", [-0.01, -1.0, -50.0])
def test_a_thousand_tokens_to_rounding(log_decay: float) -> None:
    case = _case(T=1000, log_decay=log_decay, **_STATES)
    for segment in (_WHOLE, 128):
        _check(case, segment, block=64)


@pytest.mark.slow
@_DIRECTIONS
@_FORMS
def test_garbage_at_padding_and_in_fresh_memory_does_not_leak(segment: int, causal: bool) -> None:
    case = _case(B=2, mask="holes", causal=causal, output_final_state=causal)
    assert case.attention_mask is not None
    assert case.log_decay is not None
    padded = ~case.attention_mask[..., None, None]
    q, k, v = (x.masked_fill(padded, float("nan")) for x in (case.q, case.k, case.v))
    dirty = replace(case, q=q, k=k, v=v, log_decay=case.log_decay.masked_fill(padded[..., 0], -torch.inf))
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    try:
        with override(segment_tokens=segment, **_tiles(16, 32)):
            found = run(dirty.to(torch.float32), "triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(found, run(case, "naive"), torch.float32)


@pytest.mark.slow
@_DIRECTIONS
@pytest.mark.parametrize("empty", [{"T": 0}, {"B": 0}])
def test_an_empty_batch_or_sequence_gives_an_empty_output(empty: dict[str, int], causal: bool) -> None:
    _check(_case(causal=causal, **empty, **(_STATES if causal else {})), _WHOLE)


@pytest.mark.slow
@_DIRECTIONS
def test_a_decay_of_each_head_costs_no_memory(causal: bool) -> None:
    case = _case(B=2, H=2, causal=causal).to(torch.float32)
    per_head = torch.tensor([-0.5, -2.0])
    options: dict[str, Any] = {"causal": causal, "implementation": "triton"}
    outputs = [
        cosine_attention(case.q, case.k, case.v, None, log_decay=decay, **options)[0]
        for decay in (per_head.expand(2, 37, 2), per_head.expand(2, 37, 2).contiguous())
    ]
    assert torch.equal(*outputs)


@pytest.mark.slow
@_DIRECTIONS
@pytest.mark.parametrize("segment", [_WHOLE, 16], ids=["whole", "segments"])
def test_operator_passes_opcheck(segment: int, causal: bool) -> None:
    case = _case(T=20, mask="holes", causal=causal, with_state=causal).to(torch.float32)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.norm_const) if x is not None]
    assert case.log_decay is not None
    state = case.initial_state or (None, None)
    decay = case.log_decay.clone().requires_grad_()
    arguments = ("triton", *leaves, case.attention_mask, None, *state, decay, None, causal, 16, segment)
    torch.library.opcheck(torch.ops.cottention.gated.default, arguments, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compiles_and_has_second_derivatives() -> None:
    case = _case(T=20).to(torch.float32)
    assert case.log_decay is not None

    def attend(implementation: str, q: Tensor, log_decay: Tensor) -> Tensor:
        options: dict[str, Any] = {"log_decay": log_decay, "implementation": implementation}
        o, _ = cosine_attention(q, case.k, case.v, case.norm_const, causal=True, **options)
        return o + cosine_attention(q, case.k, case.v, case.norm_const, causal=False, **options)[0]

    results = []
    for function, name in ((attend, "naive"), (torch.compile(attend, fullgraph=True, backend="aot_eager"), "triton")):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.log_decay)]
        first = torch.autograd.grad(function(name, *leaves).square().sum(), leaves)
        once = torch.autograd.grad(attend(name, *leaves).square().sum(), leaves, create_graph=True)
        twice = torch.autograd.grad(sum(x.square().sum() for x in once), leaves)  # pyright: ignore[reportCallIssue, reportArgumentType]
        results.append([*first, *twice])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


_Token = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, norm_const


def _token(dtype: torch.dtype, K: int = 16, V: int = 16) -> tuple[_Token, CosineState, dict[str, Tensor]]:
    case = make_case(B=3, T=1, H=2, K=K, V=V, with_state=True, log_decay=-2.0, beta=True).to(dtype)
    assert case.initial_state is not None
    assert case.norm_const is not None
    assert case.log_decay is not None
    assert case.beta is not None
    gates = {"log_decay": case.log_decay[:, 0], "beta": case.beta}  # [B, H] and [B, 1, H]
    return (case.q[:, 0], case.k[:, 0], case.v[:, 0], case.norm_const), case.initial_state, gates


@pytest.mark.parametrize("given", [("log_decay",), ("beta",), ("log_decay", "beta")], ids="-".join)
@pytest.mark.parametrize("real", [None, [True, False, True]], ids=["real", "padded"])
def test_step_matches_the_plain_one(real: list[bool] | None, given: tuple[str, ...]) -> None:
    from cottention.ops.triton.step import step

    for dtype, K, V in ((torch.float32, 16, 16), (torch.bfloat16, 40, 70)):
        token, state, gates = _token(dtype, K, V)
        own = {name: gates[name] for name in given}
        mask = None if real is None else torch.tensor(real)
        expected, after = plain_step(*token, state, mask, **own)
        o, new = step(*token, state, mask, **own)
        torch.testing.assert_close(o, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(new.kv, after.kv, rtol=1e-5, atol=1e-5)
        assert torch.equal(new.seen, after.seen)


def test_step_writes_rows_of_a_pool_and_none_that_does_not_exist() -> None:
    from cottention.ops.triton.step import step_in_place

    token, state, gates = _token(torch.float32)
    rows = torch.tensor([5, 1, -1], dtype=torch.int32)
    pool = CosineState(torch.full((6, 2, 16, 16), 7.0), torch.arange(6))
    before = CosineState(*(x.clone() for x in pool))
    for own, new in zip(pool, state, strict=True):
        own[rows[:2].long()] = new[:2]
    expected, after = plain_step(*token, state, torch.tensor([True, False, True]), **gates)
    o = step_in_place(*token, pool, torch.tensor([True, False, True]), **gates, state_indices=rows)
    torch.testing.assert_close(o[:2], expected[:2], rtol=1e-5, atol=1e-5)
    assert not o[2].any()
    torch.testing.assert_close(pool.kv[[5, 1]], after.kv[:2], rtol=1e-5, atol=1e-5)
    assert torch.equal(pool.seen[[5, 1]], after.seen[:2])
    others = [0, 2, 3, 4]
    assert all(torch.equal(x[others], y[others]) for x, y in zip(pool, before, strict=True))
