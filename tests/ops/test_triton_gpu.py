"""The Triton kernels on a device: the fuzz of the other implementations, and what the interpreter cannot show.

make test-gpu         make sanitize-gpu
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.ops import CosineState, cosine_attention, cosine_attention_step
from cottention.ops.triton.config import override
from tests.ops.helpers import Case, assert_same, make_case, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device"),
]
_NUM_FUZZED = 60


def _on_gpu(case: Case) -> Case:
    state = case.initial_state
    names = ("q", "k", "v", "norm_const", "attention_mask", "cu_seqlens", "log_decay")
    tensors = {name: getattr(case, name) for name in names}
    moved: dict[str, Any] = {name: None if x is None else x.cuda() for name, x in tensors.items()}
    return replace(case, **moved, initial_state=None if state is None else CosineState(*(x.cuda() for x in state)))


def _check(case: Case, dtype: torch.dtype, segment: int | None) -> None:
    with override(segment_tokens=segment):
        found = run(_on_gpu(case.to(dtype)), "triton")
    assert_same({name: x.cpu() for name, x in found.items()}, run(case, "naive"), dtype)


def _random_case(choose: random.Random) -> Case:
    causal = choose.random() < 0.6
    sizes: dict[str, Any] = {
        "B": choose.randint(1, 3),
        "H": choose.randint(1, 4),
        "T": choose.choice([1, 2, 17, 63, 64, 65, 127, 129, 300, 513, 1000]),
        "K": choose.choice([16, 32, 48, 64, 80, 128, 160, 256]),
        "V": choose.choice([16, 24, 64, 96, 128, 256]),
        "causal": causal,
        "norm_const": choose.random() < 0.9,
        "seed": choose.randint(0, 1 << 30),
    }
    shape = choose.choice(["plain", "mask", "packed", "cross"])
    if shape == "mask":
        sizes["mask"] = choose.choice(["right", "left", "holes", "empty_row"])
    elif shape == "packed":
        sizes["lengths"] = [choose.choice([0, 1, 5, 64, 65, 200]) for _ in range(choose.randint(1, 6))]
    elif shape == "cross" and not causal:
        sizes["S"] = choose.choice([1, 40, 333])
    if "S" not in sizes:
        sizes["log_decay"] = choose.choice([None, -0.02, -1.0, -50.0])
    if causal and choose.random() < 0.5:
        sizes |= {"with_state": choose.random() < 0.5, "output_final_state": choose.random() < 0.5}
    return make_case(**sizes)


@pytest.mark.parametrize("seed", range(_NUM_FUZZED))
def test_fuzz_matches_naive(seed: int) -> None:
    choose = random.Random(seed)
    case = _random_case(choose)
    has_states = case.initial_state is not None or case.output_final_state
    segments: list[int | None] = [None, 128, 256, 1024, *([] if has_states else [0])]
    _check(case, choose.choice([torch.float32, torch.bfloat16, torch.float16]), choose.choice(segments))


@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_float32_is_as_exact_as_its_precision_says(precision: str) -> None:
    case = make_case(T=600, K=64, V=64, mask="holes")
    with override(precision=precision):
        found = run(_on_gpu(case.to(torch.float32)), "triton")
    dtype = torch.float16 if precision == "tf32" else torch.float32  # TF32 has float16's ten bits
    assert_same({name: x.cpu() for name, x in found.items()}, run(case, "naive"), dtype)


def test_sums_in_float16_do_not_overflow() -> None:
    """States of a long sequence of large values pass float16's largest number, 65504; the output does not."""
    q, k, v = (torch.ones(1, 4096, 2, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    o, state = cosine_attention(
        q, k, 64 * v, torch.full((2,), -20.0, device="cuda"), causal=True, output_final_state=True
    )
    assert state is not None
    assert state.kv.max() > 30_000
    assert torch.isfinite(state.kv).all()


def test_auto_is_triton_and_compiles_without_a_graph_break() -> None:
    case = _on_gpu(make_case(T=300, K=64, V=64).to(torch.float32))

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        return cosine_attention(q, k, v, m, causal=True)[0]

    compiled = torch.compile(attend, fullgraph=True)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    results = []
    for function in (attend, compiled):
        o = function(q, k, v, case.norm_const)
        results.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v))])
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager)


def test_step_in_a_cuda_graph_equals_the_plain_step() -> None:
    from cottention.ops.triton.step import step_in_place

    case = _on_gpu(make_case(B=4, T=6, H=3, K=64, V=64).to(torch.float32))
    q, k, v = (x[:, 0].clone() for x in (case.q, case.k, case.v))
    state = CosineState.zeros(4, 3, 64, 64, device="cuda")
    step_in_place(q, k, v, case.norm_const, state)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step_in_place(q, k, v, case.norm_const, state)
    for part in state:
        part.zero_()
    expected: CosineState | None = None
    for t in range(6):
        for x, tokens in ((q, case.q), (k, case.k), (v, case.v)):
            x.copy_(tokens[:, t])
        graph.replay()
        norm_const = None if case.norm_const is None else case.norm_const.cpu()
        truth, expected = cosine_attention_step(q.cpu(), k.cpu(), v.cpu(), norm_const, expected)
        torch.testing.assert_close(o.cpu(), truth, rtol=1e-4, atol=1e-4)
    assert expected is not None
    assert torch.equal(state.seen.cpu(), expected.seen)


@pytest.mark.parametrize("causal", [True, False])
def test_forward_takes_no_more_than_inputs_output_and_a_little(causal: bool) -> None:
    q, k, v = (torch.randn(1, 65536, 16, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    m = torch.zeros(16, device="cuda")
    cosine_attention(q, k, v, m, causal=causal)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, _ = cosine_attention(q, k, v, m, causal=causal)
    extra = torch.cuda.max_memory_allocated() - before - o.nbytes
    assert extra <= 0.15 * (q.nbytes + k.nbytes + v.nbytes + o.nbytes)
