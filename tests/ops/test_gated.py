"""Decay and erase: naive is the recurrence, chunk and the step equal it in values and gradients, whatever the call."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cottention.ops import CosineState, choose_implementation, cosine_attention, cosine_attention_step
from cottention.ops.chunk import gated
from cottention.ops.native.binding import suits_native
from tests.ops import test_properties  # noqa: F401 (its hypothesis profile)
from tests.ops.helpers import TOLERANCE, Case, assert_same, make_case, run

_TOLERANCE = 1e-11  # float64, relative to the largest: some hundred roundings


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape, name
        size = max(1.0, x.abs().max().item()) if x.numel() else 1.0
        torch.testing.assert_close(found[name], x, rtol=0, atol=_TOLERANCE * size, msg=lambda text: f"{name}: {text}")  # noqa: B023


def _by_the_equations(case: Case) -> tuple[Tensor, Tensor]:
    """o and the final kv of a causal call by Python's own loops over rows, heads and tokens, one matrix at a time."""
    B, T, H, K = case.q.shape
    V = case.v.shape[3]
    N = B if case.cu_seqlens is None else len(case.cu_seqlens) - 1
    o, kv = torch.zeros(B, T, H, V, dtype=torch.float64), torch.zeros(N, H, K, V, dtype=torch.float64)
    for n in range(N):
        row, tokens = (n, range(T)) if case.cu_seqlens is None else (0, range(*case.cu_seqlens[n : n + 2].tolist()))
        for h in range(H):
            state, count = kv[n, h], 0
            if case.initial_state is not None:
                state, count = case.initial_state.kv[n, h], int(case.initial_state.seen[n])
            for t in tokens:
                if case.attention_mask is not None and not case.attention_mask[row, t]:
                    continue
                count += 1
                q, k, v = (x[row, t, h] for x in (case.q, case.k, case.v))
                q, k = q / q.norm(), k / k.norm()
                if case.norm_const is not None:
                    v = v / count ** torch.sigmoid(case.norm_const[h])
                if case.beta is not None:
                    b = case.beta[row, t, h]
                    state = (torch.eye(K, dtype=torch.float64) - b * torch.outer(k, k)) @ state
                    v = b * v
                if case.log_decay is not None:
                    kept = case.log_decay[row, t, h].exp()
                    state = kept * state
                state = state + torch.outer(k, v)
                o[row, t, h] = state.T @ q
            kv[n, h] = state
    return o, kv


@pytest.mark.parametrize("rules", [{"log_decay": -1.0}, {"beta": True}, {"log_decay": -0.3, "beta": True}])
@pytest.mark.parametrize(
    "kind",
    [{"mask": "holes"}, {"mask": "left", "with_state": True}, {"lengths": [3, 0, 9, 1], "with_state": True}],
)
@pytest.mark.parametrize("implementation", ["naive", "chunk"])
def test_the_recurrence_is_that_of_the_equations(
    implementation: str, kind: dict[str, Any], rules: dict[str, Any]
) -> None:
    case = make_case(T=17, K=4, V=3, output_final_state=True, **kind, **rules)
    results = run(case, implementation)
    o, kv = _by_the_equations(case)
    _assert_close({"o": results["o"], "kv": results["final_kv"]}, {"o": o, "kv": kv})


_LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 129, 200]))


@given(
    T=_LENGTHS,
    K=st.integers(1, 6),
    V=st.integers(1, 5),
    causal=st.booleans(),
    log_decay=st.sampled_from([None, -0.01, -1.0, -50.0]),
    beta=st.booleans(),
    place=st.sampled_from([None, "right", "left", "holes", "empty_row", "packed"]),
    with_state=st.booleans(),
    norm_const=st.booleans(),
    chunk_size=st.sampled_from([None, 1, 7, 16, 64, 10**9]),
    seed=st.integers(0, 2**31 - 1),
    data=st.data(),
)
def test_chunk_equals_naive(
    T: int,
    K: int,
    V: int,
    causal: bool,
    log_decay: float | None,
    beta: bool,
    place: str | None,
    with_state: bool,
    norm_const: bool,
    chunk_size: int | None,
    seed: int,
    data: st.DataObject,
) -> None:
    beta = causal and (beta or log_decay is None)
    where: dict[str, Any] = {"mask": place}
    if place == "packed":
        where = {"lengths": data.draw(st.lists(st.integers(0, 70), max_size=4))}
    case = make_case(
        T=T,
        K=K,
        V=V,
        causal=causal,
        log_decay=log_decay if beta else log_decay or -0.2,
        beta=beta,
        with_state=causal and with_state,
        output_final_state=causal,
        norm_const=norm_const,
        seed=seed,
        **where,
    )
    _assert_close(run(case, "chunk", chunk_size=chunk_size), run(case, "naive"))


@pytest.mark.parametrize(
    "log_decay",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, -1e-4, -50.0, -1e30)), -torch.inf],
)
@pytest.mark.parametrize(
    ("causal", "beta"), [(True, None), pytest.param(True, 0.0, marks=pytest.mark.slow), (True, 1.0), (False, None)]
)
def test_extremes_over_a_thousand_tokens(beta: float | None, log_decay: float, causal: bool) -> None:
    """All tokens alike, and every third with the opposite extreme; one direction repeated, which beta=1 overwrites."""
    case = make_case(B=1, T=1000, K=3, V=2, causal=causal, log_decay=-1.0, beta=beta is not None)
    assert case.log_decay is not None
    case.log_decay[:], case.log_decay[:, ::3] = log_decay, -50.0 if log_decay == 0 else -1e-3
    case.k[:, 100:400] = case.k[:, 100:101]
    if beta is not None and case.beta is not None:
        case.beta[:], case.beta[:, ::7] = beta, 1 - beta
    _assert_close(run(case, "chunk"), run(case, "naive"))


def test_without_decay_and_with_beta_of_nothing_it_is_the_plain_operation() -> None:
    case = make_case(T=150, mask="holes", with_state=True, output_final_state=True)
    plain = run(case, "naive")
    for implementation in ("naive", "chunk"):
        decays = case.q.new_zeros(1, 1, 2).expand(2, 150, 2)
        found = run(Case(**{**vars(case), "log_decay": decays}), implementation)
        assert found.pop("dlog_decay").shape == decays.shape
        _assert_close(found, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_every_dtype_to_its_rounding(causal: bool, dtype: torch.dtype) -> None:
    case = make_case(T=129, K=16, V=8, mask="holes", causal=causal, log_decay=-0.5, beta=causal)
    truth = run(case, "naive")
    for implementation in ("naive", "chunk"):
        results = run(case.to(dtype), implementation)
        assert results["o"].dtype == dtype
        assert results["dlog_decay"].dtype == torch.float32
        assert_same(results, truth, dtype)


def test_a_strong_decay_costs_the_digits_of_none_after_it() -> None:
    case = make_case(B=1, T=64, K=4, V=4, log_decay=-1e-3)
    assert case.log_decay is not None
    case.log_decay[:, :32] = -900.0
    truth = run(case, "naive")
    for implementation in ("naive", "chunk"):
        assert_same(run(case.to(torch.float32), implementation), truth, torch.float32)


@pytest.mark.parametrize("causal", [True, False])
def test_garbage_at_padding_reaches_nothing(causal: bool) -> None:
    case = make_case(B=3, T=70, mask="holes", causal=causal, log_decay=-0.5, beta=causal)
    assert case.attention_mask is not None
    expected = run(case, "naive")
    given = {
        name: x for name, x in vars(case).items() if name in ("q", "k", "v", "log_decay", "beta") and x is not None
    }
    for name, x in given.items():
        hidden = ~case.attention_mask.reshape(*case.attention_mask.shape, *[1] * (x.dim() - 2))
        given[name] = x.masked_fill(hidden, -torch.inf if name == "log_decay" else torch.nan)
    for implementation in ("naive", "chunk"):
        results = run(Case(**{**vars(case), **given}), implementation)
        _assert_close(results, expected)
        for name in ("o", "dq", "dk", "dv", "dlog_decay"):
            assert (results[name][~case.attention_mask] == 0).all(), name


@pytest.mark.parametrize("implementation", ["naive", "chunk"])
def test_one_decay_a_head_is_an_expanded_view(implementation: str) -> None:
    case = make_case(T=70, log_decay=-1.0)
    own = torch.tensor([-0.1, -2.0], dtype=torch.float64, requires_grad=True)
    given = (case.q, case.k, case.v, case.norm_const)
    o, _ = cosine_attention(*given, causal=True, log_decay=own.expand(2, 70, 2), implementation=implementation)
    copied = own.detach().expand(2, 70, 2).clone().requires_grad_()
    expected, _ = cosine_attention(*given, causal=True, log_decay=copied, implementation="naive")
    (found,) = torch.autograd.grad(o.square().sum(), own)
    (each,) = torch.autograd.grad(expected.square().sum(), copied)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(found, each.sum((0, 1)))


@given(cuts=st.lists(st.integers(0, 150), max_size=3), beta=st.booleans(), seed=st.integers(0, 1000))
def test_a_state_carried_over_any_split_gives_one_pass(cuts: list[int], beta: bool, seed: int) -> None:
    case = make_case(T=150, mask="holes", log_decay=-0.5, beta=beta, seed=seed)
    options: dict[str, Any] = {"causal": True, "output_final_state": True}
    per_token: dict[str, Any] = {"attention_mask": case.attention_mask}
    per_token |= {"log_decay": case.log_decay, "beta": case.beta}
    whole, final = cosine_attention(case.q, case.k, case.v, case.norm_const, **options, **per_token)
    pieces, state = [], None
    bounds = [0, *sorted(cuts), 150]
    for a, b in itertools.pairwise(bounds):
        q, k, v = (x[:, a:b] for x in (case.q, case.k, case.v))
        own: dict[str, Any] = {name: None if x is None else x[:, a:b] for name, x in per_token.items()}
        o, state = cosine_attention(q, k, v, case.norm_const, initial_state=state, **options, **own)
        pieces.append(o)
    assert state is not None
    assert final is not None
    _assert_close({"o": torch.cat(pieces, 1), "kv": state.kv}, {"o": whole, "kv": final.kv})
    assert torch.equal(state.seen, final.seen)


# The step.


@pytest.mark.parametrize("rules", [{"log_decay": -1.0}, {"beta": True}, {"log_decay": -0.3, "beta": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_steps_equal_one_pass(dtype: torch.dtype, rules: dict[str, Any]) -> None:
    case = make_case(B=3, T=20, mask="left", with_state=True, output_final_state=True, **rules)
    expected = run(case, "naive")
    case = case.to(dtype)
    state, outputs = case.initial_state, []
    for t in range(20):
        own: dict[str, Any] = {"log_decay": case.log_decay, "beta": case.beta}
        own = {name: None if x is None else x[:, t] for name, x in own.items()}
        assert case.attention_mask is not None
        q, k, v = (x[:, t] for x in (case.q, case.k, case.v))
        o, state = cosine_attention_step(
            q, k, v, case.norm_const, state, attention_mask=case.attention_mask[:, t], **own, in_place=t > 0
        )
        outputs.append(o)
    assert state is not None
    found = {"o": torch.stack(outputs, 1), "final_kv": state.kv}
    assert_same(found, {name: expected[name] for name in found}, dtype)
    assert torch.equal(state.seen, expected["final_seen"])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_state_indices_name_rows_of_a_pool(dtype: torch.dtype, gated: bool) -> None:
    case = make_case(B=3, T=1, with_state=True, log_decay=-1.0, beta=True).to(dtype)
    pool = make_case(B=7, T=1, with_state=True, seed=5).to(dtype).initial_state
    assert pool is not None
    before = CosineState(pool.kv.clone(), pool.seen.clone())
    rows = torch.tensor([5, 0, 3])
    gates: dict[str, Any] = {"log_decay": case.log_decay, "beta": case.beta} if gated else {}
    mask = torch.tensor([1, 1, 0])
    given = (case.q, case.k, case.v, case.norm_const)
    expected, new = cosine_attention_step(*given, before.index_select(rows), attention_mask=mask, **gates)
    o, after = cosine_attention_step(*given, pool, attention_mask=mask, **gates, state_indices=rows)
    assert after.kv is pool.kv
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(pool.kv[rows], new.kv)
    assert torch.equal(pool.seen[rows], new.seen)
    others = [1, 2, 4, 6]
    assert torch.equal(pool.kv[others], before.kv[others])
    assert torch.equal(pool.seen[others], before.seen[others])


# Inside PyTorch.


def _leaves(case: Case) -> list[Tensor]:
    given = (case.q, case.k, case.v, case.norm_const, case.log_decay, case.beta)
    return [x.clone().requires_grad_() for x in given if x is not None]


def _attend(implementation: str, causal: bool) -> Any:
    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor, log_decay: Tensor, beta: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"log_decay": log_decay, "beta": beta, "implementation": implementation}
        return cosine_attention(q, k, v, m, causal=causal, **options)[0]

    return attend


@pytest.mark.parametrize("causal", [True, False])
def test_second_derivatives_forward_mode_and_torch_func_are_those_of_naive(causal: bool) -> None:
    case = make_case(B=1, T=9, K=3, V=2, causal=causal, log_decay=-0.5, beta=causal)
    leaves = _leaves(case)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in leaves]
    results: list[list[Tensor]] = []
    for implementation in ("naive", "chunk"):
        attend = _attend(implementation, causal)

        def loss(*inputs: Tensor) -> Tensor:
            return attend(*inputs).square().sum()  # noqa: B023

        gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        inner = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        assert isinstance(inner, Tensor)
        second = torch.autograd.grad(inner, leaves)
        tangent = torch.func.jvp(attend, tuple(leaves), tuple(directions))[1]
        pairs = [torch.stack([x, 0.5 * x]) for x in leaves]
        mapped = torch.vmap(torch.func.grad(loss))(*pairs)
        results.append([*second, tangent, mapped])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_operators_pass_opcheck(packed: bool, causal: bool) -> None:
    lengths = [9, 0, 11] if packed else None
    case = make_case(T=20, K=3, V=2, lengths=lengths, with_state=causal, causal=causal, log_decay=-0.5, beta=causal)
    q, k, v, m, *gates = _leaves(case)
    state = case.initial_state or (None, None)
    arguments = (
        "chunk",
        q,
        k,
        v,
        m,
        None,
        case.cu_seqlens,
        *state,
        gates[0],
        gates[1] if causal else None,
        causal,
        8,
        0,
    )
    torch.library.opcheck(torch.ops.cottention.gated.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    case = make_case(T=70, log_decay=-0.5, beta=True)
    leaves = _leaves(case)
    cu_seqlens = torch.tensor([0, 30, 30, 140], dtype=torch.int32)

    def everything(*inputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v, m, log_decay, beta = inputs
        options: dict[str, Any] = {"implementation": "chunk"}
        gates = {"log_decay": log_decay, "beta": beta}
        o, state = cosine_attention(q, k, v, m, causal=True, output_final_state=True, **gates, **options)
        both, _ = cosine_attention(q, k, v, m, causal=False, log_decay=log_decay, **options)
        q1, k1, v1, *own = (x.flatten(0, 1)[None] for x in (q, k, v, log_decay, beta))
        options |= {"cu_seqlens": cu_seqlens, "log_decay": own[0], "beta": own[1]}
        packed, _ = cosine_attention(q1, k1, v1, m, causal=True, **options)
        q1, k1, v1, *own = (x[:, 0] for x in (q, k, v, log_decay, beta))
        step, _ = cosine_attention_step(q1, k1, v1, m, state, log_decay=own[0], beta=own[1])
        return o, both, packed, step

    results = []
    for function in (everything, torch.compile(everything, fullgraph=True, backend="aot_eager")):
        torch.compiler.reset()
        outputs = function(*leaves)
        loss = torch.stack([x.square().sum() for x in outputs]).sum()
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-11)


def test_autocast_and_checkpointing_give_their_dtypes_and_gradients() -> None:
    case = make_case(T=70, log_decay=-0.5, beta=True).to(torch.float32)
    leaves = _leaves(case)
    attend = _attend("auto", True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attend(*leaves)
        again = checkpoint(attend, *leaves, use_reentrant=False)
    assert o.dtype == torch.bfloat16
    gradients = torch.autograd.grad(o.float().sum(), leaves)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
    for found, expected in zip(torch.autograd.grad(again.float().sum(), leaves), gradients, strict=True):
        assert torch.equal(found, expected)


def test_long_sequences_need_memory_in_proportion() -> None:
    """What backward recomputes lives a chunk at a time; between chunks stays a state, K x V numbers for 64 tokens."""
    case = make_case(B=1, T=20_000, H=1, K=4, V=4, log_decay=-0.1, beta=True).to(torch.float32)
    leaves = _leaves(case)
    sizes: list[int] = []

    def keep(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        o = _attend("chunk", True)(*leaves)
    assert sum(sizes) <= sum(x.numel() for x in leaves)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(o.sum(), leaves))


def test_auto_takes_the_fastest_and_what_cannot_run_is_refused() -> None:
    case = make_case(T=40, log_decay=-0.5).to(torch.float32)
    q, v = case.q, case.v
    assert choose_implementation("auto", q, v, is_gated=True) == ("native" if suits_native(q) else "chunk")
    assert choose_implementation("auto", q.double(), v.double(), is_gated=True) == "chunk"
    with pytest.raises(ValueError, match='"triton" cannot run here: it needs tensors on a CUDA or HIP device'):
        _attend("triton", True)(q, case.k, v, case.norm_const, case.log_decay)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"log_decay": [0.0]}, TypeError, "log_decay must be a tensor or None; got list"),
        ({"log_decay": torch.zeros(2, 6)}, ValueError, r"log_decay must have shape \[B, T, H\] = \[2, 6, 3\]; got"),
        ({"log_decay": torch.zeros(2, 6, 3).bfloat16()}, TypeError, "log_decay must be float32, .*; got bfloat16"),
        ({"log_decay": torch.zeros(2, 6, 3).long()}, TypeError, "log_decay must be floating point; got int64"),
        ({"log_decay": torch.tensor(0.5).expand(2, 6, 3)}, ValueError, "log_decay must be at most 0, .*; got 0.5"),
        ({"log_decay": torch.zeros(2, 6, 3, device="meta")}, ValueError, "log_decay must be on the device of q, cpu"),
        ({"beta": torch.zeros(2, 6, 4)}, ValueError, r"beta must have shape \[B, T, H\] = \[2, 6, 3\]; got"),
        ({"beta": torch.zeros(2, 6, 3, device="meta")}, ValueError, "beta must be on the device of q, cpu; got meta"),
        ({"beta": torch.zeros(2, 6, 3), "causal": False}, ValueError, "beta needs causal=True: .*; got causal=False"),
    ],
)  # fmt: skip
def test_bad_gates_raise_one_line(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"q": torch.ones(2, 6, 3, 4), "k": torch.ones(2, 6, 3, 4), "v": torch.ones(2, 6, 3, 5)}
    arguments |= {"norm_const": torch.zeros(3), "causal": True}
    with pytest.raises(error, match=message) as caught:
        cosine_attention(**(arguments | changes))
    assert "\n" not in str(caught.value)


def test_log_decay_of_cross_attention_is_refused() -> None:
    q, k = torch.ones(1, 3, 1, 2), torch.ones(1, 5, 1, 2)
    with pytest.raises(ValueError, match="log_decay needs k and v with as many tokens as q; got T=3 for q and T=5"):
        cosine_attention(q, k, k, None, causal=False, log_decay=torch.zeros(1, 3, 1))


_POOL = CosineState.zeros(4, 3, 4, 5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"log_decay": torch.zeros(2, 4)}, ValueError, r"log_decay must have shape \[B, H\] or \[B, 1, H\] = "),
        ({"log_decay": torch.ones(2, 1, 3)}, ValueError, "log_decay must be at most 0, .*; got 1.0"),
        ({"beta": torch.zeros(3)}, ValueError, r"beta must have shape \[B, H\] or \[B, 1, H\]"),
        ({"state": None}, ValueError, "state_indices needs the state that it names rows of; got state=None"),
        ({"state": 5}, TypeError, r"state must be a CosineState\(kv, seen\); got int"),
        ({"attention_mask": [1, 1]}, TypeError, "attention_mask must be a tensor; got list"),
        ({"attention_mask": torch.ones(2, device="meta").bool()}, ValueError, "attention_mask must be on"),
        ({"state_indices": torch.tensor([0])}, ValueError, r"state_indices must have shape \[B\] = \[2\]; got \[1\]"),
        ({"state_indices": torch.tensor([0.0, 1.0])}, TypeError, "state_indices must be int64; got float32"),
        ({"state_indices": torch.tensor([0, 4])}, ValueError, "state_indices must lie from 0 to 3, the rows .*; got 4"),
        ({"state_indices": torch.tensor([-1, 2])}, ValueError, "state_indices must lie from 0 to 3.*; got -1"),
        ({"state_indices": torch.tensor([2, 2])}, ValueError, r"state_indices must name each row once; got \[2, 2\]"),
        ({"q": torch.ones(2, 3, 4, requires_grad=True)}, ValueError, "state_indices needs a state .* and no gradient"),
    ],
)  # fmt: skip
def test_bad_steps_raise_one_line(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"q": torch.ones(2, 3, 4), "k": torch.ones(2, 3, 4), "v": torch.ones(2, 3, 5)}
    arguments |= {"norm_const": torch.zeros(3), "state": _POOL, "state_indices": torch.tensor([0, 1])}
    with pytest.raises(error, match=message) as caught:
        cosine_attention_step(**(arguments | changes))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [False, True])
def test_no_drift_over_a_million_tokens(beta: bool) -> None:
    case = make_case(B=1, T=1_000_000, H=1, K=16, V=16, norm_const=False, log_decay=-0.01, beta=beta)
    outputs = []
    for dtype in (torch.float64, torch.float32):
        own = case.to(dtype)
        options: dict[str, Any] = {"log_decay": own.log_decay, "beta": own.beta}
        o, _ = cosine_attention(own.q, own.k, own.v, None, causal=True, **options, implementation="chunk")
        outputs.append(o.double())
    truth, found = outputs
    assert (found - truth).abs().max() <= TOLERANCE[torch.float32] * truth.abs().max()
    last = slice(900_000, None)
    assert (found - truth)[:, last].abs().max() <= 2 * (found - truth)[:, :100_000].abs().max()


def test_the_kernels_take_plain_arguments() -> None:
    case = make_case(T=10, log_decay=-0.5)
    outputs = gated(case.q, case.k, case.v, None, None, None, None, None, case.log_decay, None, True, 4, 0)
    assert [tuple(x.shape) for x in outputs] == [(2, 10, 2, 12), (2, 2, 8, 12), (2,), (0,)]
