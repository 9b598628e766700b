"""Both models reproduce the original code: logits, hidden states, losses and every gradient."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.models.helpers import (
    TOLERANCES,
    errors_against_the_original,
    published_folder,
    published_model,
    relative_error,
    run_published,
)

CASES = [
    ("fixtures", "bert", "batch0"),
    ("fixtures", "bert", "batch1"),
    ("fixtures", "gpt_rot8", "batch1_right"),
    ("fixtures", "gpt_rotnone_1head", "batch1_right"),
    ("shared", "bert", "batch0"),
    ("shared", "bert", "batch1"),
    *(
        ("shared", name, batch)
        for name in ("gpt_rot8", "gpt_rot16_full", "gpt_rotnone_1head")
        for batch in ("batch0_left", "batch0_right", "batch1_right")
    ),
]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("where", "name", "batch"), CASES)
def test_model_equals_the_original(
    request: pytest.FixtureRequest, where: str, name: str, batch: str, dtype: torch.dtype
) -> None:
    folder = published_folder(request, where, name)
    values, gradients = errors_against_the_original(published_model(folder, dtype), folder, batch)
    assert len(values) >= 5
    tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert max(values.values()) < tolerance, values
    assert max(gradients.values()) < gradient_tolerance, gradients


@pytest.mark.parametrize("name", ["bert", "gpt_rot8", "gpt_rotnone_1head"])
def test_parameters_come_in_the_order_of_published_optimizer_states(request: pytest.FixtureRequest, name: str) -> None:
    folder = published_folder(request, "fixtures", name)
    order = json.loads((folder / "param_order.json").read_text())
    assert [name for name, _ in published_model(folder, torch.float32).named_parameters()] == order


@pytest.mark.parametrize("implementation", ["naive", "auto"])
def test_each_form_of_the_operation_gives_the_same_model(request: pytest.FixtureRequest, implementation: str) -> None:
    folder = published_folder(request, "fixtures", "bert")
    arrays = np.load(folder / "batch0.npz")
    model = published_model(folder, torch.float64)
    model.set_implementation(implementation)
    inputs = {key: torch.from_numpy(arrays[key]) for key in arrays if not key.endswith(("_f64", "_f32"))}
    assert relative_error(run_published(model, inputs)["loss"], arrays["loss_f64"]) < 1e-11
