"""The Triton implementation inside PyTorch, and its one-token step, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cottention.ops import CosineState, cosine_attention, cosine_attention_step
from cottention.ops.triton.config import override
from cottention.ops.triton.step import step, step_in_place
from tests.ops.helpers import Case, make_case

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted


def _case(**changes: Any) -> Case:
    sizes: dict[str, Any] = {"B": 1, "H": 1, "T": 40, "K": 16, "V": 16}
    return make_case(**(sizes | changes)).to(torch.float32)


def _inputs(case: Case) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.norm_const) if x is not None]


@pytest.mark.parametrize("segment", [0, -1, 16], ids=["short", "whole", "segments"])
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.slow
def test_causal_operator_passes_opcheck(packed: bool, segment: int) -> None:
    has_states = segment != 0
    case = _case(T=20, lengths=[9, 0, 11] if packed else None, with_state=has_states, mask=None if packed else "holes")
    state = case.initial_state or (None, None)
    arguments = ("triton", *_inputs(case), case.attention_mask, case.cu_seqlens, *state, has_states, 16, segment)
    torch.library.opcheck(torch.ops.cottention.causal.default, arguments, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("segment", [pytest.param(0, marks=pytest.mark.slow), 16], ids=["short", "segments"])
def test_bidirectional_operator_passes_opcheck(segment: int) -> None:
    case = _case(T=20, causal=False, mask="holes")
    arguments = ("triton", *_inputs(case), case.attention_mask, None, 16, segment)
    torch.library.opcheck(torch.ops.cottention.bidirectional.default, arguments, atol=1e-4, rtol=1e-4)


def test_steps_pass_opcheck() -> None:
    case = _case(B=2, T=1, with_state=True)
    assert case.initial_state is not None
    q, k, v = (x[:, 0] for x in (case.q, case.k, case.v))
    arguments = ("triton", q, k, v, case.norm_const, torch.tensor([True, False]), *case.initial_state)
    for operator in (torch.ops.cottention.step.default, torch.ops.cottention.step_.default):
        torch.library.opcheck(operator, arguments, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_without_a_graph_break(dynamic: bool) -> None:
    cu_seqlens = torch.tensor([0, 10, 10, 40], dtype=torch.int32)

    def attend(implementation: str, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        o, state = cosine_attention(q, k, v, m, causal=True, output_final_state=True, implementation=implementation)
        both, _ = cosine_attention(q, k, v, m, causal=False, implementation=implementation)
        packed, _ = cosine_attention(q, k, v, m, causal=True, cu_seqlens=cu_seqlens, implementation=implementation)
        assert state is not None
        return o, both, packed, state.kv

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function, implementation in ((attend, "naive"), (compiled, "triton")):
        inputs = _inputs(_case())
        outputs = function(implementation, *inputs)
        loss = torch.stack([x.square().sum() for x in outputs]).sum()
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_transforms_and_second_derivatives_are_those_of_naive(causal: bool) -> None:
    case = _case(B=2, T=20, mask="holes", causal=causal)
    results = []
    for implementation in ("naive", "triton"):

        def loss(q: Tensor) -> Tensor:
            options: dict[str, Any] = {"causal": causal, "attention_mask": case.attention_mask}
            o, _ = cosine_attention(q, case.k, case.v, case.norm_const, implementation=implementation, **options)  # noqa: B023
            return o.square().sum()

        def step(q: Tensor) -> Tensor:
            o, _ = cosine_attention_step(q[:, 0], case.k[:, 0], case.v[:, 0], case.norm_const, None)
            return o.square().sum()

        hvp = torch.autograd.functional.hvp(loss, case.q, case.k)[1]
        tangent = torch.func.jvp(loss, (case.q,), (case.k,))[1]
        mapped = torch.vmap(torch.func.grad(loss))(torch.stack([case.q, case.k]))
        assert torch.func.jvp(step, (case.q,), (case.k,))[1] != 0
        results.append([hvp, tangent, mapped])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_autocast_gives_its_dtype_and_keeps_states_in_float32() -> None:
    inputs = _inputs(_case())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = cosine_attention(*inputs, causal=True, output_final_state=True, implementation="triton")
    assert state is not None
    assert o.dtype == torch.bfloat16
    assert state.kv.dtype == torch.float32
    gradients = torch.autograd.grad(o.float().sum(), inputs)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


def test_activation_checkpointing_gives_the_same_gradients_and_calls_are_deterministic() -> None:
    case = _case(T=70, mask="holes")
    gradients = []
    for recompute in (False, True):
        q, k, v, m = _inputs(case)

        def attend(q: Tensor) -> Tensor:
            return cosine_attention(q, k, v, m, causal=True, implementation="triton")[0]  # noqa: B023

        with override(segment_tokens=32):
            o = checkpoint(attend, q, use_reentrant=False) if recompute else attend(q)
            gradients.append(torch.autograd.grad(o.square().sum(), (q, k, v, m)))
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


def test_a_dtype_that_it_does_not_take_is_a_type_error() -> None:
    q = torch.zeros(1, 4, 1, 16, dtype=torch.float64)
    with pytest.raises(TypeError, match="takes float32, bfloat16 and float16, not float64"):
        cosine_attention(q, q, q, None, causal=True, implementation="triton")


def test_override_takes_what_exists_alone() -> None:
    with pytest.raises(ValueError, match=r"override takes fields of Config, .*; got \{'warps'\}"), override(warps=8):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("K", "V"), [(16, 16), (40, 70)])
def test_step_matches_the_plain_one(K: int, V: int, dtype: torch.dtype) -> None:
    case = make_case(B=3, T=1, H=2, K=K, V=V, with_state=True).to(dtype)
    q, k, v = (x[:, 0] for x in (case.q, case.k, case.v))
    state = case.initial_state
    assert state is not None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for norm_const in (case.norm_const, None):
        for real in (None, torch.tensor([True, False, True])):
            expected, after = cosine_attention_step(q, k, v, norm_const, state, attention_mask=real)
            before = [x.clone() for x in state]
            o, new = step(q, k, v, norm_const, state, real)
            assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
            torch.testing.assert_close(o, expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(new.kv, after.kv, rtol=1e-5, atol=1e-5)
            assert torch.equal(new.seen, after.seen)
            own = CosineState(*(x.clone() for x in state))
            torch.testing.assert_close(step_in_place(q, k, v, norm_const, own, real), o, rtol=0, atol=0)
            assert torch.equal(own.kv, new.kv)
            assert torch.equal(own.seen, new.seen)


def test_steps_continue_a_prefill_with_any_strides() -> None:
    case = _case(B=2, T=6, mask="left", output_final_state=True)
    whole, last = cosine_attention(
        case.q,
        case.k,
        case.v,
        case.norm_const,
        causal=True,
        attention_mask=case.attention_mask,
        output_final_state=True,
    )
    state = None
    for t in range(6):
        q, k, v = (x.transpose(1, 2).contiguous()[:, :, t] for x in (case.q, case.k, case.v))
        assert case.attention_mask is not None
        o, state = step(q, k, v, case.norm_const, state, case.attention_mask[:, t])
        torch.testing.assert_close(o, whole[:, t], rtol=1e-5, atol=1e-5)
    assert state is not None
    assert last is not None
    torch.testing.assert_close(state.kv, last.kv, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.seen, last.seen)
