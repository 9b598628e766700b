"""AdamW as the paper has it, and the schedule."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from cottention.training.optimizer import build_optimizer, build_scheduler, linear_schedule
from cottention.training.pretraining import build_model
from cottention.training.recipe_sections import OptimizerSettings
from tests.training.helpers import tiny_recipe


@pytest.mark.parametrize("arch", ["gpt", "bert"])
def test_every_parameter_decays_alike(arch: str, corpus: Path) -> None:
    model = build_model(tiny_recipe(arch, corpus))
    optimizer = build_optimizer(model, OptimizerSettings())
    assert len(optimizer.param_groups) == 1
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-4, (0.9, 0.999), 1e-7, 0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying = {names[id(parameter)] for parameter in group["params"]}
    assert decaying == set(names.values())
    layer_norm = "ln_1.weight" if arch == "gpt" else "LayerNorm.weight"
    for kind in ("norm_const", "bias", layer_norm):
        assert any(name.endswith(kind) for name in decaying), kind
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 1e-4 * 0.01), rtol=1e-7, atol=0, msg=name)


def test_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [p.shape for p in build_optimizer(model, OptimizerSettings()).param_groups[0]["params"]] == [(2, 2)]


def test_an_update_is_adams_by_hand() -> None:
    settings = OptimizerSettings(learning_rate=0.1, betas=(0.8, 0.9), eps=0.01, weight_decay=0.5)
    parameter = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    module = torch.nn.ParameterList([parameter])
    optimizer = build_optimizer(module, settings)
    weight, first, second = 2.0, 0.0, 0.0
    for update, gradient in enumerate([0.3, -0.2, 0.0], start=1):
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        weight *= 1 - 0.1 * 0.5
        weight -= 0.1 * (first / (1 - 0.8**update)) / (math.sqrt(second / (1 - 0.9**update)) + 0.01)
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert parameter.item() == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize(
    ("num_warmup_steps", "expected"),
    [
        (4, [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
        (0, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (8, [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]),
    ],
)
def test_the_rate_rises_to_its_peak_and_falls_to_zero(num_warmup_steps: int, expected: list[float]) -> None:
    optimizer = build_optimizer(torch.nn.Linear(1, 1), OptimizerSettings(learning_rate=2.0))
    scheduler = build_scheduler(optimizer, num_warmup_steps=num_warmup_steps, num_steps=8)
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [2 * factor for factor in expected]
    assert linear_schedule(8, num_warmup_steps=min(num_warmup_steps, 7), num_steps=8) == 0
    assert linear_schedule(100, num_warmup_steps=num_warmup_steps, num_steps=8) == 0


@pytest.mark.parametrize(
    ("warmup_steps", "num_steps"), [(0.1, 2), (0, 0), (1, 1), (5.0, 5), (0.05, 1), (0.999, 20), (30, 30)]
)
def test_warmup_below_one_is_a_share_of_the_steps(warmup_steps: float, num_steps: int, corpus: Path) -> None:
    assert tiny_recipe("gpt", corpus, optimizer__warmup_steps=warmup_steps).num_warmup_steps == num_steps
