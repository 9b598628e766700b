"""The native delta rule equals naive in float64 in every instruction set that runs here: values and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cottention.ops import CosineState, choose_implementation, cosine_attention, cosine_attention_step
from cottention.ops.native import binding
from tests.ops import test_properties  # noqa: F401 (its hypothesis profile)
from tests.ops.helpers import TOLERANCE, Case, assert_same, make_case, run

pytestmark = pytest.mark.skipif(not binding.is_available(), reason="the native kernels were not built")

_ALL = binding.instruction_sets() if binding.is_available() else []
_DECAYS = [None, -0.01, -1.0, -50.0]


@pytest.fixture(params=_ALL)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = binding.instruction_set()
    binding.use_instruction_set(request.param)
    yield request.param
    binding.use_instruction_set(before)


@cache
def _known(**kind: Any) -> tuple[Case, dict[str, torch.Tensor]]:
    """A case that several tests have, and its results."""
    case = make_case(**kind)
    return case, run(case, "naive")


def _check(
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    chunk_size: int | None = None,
    threads: int | None = None,
    truth: dict[str, torch.Tensor] | None = None,
) -> None:
    truth = run(case, "naive") if truth is None else truth
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        results = run(case.to(dtype), "native", chunk_size=chunk_size)
    finally:
        torch.set_num_threads(before)
    assert_same(results, truth, dtype)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("log_decay", [-0.01, -3.0])
@pytest.mark.parametrize("name", ["q", "k", "v", "log_decay", "beta"])
def test_a_nan_is_never_hidden(name: str, log_decay: float) -> None:
    case = make_case(T=70, K=20, V=20, log_decay=log_decay, beta=True).to(torch.float32)
    given: dict[str, Any] = {n: getattr(case, n).clone() for n in ("q", "k", "v", "log_decay", "beta")}
    for at in (5, 40):
        spoilt = given | {name: given[name].index_fill(1, torch.tensor([at]), torch.nan)}
        for T in (20, 70):
            if at < T:
                inputs = {n: x[:, :T] for n, x in spoilt.items()}
                o, _ = cosine_attention(**inputs, norm_const=case.norm_const, causal=True, implementation="native")
                assert o[:, at].isnan().all(), f"{at} of {T}"
                assert not o[:, : at // 32 * 32].isnan().any(), f"{at} of {T}: a NaN went back in time beyond its tile"


@pytest.mark.parametrize("log_decay", _DECAYS)
@pytest.mark.parametrize("T", [0, 1, 33, 95])
def test_every_instruction_set_matches_naive(T: int, log_decay: float | None, instruction_set: str) -> None:
    sizes = {"T": T, "K": 24, "V": 40}
    case, truth = _known(**sizes, log_decay=log_decay, beta=True, with_state=True, output_final_state=True)
    _check(case, truth=truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("log_decay", [None, -0.5])
@pytest.mark.parametrize(("K", "V"), [(2, 3), (64, 64), (33, 100)])
def test_every_dtype_and_head_size(
    dtype: torch.dtype, log_decay: float | None, K: int, V: int, instruction_set: str
) -> None:
    ends = {"with_state": True, "output_final_state": True}
    case, truth = _known(T=70, K=K, V=V, mask="holes", log_decay=log_decay, beta=True, **ends)
    _check(case, dtype, truth=truth)


@given(
    T=st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 129, 200, 300])),
    K=st.integers(2, 20),
    V=st.integers(1, 20),
    H=st.integers(1, 3),
    log_decay=st.sampled_from(_DECAYS),
    place=st.sampled_from([None, "right", "left", "holes", "empty_row", "packed"]),
    with_state=st.booleans(),
    norm_const=st.booleans(),
    chunk_size=st.sampled_from([None, 1, 16, 48, 64, 10**9]),
    threads=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31 - 1),
    data=st.data(),
)
def test_generated_calls(
    T: int,
    K: int,
    V: int,
    H: int,
    log_decay: float | None,
    place: str | None,
    with_state: bool,
    norm_const: bool,
    chunk_size: int | None,
    threads: int,
    dtype: torch.dtype,
    seed: int,
    data: st.DataObject,
) -> None:
    where: dict[str, Any] = {"mask": place}
    if place == "packed":
        where = {"lengths": data.draw(st.lists(st.integers(0, 70), max_size=4))}
    sizes = {"T": T, "K": K, "V": V, "H": H, "seed": seed}
    options = {"log_decay": log_decay, "with_state": with_state, "norm_const": norm_const}
    case = make_case(**sizes, **where, **options, beta=True, output_final_state=True)
    _check(case, dtype, chunk_size=chunk_size, threads=threads)


@pytest.mark.parametrize("log_decay", [0.0, -1e-4, -50.0, -1e30, -torch.inf])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_extremes_of_decay_and_erase(beta: float, log_decay: float, instruction_set: str) -> None:
    """All tokens alike, and every third with the opposite extreme; one direction repeated, which beta=1 overwrites."""
    case = make_case(B=1, T=300, K=12, V=9, log_decay=-1.0, beta=True, with_state=True, output_final_state=True)
    assert case.log_decay is not None
    assert case.beta is not None
    case.log_decay[:], case.log_decay[:, ::3] = log_decay, -50.0 if log_decay == 0 else -1e-3
    case.k[:, 100:200] = case.k[:, 100:101]
    case.k[:, 200:250:2], case.k[:, 201:250:2] = case.k[:, 200:201], -case.k[:, 200:201]
    case.beta[:], case.beta[:, ::7] = beta, 1 - beta
    _check(case)


def test_a_strong_decay_costs_the_digits_of_none_after_it(instruction_set: str) -> None:
    case = make_case(B=1, T=64, K=8, V=4, log_decay=-1e-3, beta=True)
    assert case.log_decay is not None
    case.log_decay[:, :40] = -900.0
    _check(case)


def test_decays_that_leave_nothing_have_gradients_of_nothing(instruction_set: str) -> None:
    case = make_case(T=100, K=8, V=4, log_decay=-1.0, beta=True, with_state=True, output_final_state=True)
    assert case.log_decay is not None
    case.log_decay[:] = -50.0
    truth, found = run(case, "naive")["dlog_decay"], run(case.to(torch.float32), "native")["dlog_decay"]
    assert (found - truth).abs().max() <= TOLERANCE[torch.float32] * truth.abs().max()


def test_garbage_at_padding_reaches_nothing(instruction_set: str) -> None:
    case = make_case(B=3, T=70, mask="holes", log_decay=-0.5, beta=True, with_state=True, output_final_state=True)
    assert case.attention_mask is not None
    dirty = {}
    for name in ("q", "k", "v", "log_decay", "beta"):
        x = getattr(case, name)
        hidden = ~case.attention_mask.reshape(*case.attention_mask.shape, *[1] * (x.dim() - 2))
        dirty[name] = x.masked_fill(hidden, -torch.inf if name == "log_decay" else torch.nan)
    results = run(replace(case, **dirty).to(torch.float32), "native")
    assert_same(results, run(case, "naive"), torch.float32)
    for name in ("o", "dq", "dk", "dv", "dlog_decay", "dbeta"):
        assert (results[name][~case.attention_mask] == 0).all(), name


_MANY_SEGMENTS: dict[str, dict[str, Any]] = {
    "one head": {"B": 1, "T": 1100, "H": 1, "K": 16, "V": 16, "mask": "holes"},
    "heads": {"B": 1, "T": 1100, "H": 3, "K": 8, "V": 20},
    "packed": {"lengths": (600, 3, 0, 513), "H": 2, "K": 8, "V": 8},
    "chunks of 48": {"B": 1, "T": 600, "H": 2, "K": 8, "V": 8, "mask": "left"},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", _MANY_SEGMENTS)
def test_sequences_of_many_segments(kind: str, threads: int) -> None:
    ends = {"with_state": True, "output_final_state": True}
    case, truth = _known(**{"log_decay": -0.1, "beta": True} | ends | _MANY_SEGMENTS[kind])
    _check(case, chunk_size=48 if "48" in kind else None, threads=threads, truth=truth)


def test_any_strides_give_the_same() -> None:
    case = make_case(T=70, K=8, V=8, H=3, log_decay=-0.5, beta=True).to(torch.float32)
    assert case.log_decay is not None
    assert case.beta is not None
    expected = run(case, "native")
    strided = {name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    strided |= {name: torch.stack([getattr(case, name)] * 2, -1)[..., 1] for name in ("log_decay", "beta")}
    for name, x in run(replace(case, **strided), "native").items():
        assert torch.equal(x, expected[name]), name
    own = case.log_decay[:1, :1].expand(2, 70, 3)
    results = run(replace(case, log_decay=own), "native")
    for name, x in run(replace(case, log_decay=own.contiguous()), "native").items():
        assert torch.equal(x, results[name]), name


@pytest.mark.parametrize("wanted", ["o", "final_kv"])
@pytest.mark.parametrize("log_decay", [None, -0.5])
def test_gradients_of_one_output_alone(wanted: str, log_decay: float | None) -> None:
    case = make_case(T=600, K=8, V=12, log_decay=log_decay, beta=True)
    found = []
    for implementation, own in (("naive", case), ("native", case.to(torch.float32))):
        leaves = [x.clone().requires_grad_() for x in (own.q, own.k, own.v, own.beta) if x is not None]
        q, k, v, beta = leaves
        options: dict[str, Any] = {"log_decay": own.log_decay, "beta": beta, "implementation": implementation}
        o, state = cosine_attention(q, k, v, None, causal=True, output_final_state=True, **options)
        assert state is not None
        loss = (o if wanted == "o" else state.kv).square().sum()
        found.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for expected, x in zip(*found, strict=True):
        expected = torch.zeros_like(x) if expected is None else expected
        assert (x - expected).abs().max() <= TOLERANCE[torch.float32] * max(1, expected.abs().max())


def test_backward_finds_states_that_forward_did_not_keep() -> None:
    case = make_case(B=1, T=1100, K=8, V=8, log_decay=-0.1, beta=True).to(torch.float32)
    inputs = (case.q, case.k, case.v, None, None, None, None, None, case.log_decay, case.beta)
    outputs = torch.ops.cottention.gated("native", *inputs, True, 0, 512)
    grad = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0))
    kept = torch.ops.cottention.gated_backward("native", grad, None, *inputs, outputs[3], True, 0, 512)
    found = torch.ops.cottention.gated_backward("native", grad, None, *inputs, outputs[3][:0], True, 0, 0)
    for x, y in zip(kept, found, strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [None, [9, 0, 11]])
def test_operators_pass_opcheck(lengths: list[int] | None) -> None:
    case = make_case(T=20, K=3, V=2, lengths=lengths, with_state=True, log_decay=-0.5, beta=True).to(torch.float32)
    assert case.initial_state is not None
    inputs = (case.q, case.k, case.v, case.norm_const, None, case.cu_seqlens, *case.initial_state)
    leaves = [x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    arguments = ("native", *leaves, case.log_decay, case.beta, True, 0, 512)
    torch.library.opcheck(torch.ops.cottention.gated.default, arguments)


def test_auto_takes_it() -> None:
    case = make_case(T=4, beta=True)
    for dtype, name in ((torch.float32, "native"), (torch.bfloat16, "native"), (torch.float64, "chunk")):
        own = case.to(dtype)
        assert choose_implementation("auto", own.q, own.v, is_gated=True, erases=True) == name


# The step.

_RULES = [{"log_decay": -0.5}, {"beta": True}, {"log_decay": -0.5, "beta": True}, {"log_decay": -50.0, "beta": True}]


def _token(case: Case, t: int) -> dict[str, Any]:
    mask = None if case.attention_mask is None else case.attention_mask[:, t]
    gates = {name: None if x is None else x[:, t] for name, x in (("log_decay", case.log_decay), ("beta", case.beta))}
    return {"attention_mask": mask, **gates}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rules", _RULES)
@pytest.mark.parametrize(("K", "V"), [(8, 4), (33, 83)])
def test_steps_are_the_recurrence(
    dtype: torch.dtype, rules: dict[str, Any], K: int, V: int, instruction_set: str
) -> None:
    case = make_case(T=6, H=3, K=K, V=V, mask="holes", with_state=True, output_final_state=True, **rules)
    truth, state = _attend_all(case)
    own = case.to(dtype)
    assert own.initial_state is not None
    found: CosineState | None = CosineState(*(x.clone() for x in own.initial_state))
    for t in range(6):
        given = (own.q[:, t], own.k[:, t], own.v[:, t], own.norm_const, found)
        o, found = cosine_attention_step(*given, **_token(own, t), in_place=t % 2 == 0)
        assert (o - truth[:, t]).abs().max() <= TOLERANCE[dtype] * truth.abs().max()
    assert (found.kv - state.kv).abs().max() <= TOLERANCE[dtype] * state.kv.abs().max()
    assert torch.equal(found.seen, state.seen)


def _attend_all(case: Case) -> tuple[torch.Tensor, CosineState]:
    options: dict[str, Any] = {"attention_mask": case.attention_mask, "initial_state": case.initial_state}
    options |= {"log_decay": case.log_decay, "beta": case.beta, "output_final_state": True, "implementation": "naive"}
    o, state = cosine_attention(case.q, case.k, case.v, case.norm_const, causal=True, **options)
    assert state is not None
    return o, state


@pytest.mark.parametrize("rules", [{}, *_RULES])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_reads_and_writes_rows_of_a_pool(rules: dict[str, Any], threads: int) -> None:
    case = make_case(B=5, T=1, H=3, K=24, V=40, mask="holes", with_state=True, **rules).to(torch.float32)
    given = (case.q[:, 0], case.k[:, 0], case.v[:, 0], case.norm_const)
    rows = torch.tensor([6, 0, 3, 8, 1])
    pool = CosineState(torch.randn(9, 3, 24, 40), torch.randint(0, 9, (9,)))
    before = CosineState(*(x.clone() for x in pool))
    expected, new = cosine_attention_step(*given, before.index_select(rows), **_token(case, 0))
    number = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        o, after = cosine_attention_step(*given, pool, **_token(case, 0), state_indices=rows)
    finally:
        torch.set_num_threads(number)
    assert after is pool
    assert torch.equal(o, expected)
    assert torch.equal(pool.kv, before.kv.index_copy(0, rows, new.kv))
    assert torch.equal(pool.seen, before.seen.index_copy(0, rows, new.seen))


def test_a_step_into_a_pool_of_any_strides() -> None:
    case = make_case(B=2, T=1, log_decay=-0.5, beta=True).to(torch.float32)
    given = (case.q[:, 0], case.k[:, 0], case.v[:, 0], case.norm_const)
    kv, seen = torch.randn(4, 2, 12, 8), torch.randint(0, 9, (4,))
    results = []
    for own in (kv.mT, kv.mT.contiguous()):
        pool = CosineState(own.clone(memory_format=torch.preserve_format), seen.clone())
        assert pool.kv.is_contiguous() == own.is_contiguous()
        o, pool = cosine_attention_step(*given, pool, **_token(case, 0), state_indices=torch.tensor([3, 1]))
        results.append((o, pool.kv, pool.seen))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_a_first_step_has_no_state() -> None:
    case = make_case(T=1, K=20, V=70, log_decay=-0.5, beta=True)
    truth, state = _attend_all(case)
    own = case.to(torch.float32)
    o, found = cosine_attention_step(own.q, own.k, own.v, own.norm_const, None, **_token(own, 0))
    assert (o - truth).abs().max() <= TOLERANCE[torch.float32] * truth.abs().max()
    assert (found.kv - state.kv).abs().max() <= TOLERANCE[torch.float32] * state.kv.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("log_decay", [None, -0.01])
def test_no_drift_over_a_million_tokens(log_decay: float | None) -> None:
    """Erased states lose what rounding did to them: the last tokens are as exact as the first."""
    case = make_case(B=1, T=1_000_000, H=1, K=16, V=16, norm_const=False, log_decay=log_decay, beta=True)
    results = []
    for dtype, implementation in ((torch.float64, "chunk"), (torch.float32, "native")):
        own = case.to(dtype)
        q, k, v = (x.clone().requires_grad_() for x in (own.q, own.k, own.v))
        options: dict[str, Any] = {"log_decay": own.log_decay, "beta": own.beta, "implementation": implementation}
        o, _ = cosine_attention(q, k, v, None, causal=True, **options)
        grad = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([x.detach().double() for x in (o, *torch.autograd.grad(o, (q, k, v), grad.to(dtype)))])
    for truth, found in zip(*results, strict=True):
        error = (found - truth).abs()
        assert error.max() <= TOLERANCE[torch.float32] * truth.abs().max()
        assert error[:, 900_000:].mean() <= 2 * error[:, :100_000].mean()
        assert error[:, :100_000].mean() <= 2 * error[:, 900_000:].mean()
