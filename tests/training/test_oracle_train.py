"""Model, losses and optimizer together against the original's training: the same batches give the same loss curves.

What is compared (shared/oracle/README.md, train/): 30 updates from stored weights, at the stored learning rates, with
dropout off. Adam's eps 1e-8 in place of 1e-7 would move the losses by 2e-5; the bounds are far below that.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cottention.models import CottentionBertForPreTraining, CottentionGPTForCausalLM
from cottention.training.optimizer import build_optimizer, build_scheduler
from cottention.training.recipe_sections import OptimizerSettings
from tests.models.helpers import published_config

ARCHS = ("gpt", "bert")
DTYPES = {"f64": torch.float64, "f32": torch.float32}
LOSS_BOUND = {"f64": 1e-9, "f32": 5e-6}
"""Absolute, at every update. In float32 the original itself is up to 6e-7 from its float64 run."""


@pytest.fixture(params=ARCHS)
def folder(request: pytest.FixtureRequest, oracle_dir: Path) -> Path:
    """The stored run of one architecture."""
    return oracle_dir / "train" / request.param


def settings_of(folder: Path) -> dict[str, Any]:
    """The stored run's hyper-parameters."""
    return json.loads((folder.parent / "summary.json").read_text())[folder.name]


def optimizer_settings(folder: Path) -> OptimizerSettings:
    """The same as a recipe's section."""
    names = ("learning_rate", "betas", "eps", "weight_decay", "warmup_steps")
    given = settings_of(folder)
    values: dict[str, Any] = {name: given[name] for name in names}
    return OptimizerSettings(**{**values, "betas": tuple(values["betas"])})


def new_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model before the first update."""
    config = published_config(folder / "init")
    model: Any = CottentionGPTForCausalLM(config) if folder.name == "gpt" else CottentionBertForPreTraining(config)
    model.load_state_dict(torch.load(folder / "init" / "pytorch_model.bin", weights_only=True), strict=True)
    return model.to(dtype).train()


def losses_of(model: Any, arch: str, batch: dict[str, Tensor]) -> Tensor:
    """All columns of the stored curve: for BERT the sum, masked tokens, next sentence; for GPT the loss."""
    mask = batch["attention_mask"].long()
    if arch == "bert":
        out = model(
            batch["input_ids"],
            attention_mask=mask,
            token_type_ids=batch["token_type_ids"],
            labels=batch["labels"],
            next_sentence_label=batch["sentence_pairs_labels"],
        )
        return torch.stack([out.loss, out.mlm_loss, out.nsp_loss])
    labels = batch["labels"].masked_fill(mask == 0, -100)
    return model(batch["input_ids"], attention_mask=mask, shift_labels=labels).loss[None]


@cache
def trained(folder: Path, precision: str) -> tuple[Any, dict[str, np.ndarray]]:
    """Our model after all stored batches, and what was seen on the way, by the names in curve.npz."""
    stored, curve = np.load(folder / "batches.npz"), np.load(folder / "curve.npz")
    model = new_model(folder, DTYPES[precision])
    optimizer = build_optimizer(model, optimizer_settings(folder))
    seen: dict[str, list[np.ndarray]] = {"loss": [], "grad_norm_at_update": [], "norm_const_after_step": []}
    norm_consts = [parameter for name, parameter in model.named_parameters() if name.endswith("norm_const")]
    for update, learning_rate in enumerate(curve["lr_used"]):
        prefix = f"s{update:02d}_"
        batch = {key.removeprefix(prefix): torch.from_numpy(stored[key]) for key in stored if key.startswith(prefix)}
        optimizer.param_groups[0]["lr"] = float(learning_rate)
        losses = losses_of(model, folder.name, batch)
        optimizer.zero_grad()
        losses[0].backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        optimizer.step()
        seen["loss"].append(losses.detach().double().numpy())
        seen["grad_norm_at_update"].append(norm.double().numpy())
        seen["norm_const_after_step"].append(np.stack([p.detach().double().flatten().numpy() for p in norm_consts]))
    return model, {name: np.stack(values) for name, values in seen.items()}


@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_the_loss_curve_is_the_originals(folder: Path, precision: str) -> None:
    _, seen = trained(folder, precision)
    truth = np.load(folder / "curve.npz")["loss_f64"]
    assert seen["loss"].shape == truth.shape
    assert truth[-1, 0] < truth[0, 0] - 0.5, "the stored run learnt something"
    assert np.abs(seen["loss"] - truth).max() < LOSS_BOUND[precision]


def test_gradients_and_norm_const_follow_the_original(folder: Path) -> None:
    _, seen = trained(folder, "f64")
    curve = np.load(folder / "curve.npz")
    for name in ("grad_norm_at_update", "norm_const_after_step"):
        np.testing.assert_allclose(seen[name], curve[f"{name}_f64"], rtol=1e-8, err_msg=name)
    assert np.abs(np.diff(seen["norm_const_after_step"], axis=0)).max() > 1e-3, "norm_const is trained"


def test_the_final_weights_are_the_originals(folder: Path) -> None:
    model, _ = trained(folder, "f64")
    truth = np.load(folder / "final_weights_f64run.npz")
    weights = model.state_dict()
    for name in truth:
        # Stored in float32, whose rounding is all that may be between them.
        np.testing.assert_allclose(weights[name].numpy(), truth[name], rtol=1e-6, atol=1e-8, err_msg=name)


def test_the_schedule_is_the_originals_without_its_lag(folder: Path) -> None:
    given = settings_of(folder)
    optimizer = build_optimizer(torch.nn.Linear(1, 1), optimizer_settings(folder))
    scheduler = build_scheduler(optimizer, num_warmup_steps=given["warmup_steps"], num_steps=given["num_steps"])
    rates = []
    for _ in range(given["steps"]):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    originals = np.load(folder / "curve.npz")["lr_used"]
    assert originals[:2].tolist() == [0, 0]
    np.testing.assert_allclose(rates[:-1], originals[1:], rtol=1e-12)
    assert optimizer.param_groups[0]["lr"] == 0, "after the last update"
