"""Decay and erase against transformers' gated delta rule (Qwen3-Next, Qwen3.5), by other authors: values, gradients."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.ops import CosineState, cosine_attention
from tests.ops.helpers import make_case

_NAMES = ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]


class _InFloat64:
    """torch, but that its float32 is float64: theirs computes in float32 whatever it is given."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _theirs(family: str, name: str) -> Any:
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    function = inspect.unwrap(getattr(modeling, name))
    names = {**function.__globals__, "torch": _InFloat64()}
    return FunctionType(function.__code__, names, name, function.__defaults__, function.__closure__)


@pytest.mark.parametrize("implementation", ["naive", "chunk"])
@pytest.mark.parametrize("normalise", [False, True], ids=["given unit vectors", "normalised there"])
@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_values_and_gradients_are_theirs(family: str, name: str, normalise: bool, implementation: str) -> None:
    case = make_case(B=2, T=130, H=3, K=8, V=6, norm_const=False, with_state=True, log_decay=-1.5, beta=True)
    assert case.initial_state is not None
    assert case.log_decay is not None
    assert case.beta is not None
    # Theirs divides by sqrt(x . x + 1e-6): long vectors leave nothing of that.
    q, k = (1e4 * x for x in (case.q, case.k))
    given = (q, k, case.v, case.log_decay, case.beta, case.initial_state.kv)

    def ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        state = CosineState(kv, torch.zeros(2, dtype=torch.int64))
        options: dict[str, Any] = {"log_decay": log_decay, "beta": beta, "implementation": implementation}
        o, final = cosine_attention(q, k, v, None, causal=True, initial_state=state, output_final_state=True, **options)
        assert final is not None
        return o, final.kv

    def theirs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        if not normalise:
            q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
        options = {"initial_state": kv, "output_final_state": True, "use_qk_l2norm_in_kernel": normalise}
        o, final = _theirs(family, name)(q, k, v, log_decay, beta, **options)
        return o * q.shape[-1] ** 0.5, final  # theirs divides the scores by sqrt(K)

    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in given]
        o, kv = function(*leaves)
        gradients = torch.autograd.grad(o.square().sum() + kv.square().sum(), leaves)
        results.append([o, kv, *(x * (1e4 if i < 2 else 1) for i, x in enumerate(gradients))])
    for found, expected in zip(*results, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * max(1.0, scale))
