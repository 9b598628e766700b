"""Erase on a GPU by flash-linear-attention: what goes in and comes out, with functions of its signature on the CPU.

The stand-ins take what flash-linear-attention takes and nothing else: no masks, packed sequences by int64 boundaries,
one dtype for q, k and v, gates in float32. tests/peers runs its own reference in their place.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.ops import CosineState, choose_implementation, cosine_attention, cosine_attention_step
from cottention.ops.triton import erase
from tests.ops.helpers import Case, assert_same, make_case, run


def _recurrence(tokens: list[Tensor], kv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = tokens
    outputs = []
    for t in range(q.shape[1]):
        kv = g[:, t, :, None, None].exp() * kv
        erased = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], kv)
        kv = kv + torch.einsum("bhk,bhv->bhkv", beta[:, t, :, None] * k[:, t], erased)
        outputs.append(torch.einsum("bhk,bhkv->bhv", scale * q[:, t], kv))
    return torch.stack(outputs, 1), kv


def chunk_stand_in(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """chunk_gated_delta_rule, as far as it is used: float32 inside, in q's dtype out, the state in float32."""
    assert scale is not None
    assert not use_qk_l2norm_in_kernel
    assert q.dtype == k.dtype == v.dtype
    assert g.dtype == beta.dtype == torch.float32
    N = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    kv = q.new_zeros(N, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    if initial_state is not None:
        assert initial_state.shape == kv.shape
        kv = initial_state.float()
    tokens = [x.float() for x in (q, k, v, g, beta)]
    if cu_seqlens is None:
        o, kv = _recurrence(tokens, kv, scale)
    else:
        assert cu_seqlens.dtype == torch.int64
        assert q.shape[0] == 1
        parts, states = [], []
        for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            if start == end:
                states.append(kv[i : i + 1])
                continue
            part, state = _recurrence([x[:, start:end] for x in tokens], kv[i : i + 1], scale)
            parts.append(part)
            states.append(state)
        o, kv = torch.cat(parts, 1), torch.cat(states)
    return o.to(q.dtype), kv if output_final_state else None


def recurrent_stand_in(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """fused_recurrent_gated_delta_rule: the same, without a backward."""
    with torch.no_grad():
        return chunk_stand_in(*args, **kwargs)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stand-ins in place of flash-linear-attention, on the CPU; which of the two was called."""
    called: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def rule(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        return rule

    rules = counted("chunk", chunk_stand_in), counted("recurrent", recurrent_stand_in)
    monkeypatch.setattr(erase, "_rules", lambda: rules)
    monkeypatch.setattr("cottention.ops.why_not_erase", lambda device, dtype, K: None)
    return called


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no divisor, no decay": {"norm_const": False, "log_decay": None},
    "left padding": {"mask": "left"},
    "holes, states": {"mask": "holes", "with_state": True, "output_final_state": True},
    "an empty row": {"mask": "empty_row", "output_final_state": True},
    "packed": {"lengths": [5, 1, 0, 40], "with_state": True, "output_final_state": True},
    "one token": {"T": 1, "with_state": True},
    "no token": {"T": 0, "with_state": True, "output_final_state": True},
    "strong decay": {"log_decay": -50.0, "with_state": True},
}


def gated_case(name: str) -> Case:
    """One of the cases, with beta."""
    return make_case(**{"log_decay": -1.5, "beta": True, "T": 40, **CASES[name]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_values_states_and_gradients_are_those_of_the_equations(
    name: str, dtype: torch.dtype, calls: list[str]
) -> None:
    case = gated_case(name)
    case = replace(case.to(dtype), beta=None if case.beta is None else case.beta.float())
    found = run(case, "triton")
    assert calls == ([] if case.q.shape[1] == 0 else ["chunk"])
    assert_same(found, run(gated_case(name), "naive"), dtype)


def test_what_is_at_padding_reaches_nothing(calls: list[str]) -> None:
    case = gated_case("holes, states").to(torch.float32)
    assert case.attention_mask is not None
    padded = ~case.attention_mask
    spoilt = replace(
        case,
        **{name: getattr(case, name).masked_fill(padded[..., None, None], torch.nan) for name in ("q", "k", "v")},
        log_decay=None if case.log_decay is None else case.log_decay.masked_fill(padded[..., None], torch.nan),
        beta=None if case.beta is None else case.beta.masked_fill(padded[..., None], torch.nan),
    )
    found, expected = run(spoilt, "triton"), run(case, "triton")
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


def test_without_a_gradient_short_texts_go_token_by_token(calls: list[str]) -> None:
    for T, name in ((64, "recurrent"), (65, "chunk")):
        case = make_case(T=T, log_decay=-1.5, beta=True).to(torch.float32)
        options: dict[str, Any] = {"log_decay": case.log_decay, "beta": case.beta, "causal": True}
        o, _ = cosine_attention(case.q, case.k, case.v, case.norm_const, implementation="triton", **options)
        expected, _ = cosine_attention(case.q, case.k, case.v, case.norm_const, implementation="naive", **options)
        assert calls.pop() == name
        torch.testing.assert_close(o, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dims", [3, 4])
def test_the_step_is_a_text_of_one_token(dims: int, calls: list[str]) -> None:
    case = make_case(T=1, log_decay=-1.5, beta=True, with_state=True).to(torch.float32)
    q, k, v, log_decay, beta = (
        x if dims == 4 else x[:, 0] for x in (case.q, case.k, case.v, case.log_decay, case.beta) if x is not None
    )
    real = torch.tensor([1, 0])
    expected, after = cosine_attention_step(
        q, k, v, case.norm_const, case.initial_state, attention_mask=real, log_decay=log_decay, beta=beta
    )
    o, new = erase.step_erasing(q, k, v, case.norm_const, case.initial_state, real, log_decay, beta)
    assert calls == ["recurrent"]
    torch.testing.assert_close((o, *new), (expected, *after), rtol=0, atol=1e-6)


def test_second_derivatives_and_a_second_backward(calls: list[str]) -> None:
    case = make_case(B=1, T=6, H=1, K=3, V=2, log_decay=-1.5, beta=True).to(torch.float32)
    results: dict[str, list[Tensor]] = {}
    for name in ("triton", "naive"):
        leaves = [
            x.clone().requires_grad_() for x in (case.q, case.k, case.v, case.log_decay, case.beta) if x is not None
        ]
        q, k, v, log_decay, beta = leaves
        options: dict[str, Any] = {"log_decay": log_decay, "beta": beta, "causal": True, "implementation": name}
        o, _ = cosine_attention(q, k, v, case.norm_const, **options)
        first = torch.autograd.grad(o.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad([x.square().sum() for x in first], leaves, retain_graph=True)
        again = torch.autograd.grad(o.square().sum(), leaves)
        results[name] = [*second, *again]
    for found, expected in zip(*results.values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_forward_mode_is_not_zero(calls: list[str]) -> None:
    case = make_case(B=1, T=6, log_decay=-1.5, beta=True).to(torch.float32)

    def attend(v: Tensor, implementation: str) -> Tensor:
        options: dict[str, Any] = {"log_decay": case.log_decay, "beta": case.beta, "causal": True}
        return cosine_attention(case.q, case.k, v, case.norm_const, implementation=implementation, **options)[0]

    tangents = [
        torch.func.jvp(lambda v, name=name: attend(v, name), (case.v,), (torch.ones_like(case.v),))[1]
        for name in ("triton", "naive")
    ]
    torch.testing.assert_close(*tangents, rtol=0, atol=1e-5)


def test_where_it_cannot_run_the_line_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(log_decay=-1.0, beta=True).to(torch.float32)
    options: dict[str, Any] = {"log_decay": case.log_decay, "beta": case.beta, "causal": True}
    with pytest.raises(
        ValueError, match=r'"triton" cannot run here: with beta it needs tensors on a CUDA or HIP device'
    ):
        cosine_attention(case.q, case.k, case.v, None, implementation="triton", **options)
    cuda = torch.device("cuda")
    monkeypatch.setattr(erase, "_rules", lambda: "it needs flash-linear-attention: pip install 'cottention[gpu]'")
    for dtype, K, told in (
        (torch.bfloat16, 64, "pip install 'cottention[gpu]'"),
        (torch.float64, 64, "takes no float64"),
        (torch.bfloat16, 257, "takes K up to 256, not 257"),
        (torch.float32, 64, "set_float32_matmul_precision('high')"),
    ):
        assert told in (erase.why_not(cuda, dtype, K) or ""), told
    monkeypatch.setattr(erase, "_rules", lambda: (chunk_stand_in, recurrent_stand_in))
    assert erase.why_not(cuda, torch.bfloat16, 256) is None
    monkeypatch.setattr(erase, "arithmetic", lambda dtype: "tf32")
    assert erase.why_not(cuda, torch.float32, 64) is None


def test_auto_on_a_gpu_takes_it_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, device, dtype, shape = True, torch.device("cuda"), torch.bfloat16, (1, 8, 2, 64)

    x: Any = OnGpu()
    for reason, name in ((None, "triton"), ("it needs flash-linear-attention", "chunk")):
        monkeypatch.setattr("cottention.ops.why_not_erase", lambda *_, reason=reason: reason)
        assert choose_implementation("auto", x, x, is_gated=True, erases=True) == name
    cpu = torch.empty(1, 8, 2, 64)
    assert choose_implementation("auto", cpu, cpu, is_gated=True, erases=True) != "triton"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_on_a_device_with_flash_linear_attention_itself(name: str) -> None:
    pytest.importorskip("fla")
    case = make_case(**{"log_decay": -1.5, "beta": True, "T": 200, "K": 64, "V": 64, **CASES[name]})
    tensors = ("q", "k", "v", "norm_const", "attention_mask", "cu_seqlens", "log_decay", "beta")
    moved = {name: None if getattr(case, name) is None else getattr(case, name).cuda() for name in tensors}
    state = case.initial_state
    moved["initial_state"] = None if state is None else CosineState(*(x.cuda() for x in state))
    found = run(replace(case, **moved).to(torch.bfloat16), "triton")
    assert_same({name: x.cpu() for name, x in found.items()}, run(case, "naive"), torch.bfloat16)


def test_a_backward_that_keeps_no_graph_frees_theirs(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Tensor]] = []

    def rule(q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        factor = torch.full_like(q, 2.0)  # saved by the product, for the gradient of q
        kept.append(weakref.ref(factor))
        return chunk_stand_in(q * factor, *args, **kwargs)

    monkeypatch.setattr(erase, "_rules", lambda: (rule, recurrent_stand_in))
    case = gated_case("plain").to(torch.float32)
    q = case.q.requires_grad_()
    o, _ = cosine_attention(
        q, case.k, case.v, None, causal=True, log_decay=case.log_decay, beta=case.beta, implementation="triton"
    )
    loss = o.square().sum()
    first = torch.autograd.grad(loss, q, retain_graph=True)[0]
    assert kept[-1]() is not None
    second = torch.autograd.grad(loss, q)[0]
    assert torch.equal(first, second)
    assert kept[-1]() is None
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, q)
