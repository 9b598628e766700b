"""bfloat16 products in float32: bfloat16 comes out, forward and backward, and nothing else changes."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cottention.benchmarks.quality import cells, rounding, training
from cottention.benchmarks.quality.cells import PLUS, SOFTMAX_PLUS, Cell
from cottention.benchmarks.quality.rounding import Float32Products, products_in_float32
from cottention.benchmarks.quality.tasks import TaskFiles, make_task


def test_a_product_is_the_exact_one_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 9, generator=generator).bfloat16() for _ in range(2))
    with Float32Products():
        found = a @ b
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (a.double() @ b.double()).bfloat16(), rtol=0, atol=0)


def test_gradients_of_attention_are_bfloat16_and_close() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 17, 8, generator=generator).bfloat16().requires_grad_() for _ in range(3))
    whole = [each.detach().double().requires_grad_() for each in (q, k, v)]
    with Float32Products():
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        o.float().square().sum().backward()
    F.scaled_dot_product_attention(whole[0], whole[1], whole[2], is_causal=True).square().sum().backward()
    for short, exact in zip((q, k, v), whole, strict=True):
        assert short.grad is not None
        assert short.grad.dtype == torch.bfloat16
        assert exact.grad is not None
        # The output and its gradient are rounded too: some units of 2 ** -9 of the largest.
        torch.testing.assert_close(short.grad.double(), exact.grad, rtol=0, atol=2**-7 * exact.grad.abs().max().item())


def test_products_of_float32_are_left_alone() -> None:
    a = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    with Float32Products():
        assert torch.equal(a @ a.T, a.mm(a.T))
        assert (a @ a.T).dtype == torch.float32


def test_only_a_processor_without_the_instructions_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(products_in_float32("cuda"), nullcontext)
    for has_instructions, kind in ((True, nullcontext), (False, Float32Products)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda found=has_instructions: found)
        assert isinstance(products_in_float32("cpu"), kind)


@pytest.mark.parametrize("variant", [PLUS, SOFTMAX_PLUS])
def test_training_is_that_of_bfloat16_within_its_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    monkeypatch.setattr(training, "_step_bytes", lambda run: 1)
    plan = dataclasses.replace(cells.EXPERIMENTS["small-mqar"], steps=3, batch_size=2, precision="bfloat16")
    monkeypatch.setitem(cells.EXPERIMENTS, "small-mqar", plan)
    cell = Cell(experiment="small-mqar", variant=variant, seed=0)
    task = make_task(cell, TaskFiles(texts=tmp_path, work=tmp_path))
    curves = {}
    for name, context in (("torch", nullcontext), ("here", Float32Products)):
        monkeypatch.setattr(training, "products_in_float32", lambda device, context=context: context())
        curves[name] = [point[1] for point in training.train(cell, task, rate=1e-2).curve]
    assert curves["here"] == pytest.approx(curves["torch"], rel=2e-3)
    assert curves["here"][-1] < curves["here"][0]


def test_every_product_of_the_models_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []
    once = Float32Products.__torch_dispatch__

    def listen(self: Float32Products, func, types, args=(), kwargs=None):
        name = str(func)
        is_product = any(word in name for word in ("mm", "matmul", "conv", "attention"))
        if is_product and "cottention" not in name and func not in rounding._PRODUCTS:
            left.append(name)
        return once(self, func, types, args, kwargs)

    monkeypatch.setattr(Float32Products, "__torch_dispatch__", listen)
    monkeypatch.setattr(training, "products_in_float32", lambda device: Float32Products())
    monkeypatch.setattr(training, "_step_bytes", lambda run: 1)
    plan = dataclasses.replace(cells.EXPERIMENTS["small-mqar"], steps=1, batch_size=2, precision="bfloat16")
    monkeypatch.setitem(cells.EXPERIMENTS, "small-mqar", plan)
    for variant in (PLUS, SOFTMAX_PLUS, "cosine"):
        cell = Cell(experiment="small-mqar", variant=variant, seed=0)
        training.train(cell, make_task(cell, TaskFiles(texts=tmp_path, work=tmp_path)), rate=1e-2)
    assert not left
