"""Both models reproduce the original code: logits, hidden states, losses and every gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.helpers import published_folder, published_model, relative_error

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
# (values, gradients): the tolerances of the reference numbers' README.
TOLERANCES = {torch.float64: (1e-11, 1e-10), torch.float32: (1e-5, 2e-5)}


def run(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward and backward; results under the names that the reference uses."""
    labels = batch["labels"]
    if "token_type_ids" in batch:
        out = model(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            token_type_ids=batch["token_type_ids"],
            labels=labels,
            next_sentence_label=batch["sentence_pairs_labels"],
            output_hidden_states=True,
        )
    else:
        # The reference shifts the labels itself and leaves targets of padding in.
        targets = labels.masked_fill(batch["attention_mask"] == 0, -100)
        out = model(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            shift_labels=targets,
            output_hidden_states=True,
        )
    out.loss.backward()
    hidden_states = {f"hidden_{i}": x for i, x in enumerate(out.hidden_states)}
    return {**{key: value for key, value in out.items() if isinstance(value, Tensor)}, **hidden_states}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("where", "name", "batch"), CASES)
def test_model_equals_the_original(
    request: pytest.FixtureRequest, where: str, name: str, batch: str, dtype: torch.dtype
) -> None:
    folder = published_folder(request, where, name)
    tolerance, gradient_tolerance = TOLERANCES[dtype]
    arrays = np.load(folder / f"{batch}.npz")
    truth = {key.removesuffix("_f64"): arrays[key] for key in arrays if key.endswith("_f64")}
    model = published_model(folder, dtype)
    inputs = {key: torch.from_numpy(arrays[key]) for key in arrays if not key.endswith(("_f64", "_f32"))}
    got = run(model, inputs)
    assert len(truth) >= 5
    errors = {key: relative_error(got[key], value) for key, value in truth.items()}
    assert max(errors.values()) < tolerance, errors
    worst = gradient_errors(model, folder, batch)
    assert max(worst.values()) < gradient_tolerance, worst


def gradient_errors(model: Any, folder: Path, batch: str) -> dict[str, float]:
    """Per parameter, the 2-norm of the gradient's error over its 2-norm; of the norms where only those are known."""
    norms = json.loads((folder / f"{batch}_grad_norms.json").read_text())
    got = {name: p.grad.double() for name, p in model.named_parameters()}
    assert set(got) == set(norms)
    errors = {name: abs(got[name].norm().item() / norms[name]["norm_f64"] - 1) for name in norms}
    full = folder / f"{batch}_grads_f64.npz"
    if full.exists():
        truth = {name: torch.from_numpy(array) for name, array in np.load(full).items()}
        assert set(truth) == set(got)
        errors = {name: ((got[name] - truth[name]).norm() / truth[name].norm()).item() for name in truth}
    return errors


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
    assert relative_error(run(model, inputs)["loss"], arrays["loss_f64"]) < 1e-11
