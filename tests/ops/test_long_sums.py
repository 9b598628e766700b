"""Sums over many tokens keep their last bits: within 1e-6 of float64, forward and backward, over a million tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from cottention.ops import CosineState, cosine_attention
from cottention.ops.native import binding
from tests.ops.helpers import make_case

# Rounding of float32 (6e-8) times what a product over a head's 16 numbers and the sums within a chunk add to it; where
# all tokens are the same, the 32 products of a chunk round the same way.
_LIMIT, _LIMIT_OF_SAME_TOKENS = 1e-6, 2e-6
_SETS = binding.instruction_sets() if binding.is_available() else []
_FORMS = ["causal", "continued", "bidirectional"]


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    before = binding.instruction_set()
    binding.use_instruction_set(request.param)
    yield
    binding.use_instruction_set(before)


_every_set = pytest.mark.parametrize("instruction_set", _SETS, indirect=True)


@cache
def _inputs(form: str, T: int, same_tokens: bool) -> dict[str, Tensor]:
    """q, k, v, norm_const, and for `continued` kv, in float64; the gradients that flow back are called grad, grad_kv.

    `same_tokens` repeats one token: then rounding errs in one direction, and a plain sum goes wrong in a few thousand.
    """
    case = make_case(B=1, T=1 if same_tokens else T, H=2 if same_tokens else 1, K=16, V=16, with_state=True)
    assert case.initial_state is not None
    assert case.norm_const is not None
    generator = torch.Generator().manual_seed(1)
    given = {"q": case.q, "k": case.k, "v": case.v}
    given["grad"] = torch.randn(case.v.shape, generator=generator).double()
    if same_tokens:  # at about 45 degrees to what they meet: no result is the small difference of large numbers
        given["q"], given["grad"] = case.q + case.k, given["grad"] + case.v
        given = {name: x.expand(-1, T, -1, -1) for name, x in given.items()}
    given["norm_const"] = case.norm_const
    if form == "continued":
        size = 2.0**10 if same_tokens else 1.0
        given["kv"] = size * case.initial_state.kv
        given["grad_kv"] = size * torch.randn(given["kv"].shape, generator=generator).double()
    return given


def _results(form: str, T: int, same_tokens: bool, dtype: torch.dtype, implementation: str) -> dict[str, Tensor]:
    """Output, state and all gradients."""
    given = {name: x.to(dtype) for name, x in _inputs(form, T, same_tokens).items()}
    leaves = {name: x.requires_grad_() for name, x in given.items() if not name.startswith("grad")}
    kv = leaves.get("kv")
    state = None if kv is None else CosineState(kv, torch.zeros(1, dtype=torch.int64))
    o, final = cosine_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        leaves["norm_const"],
        causal=form != "bidirectional",
        initial_state=state,
        output_final_state=state is not None,
        implementation=implementation,
    )
    outputs, gradients = {"o": o}, [given["grad"]]
    if final is not None:
        outputs["final_kv"] = final.kv
        gradients.append(given["grad_kv"])
    found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), gradients)
    outputs |= {f"d{name}": x for name, x in zip(leaves, found, strict=True)}
    return {name: x.detach().double() for name, x in outputs.items()}


@cache
def _truth(form: str, T: int, same_tokens: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
    """float64 results, and the size that errors are measured at: the largest entry, of dm the sum of its terms."""
    results = _results(form, T, same_tokens, torch.float64, "chunk")
    sizes = {name: x.abs().max().item() for name, x in results.items()}
    v = _inputs(form, T, same_tokens)["v"]
    count = torch.arange(1, T + 1) if form != "bidirectional" else torch.full((T,), T)
    terms = count.log()[:, None] * (v * results["dv"]).sum(-1)[0].abs()  # [T, H]
    sizes["dnorm_const"] = terms.sum(0).max().item()
    return results, sizes


def _check(form: str, T: int, *, same_tokens: bool, implementation: str, num_threads: int = 1) -> None:
    torch.set_num_threads(num_threads)
    try:
        results = _results(form, T, same_tokens, torch.float32, implementation)
    finally:
        torch.set_num_threads(1)
    truth, sizes = _truth(form, T, same_tokens)
    for name, expected in truth.items():
        error = (results[name] - expected).abs().max().item() / sizes[name]
        assert error <= (_LIMIT_OF_SAME_TOKENS if same_tokens else _LIMIT), (
            f"{name} is off by {error:.1e} of the largest"
        )


@_every_set
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("form", _FORMS)
def test_native_loses_nothing_of_tokens_that_are_all_the_same(
    form: str, num_threads: int, instruction_set: None
) -> None:
    _check(form, 6000, same_tokens=True, implementation="native", num_threads=num_threads)


@pytest.mark.parametrize("form", _FORMS)
def test_chunk_loses_nothing_of_tokens_that_are_all_the_same(form: str) -> None:
    _check(form, 6000, same_tokens=True, implementation="chunk")


@_every_set
def test_a_bfloat16_call_adds_to_a_large_state_without_loss(instruction_set: None) -> None:
    """With one key dim k_hat is 1, so that nothing but the sum is rounded."""
    T, start, value = 4096, 2.0**16, 2.0**-8  # a plain sum leaves such a state as it is
    q, v = torch.ones(1, T, 1, 1).bfloat16(), torch.full((1, T, 1, 1), value).bfloat16()
    state = CosineState(torch.full((1, 1, 1, 1), start), torch.zeros(1, dtype=torch.int64))
    options = {"initial_state": state, "output_final_state": True, "implementation": "native"}
    _, final = cosine_attention(q, q, v, None, causal=True, **options)
    assert final is not None
    assert final.kv.item() == pytest.approx(start + T * value, rel=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("form", _FORMS)
def test_chunk_keeps_its_digits_over_a_million_tokens(form: str) -> None:
    _check(form, 1_000_000, same_tokens=False, implementation="chunk")


@pytest.mark.slow
@_every_set
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("form", _FORMS)
def test_native_keeps_its_digits_over_a_million_tokens(form: str, num_threads: int, instruction_set: None) -> None:
    _check(form, 1_000_000, same_tokens=False, implementation="native", num_threads=num_threads)
