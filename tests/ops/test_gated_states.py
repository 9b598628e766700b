"""Calls with gates give their final state, and pay for it, only where it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cottention.ops import CosineState, cosine_attention
from cottention.ops.native import is_available
from tests.ops.helpers import make_case

_NATIVE = pytest.param("native", marks=pytest.mark.skipif(not is_available(), reason="needs the native library"))
_RULES = pytest.mark.parametrize("beta", [False, True], ids=["decay", "decay and erase"])
_PACKING = pytest.mark.parametrize("lengths", [None, [70, 0, 5]], ids=["rows", "packed"])


def _inputs(lengths: list[int] | None, beta: bool) -> tuple[Any, ...]:
    case = make_case(T=75, lengths=lengths, with_state=True, log_decay=-0.5, beta=beta).to(torch.float32)
    assert case.initial_state is not None
    return (
        case.q,
        case.k,
        case.v,
        case.norm_const,
        None,
        case.cu_seqlens,
        *case.initial_state,
        case.log_decay,
        case.beta,
    )


@pytest.mark.parametrize("implementation", ["chunk", _NATIVE])
@_RULES
@_PACKING
def test_the_operator_gives_no_state_that_nobody_asked_for(
    lengths: list[int] | None, beta: bool, implementation: str
) -> None:
    inputs = _inputs(lengths, beta)
    operator = torch.ops.cottention.gated.default
    o, kv, seen, _ = operator(implementation, *inputs, True, 16, 0)
    alone, *nothing, _ = operator(implementation, *inputs, True, 16, 0, False)
    assert torch.equal(alone, o)
    assert kv.numel()
    assert seen.numel()
    assert [(x.numel(), x.dtype) for x in nothing] == [(0, kv.dtype), (0, seen.dtype)]


@pytest.mark.parametrize("implementation", ["chunk", _NATIVE])
@_RULES
def test_gradients_do_not_depend_on_whether_the_state_is_asked_for(beta: bool, implementation: str) -> None:
    case = make_case(T=75, log_decay=-0.5, beta=beta).to(torch.float32)
    found = []
    for output_final_state in (False, True):
        given = (case.q, case.k, case.v, case.norm_const, case.log_decay, case.beta)
        leaves: list[Any] = [None if x is None else x.clone().requires_grad_() for x in given]
        q, k, v, m, log_decay, strength = leaves
        o, state = cosine_attention(
            q, k, v, m, causal=True, log_decay=log_decay, beta=strength,
            output_final_state=output_final_state, implementation=implementation,
        )  # fmt: skip
        assert (state is not None) == output_final_state
        found.append(torch.autograd.grad(o.square().sum(), [x for x in leaves if x is not None]))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["chunk", _NATIVE])
@_PACKING
def test_the_operator_without_a_state_passes_opcheck(lengths: list[int] | None, implementation: str) -> None:
    inputs = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in _inputs(lengths, True)]
    segment = 512 if implementation == "native" else 0
    arguments = (implementation, *inputs, True, 16, segment, False)
    torch.library.opcheck(torch.ops.cottention.gated.default, arguments)


def test_transforms_and_second_derivatives_without_a_state() -> None:
    case = make_case(B=1, T=3, H=1, K=2, V=1, log_decay=-0.5, beta=True)

    def loss(q: Tensor, log_decay: Tensor) -> Tensor:
        options: dict[str, Any] = {"log_decay": log_decay, "beta": case.beta, "implementation": "chunk"}
        return cosine_attention(q, case.k, case.v, None, causal=True, **options)[0].square().sum()

    assert case.log_decay is not None
    inputs = (case.q.requires_grad_(), (case.log_decay - 0.01).requires_grad_())  # finite differences stay below 0
    assert torch.autograd.gradgradcheck(loss, inputs)
    mapped = torch.func.vmap(loss, in_dims=(0, None))(torch.stack([case.q, 2 * case.q]), inputs[1])
    torch.testing.assert_close(mapped[1], loss(2 * case.q, inputs[1]))


@pytest.mark.skipif(not is_available(), reason="needs the native library")
@_RULES
def test_second_derivatives_behind_native_are_those_of_the_equations(beta: bool) -> None:
    case = make_case(B=1, T=40, K=6, V=5, with_state=True, log_decay=-0.5, beta=beta)
    found = []
    for dtype, implementation in ((torch.float32, "native"), (torch.float64, "naive")):
        own = case.to(dtype)
        assert own.initial_state is not None
        given = (own.q, own.k, own.v, own.norm_const, own.initial_state.kv, own.log_decay, own.beta)
        leaves: list[Any] = [None if x is None else x.clone().requires_grad_() for x in given]
        q, k, v, m, kv, log_decay, strength = leaves
        o, state = cosine_attention(
            q, k, v, m, causal=True, initial_state=CosineState(kv, own.initial_state.seen), output_final_state=True,
            log_decay=log_decay, beta=strength, implementation=implementation,
        )  # fmt: skip
        assert state is not None
        wanted = [x for x in leaves if x is not None]
        first = torch.autograd.grad(o.square().sum() + state.kv.pow(3).sum(), wanted, create_graph=True)
        found.append(torch.autograd.grad(torch.stack([x.square().sum() for x in first]).sum(), wanted))
    for x, expected in zip(*found, strict=True):
        assert (x - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert expected.abs().max() > 0


def _most_bytes(T: int) -> int:
    """The most that forward and backward of a call hold at once beyond their inputs, by torch's own account."""
    case = make_case(B=1, T=T, H=1, K=16, V=16, norm_const=False, log_decay=-0.1, beta=True).to(torch.float32)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v, case.log_decay, case.beta) if x is not None]
    q, k, v, log_decay, strength = leaves
    options: dict[str, Any] = {"log_decay": log_decay, "beta": strength, "implementation": "chunk"}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        o, _ = cosine_attention(q, k, v, None, causal=True, **options)
        torch.autograd.grad(o.square().sum(), leaves)
    held = most = 0
    events: Any = profiler.profiler.kineto_results.events()  # pyright: ignore
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_forward_and_backward_need_memory_in_proportion_to_the_length() -> None:
    _most_bytes(128)  # what is set up once
    short, long = _most_bytes(512), _most_bytes(2048)
    assert 0 < long <= 4.2 * short
    # q, k, v, o, gradients of four, copies of them in chunks and the states between chunks, in float32
    assert long <= 2048 * 16 * 4 * 60
