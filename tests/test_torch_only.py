"""The operation where torch and jaxtyping, with what these two require, are all that is installed."""

from __future__ import annotations

from tests.subprocesses import modules_beside, run_python

ATTEND = """
import torch
from cottention import CosineState, cosine_attention, cosine_attention_step

torch.manual_seed(0)
q, k, v = (torch.randn(2, 70, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
norm_const = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
for causal in (True, False):
    results = []
    for implementation in ("naive", "chunk"):
        o, _ = cosine_attention(q, k, v, norm_const, causal=causal, implementation=implementation)
        results.append((o, *torch.autograd.grad(o.square().sum(), (q, k, v, norm_const))))
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
state = CosineState.zeros(2, 2, 8, 8, dtype=torch.float64)
o, state = cosine_attention_step(q[:, 0], k[:, 0], v[:, 0], norm_const, state)
assert state.seen.tolist() == [1, 1]
"""


def test_the_operation_runs_where_only_torch_and_jaxtyping_are_installed():
    ran = run_python(
        f"""
{ATTEND}
from importlib import import_module
for name in ("transformers", "datasets", "wrapt", "jsonargparse"):
    try:
        import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name + " was not hidden")
""",
        hidden=modules_beside("torch", "jaxtyping"),
    )
    assert "not registered" not in ran.stderr
