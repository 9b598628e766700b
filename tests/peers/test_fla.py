"""flash-linear-attention's reference of linear attention, with cosine attention's norm and divisor outside of it.

Its recurrence is plain PyTorch; from it come our outputs, final states and every gradient, the exponent's included.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention import CosineState, cosine_attention, cosine_attention_step

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:Triton is not supported:UserWarning")]

# Their reference computes in float32, whatever it is given.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
_H = 3


@pytest.fixture(scope="module")
def recurrence() -> Any:
    return pytest.importorskip("fla.ops.linear_attn.naive").naive_recurrent_linear_attn


def _reference(
    recurrence: Any, q: Tensor, k: Tensor, v: Tensor, m: Tensor, kv: Tensor, seen: int
) -> tuple[Tensor, Tensor]:
    """o and the final state of one text, of which `seen` tokens came before."""
    q, k = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (q, k))
    count = torch.arange(seen + 1, seen + 1 + q.shape[1])[None, :, None, None]
    v = v.float() / count ** torch.sigmoid(m)[:, None]
    return recurrence(q, k, v, scale=1.0, initial_state=kv, output_final_state=True)


def _inputs(B: int, T: int, K: int, V: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, the exponent and a state, all to be differentiated."""
    shapes = [(B, T, _H, K), (B, T, _H, K), (B, T, _H, V)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in (*tensors, torch.randn(_H), torch.randn(B, _H, K, V))]


def _assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        error = (one.float() - other.float()).abs().max() / other.float().abs().max()
        assert error < _TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", ["naive", "chunk", "native", "auto"])
@pytest.mark.parametrize(
    ("T", "K", "V", "dtype"),
    [
        (1, 64, 64, torch.float32),
        (63, 60, 60, torch.float32),
        (130, 64, 128, torch.float32),
        (257, 128, 64, torch.float32),
        (100, 64, 64, torch.float16),
        (100, 64, 64, torch.bfloat16),
    ],
)
def test_outputs_states_and_gradients(recurrence: Any, implementation: Any, T: int, K: int, V: int, dtype: torch.dtype):
    inputs = q, k, v, m, kv = _inputs(2, T, K, V, dtype)
    state = CosineState(kv, torch.full((2,), 5))
    o, final = cosine_attention(
        q, k, v, m, causal=True, initial_state=state, output_final_state=True, implementation=implementation
    )
    assert final is not None
    expected_o, expected_kv = _reference(recurrence, *inputs, seen=5)
    do, dkv = torch.randn_like(expected_o), torch.randn_like(expected_kv)
    found = torch.autograd.grad((o.float() * do).sum() + (final.kv * dkv).sum(), inputs)
    expected = torch.autograd.grad((expected_o * do).sum() + (expected_kv * dkv).sum(), inputs)
    _assert_same((o, final.kv, *found), (expected_o, expected_kv, *expected), dtype)


@pytest.mark.parametrize("implementation", ["naive", "chunk", "native"])
@pytest.mark.parametrize("lengths", [[15], [15, 85, 200], [1, 64, 2, 65]])
def test_packed_texts_with_a_state_each(recurrence: Any, implementation: Any, lengths: list[int]):
    N = len(lengths)
    inputs = q, k, v, m, _ = _inputs(1, sum(lengths), 64, 64, torch.float32)
    kv = torch.randn(N, _H, 64, 64, requires_grad=True)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    o, final = cosine_attention(
        q,
        k,
        v,
        m,
        causal=True,
        cu_seqlens=bounds.int(),
        initial_state=CosineState(kv, torch.arange(N)),
        output_final_state=True,
        implementation=implementation,
    )
    assert final is not None
    parts = [
        _reference(recurrence, q[:, text], k[:, text], v[:, text], m, kv[i : i + 1], seen=i)
        for i, text in enumerate(slice(a, b) for a, b in pairwise(bounds.tolist()))
    ]
    expected_o, expected_kv = (torch.cat(part, dim) for part, dim in zip(zip(*parts, strict=True), (1, 0), strict=True))
    leaves = [*inputs[:4], kv]
    found = torch.autograd.grad(o.square().sum() + final.kv.square().sum(), leaves)
    expected = torch.autograd.grad(expected_o.square().sum() + expected_kv.square().sum(), leaves)
    _assert_same((o, final.kv, *found), (expected_o, expected_kv, *expected), torch.float32)


def test_one_token_steps(recurrence: Any):
    q, k, v, m, kv = (x.detach() for x in _inputs(2, 20, 64, 64, torch.float32))
    state, outputs = CosineState(kv, torch.zeros(2, dtype=torch.int64)), []
    for t in range(20):
        o, state = cosine_attention_step(q[:, t], k[:, t], v[:, t], m, state)
        outputs.append(o)
    _assert_same((torch.stack(outputs, 1), state.kv), _reference(recurrence, q, k, v, m, kv, seen=0), torch.float32)
