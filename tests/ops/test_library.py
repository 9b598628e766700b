"""The operation inside PyTorch: gradcheck, operator checks, torch.compile, autocast, checkpointing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cottention.ops import CosineState, cosine_attention, cosine_attention_step
from tests.ops.helpers import make_case


@pytest.mark.parametrize("implementation", ["naive", "chunk"])
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "cross", "packed", "state"])
def test_gradients_pass_gradcheck(implementation: str, kind: str) -> None:
    case = {
        "causal": make_case(B=2, T=9, K=3, V=2, mask="holes"),
        "bidirectional": make_case(B=2, T=9, K=3, V=2, causal=False, mask="left"),
        "cross": make_case(B=2, T=4, S=9, K=3, V=2, causal=False, mask="right"),
        "packed": make_case(lengths=[4, 0, 5], K=3, V=2),
        "state": make_case(B=2, T=9, K=3, V=2, with_state=True, output_final_state=True),
    }[kind]
    state = case.initial_state
    leaves = [case.q, case.k, case.v, case.norm_const, *([] if state is None else [state.kv])]

    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor, kv: Tensor | None = None) -> tuple[Tensor, ...]:
        o, final = cosine_attention(
            q,
            k,
            v,
            m,
            causal=case.causal,
            attention_mask=case.attention_mask,
            cu_seqlens=case.cu_seqlens,
            initial_state=None if state is None or kv is None else CosineState(kv, state.seen),
            output_final_state=case.output_final_state,
            chunk_size=4,
            implementation=implementation,
        )
        return (o,) if final is None else (o, final.kv)

    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in leaves if x is not None])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("asks_states", [False, True])
def test_causal_operator_passes_opcheck(packed: bool, asks_states: bool) -> None:
    lengths = [9, 0, 11] if packed else None
    case = make_case(T=20, K=3, V=2, lengths=lengths, with_state=asks_states, mask=None if packed else "holes")
    state = case.initial_state or (None, None)
    q, k, v, m = (x.requires_grad_() for x in (case.q, case.k, case.v, case.norm_const) if x is not None)
    arguments = ("chunk", q, k, v, m, case.attention_mask, case.cu_seqlens, *state, asks_states, 8, 16)
    torch.library.opcheck(torch.ops.cottention.causal.default, arguments)


def test_bidirectional_operator_passes_opcheck() -> None:
    case = make_case(T=20, K=3, V=2, causal=False, mask="holes")
    q, k, v, m = (x.requires_grad_() for x in (case.q, case.k, case.v, case.norm_const) if x is not None)
    arguments = ("chunk", q, k, v, m, case.attention_mask, None, 8, 16)
    torch.library.opcheck(torch.ops.cottention.bidirectional.default, arguments)


def _everything(implementation: str) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Causal with states, bidirectional, packed and the one-token step in one function of q, k, v and m."""

    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor, mask: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
        o, state = cosine_attention(
            q, k, v, m, causal=True, attention_mask=mask, output_final_state=True, implementation=implementation
        )
        both, _ = cosine_attention(q, k, v, m, causal=False, attention_mask=mask, implementation=implementation)
        q1, k1, v1 = (x.flatten(0, 1)[None] for x in (q, k, v))
        packed, _ = cosine_attention(q1, k1, v1, m, causal=True, cu_seqlens=cu_seqlens, implementation=implementation)
        step, _ = cosine_attention_step(q[:, 0], k[:, 0], v[:, 0], m, state)
        return o, both, packed, step

    return function  # type: ignore[return-value]


def _compiled_equals_eager(implementation: str, backend: str) -> None:
    case = make_case(T=70, mask="holes")
    cu_seqlens = torch.tensor([0, 30, 30, 100, 140], dtype=torch.int32)
    results = []
    for compiled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.norm_const) if x is not None]
        function = _everything(implementation)
        if compiled:
            torch.compiler.reset()
            function = torch.compile(function, fullgraph=True, backend=backend)
        outputs = function(*leaves, case.attention_mask, cu_seqlens)
        results.append([*outputs, *torch.autograd.grad(torch.stack([x.square().sum() for x in outputs]).sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("implementation", ["naive", "chunk"])
def test_compiles_without_a_graph_break(implementation: str) -> None:
    _compiled_equals_eager(implementation, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["naive", "chunk"])
def test_compiles_with_inductor(implementation: str) -> None:
    _compiled_equals_eager(implementation, "inductor")


def test_compiles_for_any_length() -> None:
    torch.compiler.reset()
    function = torch.compile(
        lambda q, k, v, m: cosine_attention(q, k, v, m, causal=True)[0],
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for T in (65, 70, 200):
        case = make_case(T=T)
        expected, _ = cosine_attention(case.q, case.k, case.v, case.norm_const, causal=True)
        torch.testing.assert_close(function(case.q, case.k, case.v, case.norm_const), expected)


@pytest.mark.parametrize("implementation", ["naive", "chunk"])
def test_autocast_gives_its_dtype_and_keeps_states_in_float32(implementation: str) -> None:
    case = make_case(T=70).to(torch.float32)
    assert case.norm_const is not None
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.norm_const)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = cosine_attention(*leaves, causal=True, output_final_state=True, implementation=implementation)
        half = (leaves[0].bfloat16(), *leaves[1:])
        mixed, _ = cosine_attention(*half, causal=True, implementation=implementation)
    assert state is not None
    assert o.dtype == mixed.dtype == torch.bfloat16
    assert state.kv.dtype == torch.float32
    q, k, v = (x.bfloat16() for x in (case.q, case.k, case.v))
    expected, expected_state = cosine_attention(
        q, k, v, case.norm_const, causal=True, output_final_state=True, implementation=implementation
    )
    assert expected_state is not None
    torch.testing.assert_close(o, expected, rtol=0, atol=0)
    torch.testing.assert_close(state.kv, expected_state.kv, rtol=0, atol=0)
    gradients = torch.autograd.grad(o.float().sum(), leaves)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


def test_autocast_leaves_float64_alone() -> None:
    case = make_case(T=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _ = cosine_attention(case.q, case.k, case.v, case.norm_const, causal=True)
    assert o.dtype == torch.float64


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    case = make_case(T=70)
    gradients = []
    for recompute in (False, True):
        q = case.q.clone().requires_grad_()

        def attend(q: Tensor) -> Tensor:
            return cosine_attention(q, case.k, case.v, case.norm_const, causal=True)[0]

        o = checkpoint(attend, q, use_reentrant=False) if recompute else attend(q)
        gradients.append(torch.autograd.grad(o.square().sum(), q)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("implementation", ["naive", "chunk"])
def test_results_are_deterministic(implementation: str) -> None:
    case = make_case(B=3, T=200, mask="holes").to(torch.float32)
    first, second = (
        cosine_attention(
            case.q,
            case.k,
            case.v,
            case.norm_const,
            causal=True,
            attention_mask=case.attention_mask,
            implementation=implementation,
        )[0]
        for _ in range(2)
    )
    assert torch.equal(first, second)
