"""flash-linear-attention's reference of the gated delta rule: our decay and erase give its values and gradients.

And its two references in place of its kernels, which need a GPU: what we hand to them there gives our numbers.
"""

from __future__ import annotations

from itertools import pairwise
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention import CosineState, cosine_attention
from cottention.ops.triton.erase import attend_erasing

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:Triton is not supported:UserWarning")]

_H = 3


class _InFloat64:
    """torch, but that its float32 is float64: their references compute in float32 whatever they are given."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(scope="module")
def references() -> Any:
    return pytest.importorskip("fla.ops.gated_delta_rule.naive")


def _recurrence(references: Any, *, in_float64: bool = False) -> Any:
    function = references.naive_recurrent_gated_delta_rule
    if not in_float64:
        return function
    names = {**function.__globals__, "torch": _InFloat64()}
    return FunctionType(function.__code__, names, "recurrence", function.__defaults__, function.__closure__)


def _inputs(T: int, K: int, V: int, N: int = 2, B: int = 2) -> list[Tensor]:
    """q, k, v, log_decay, beta and a state, in float64, all to be differentiated."""
    generator = torch.Generator().manual_seed(T)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [randn(B, T, _H, K), randn(B, T, _H, K), randn(B, T, _H, V)]
    tensors += [-randn(B, T, _H).exp(), randn(B, T, _H).sigmoid(), randn(N, _H, K, V)]
    return [x.requires_grad_() for x in tensors]


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def _results(o: Tensor, kv: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [o, kv, *torch.autograd.grad(o.square().sum() + kv.square().sum(), leaves)]


def _assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other.double()).abs().max() <= tolerance * max(1.0, other.abs().max().item())


def _theirs(rule: Any, leaves: list[Tensor]) -> list[Tensor]:
    q, k, v, log_decay, beta, kv = leaves
    options = {"scale": 1.0, "initial_state": kv, "output_final_state": True}
    o, final = rule(q=_unit(q), k=_unit(k), v=v, beta=beta, g=log_decay, **options)
    return _results(o, final, leaves)


def _ours(leaves: list[Tensor], implementation: str) -> list[Tensor]:
    q, k, v, log_decay, beta, kv = leaves
    state = CosineState(kv, torch.zeros(len(kv), dtype=torch.int64))
    options: dict[str, Any] = {"log_decay": log_decay, "beta": beta, "implementation": implementation}
    o, final = cosine_attention(q, k, v, None, causal=True, initial_state=state, output_final_state=True, **options)
    assert final is not None
    return _results(o, final.kv, leaves)


@pytest.mark.parametrize("implementation", ["naive", "chunk"])
@pytest.mark.parametrize(("T", "K", "V"), [(1, 8, 8), (63, 8, 6), (130, 16, 32)])
def test_values_and_gradients_in_float64(references: Any, implementation: str, T: int, K: int, V: int) -> None:
    leaves = _inputs(T, K, V)
    expected = _theirs(_recurrence(references, in_float64=True), leaves)
    _assert_same(_ours(leaves, implementation), expected, 1e-10)


@pytest.mark.parametrize(("T", "K", "V"), [(65, 64, 64), (130, 64, 128)])
def test_the_chosen_implementation_in_float32(references: Any, T: int, K: int, V: int) -> None:
    leaves = _inputs(T, K, V)
    expected = _theirs(_recurrence(references, in_float64=True), leaves)
    _assert_same(_ours([x.detach().float().requires_grad_() for x in leaves], "auto"), expected, 1e-5)


@pytest.mark.parametrize("lengths", [None, [15, 85, 30]])
@pytest.mark.parametrize("which", ["naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"])
def test_their_references_in_place_of_their_kernels(references: Any, which: str, lengths: list[int] | None) -> None:
    rule = getattr(references, which)

    def packed(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
        """Their references know no packed sequences."""
        options = {"scale": scale, "output_final_state": output_final_state}
        if cu_seqlens is None:
            return rule(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, **options)
        texts = [
            rule(**{name: x[:, a:b] for name, x in tokens.items()}, initial_state=initial_state[i : i + 1], **options)
            for tokens in [{"q": q, "k": k, "v": v, "g": g, "beta": beta}]
            for i, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))
        ]
        return torch.cat([o for o, _ in texts], 1), torch.cat([kv for _, kv in texts])

    N = 2 if lengths is None else len(lengths)
    leaves = [x.detach().float().requires_grad_() for x in _inputs(130, 16, 8, N, B=2 if lengths is None else 1)]
    q, k, v, log_decay, beta, kv = leaves
    m = torch.randn(_H, requires_grad=True)
    call: dict[str, Any] = {"causal": True, "log_decay": log_decay, "beta": beta, "output_final_state": True}
    call["initial_state"] = CosineState(kv, torch.arange(N))
    if lengths is None:
        call["attention_mask"] = torch.arange(130) >= torch.tensor([[0], [40]])
    else:
        call["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int()
    results: list[list[Tensor]] = []
    for o, final in (
        attend_erasing(q, k, v, m, rules=(packed, packed), **call),
        cosine_attention(q, k, v, m, implementation="naive", **call),
    ):
        assert final is not None
        results.append(_results(o, final.kv, [*leaves, m]))
    _assert_same(results[0], results[1], 1e-4)  # theirs in float32, whatever it is given
