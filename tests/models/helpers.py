"""What the model tests share: tiny configs, the published-layout folders, and error measures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cottention.models import (
    CottentionBertConfig,
    CottentionBertForPreTraining,
    CottentionGPTConfig,
    CottentionGPTForCausalLM,
)

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
ATTENTION_TYPES = ("cosine", "softmax")
# (values, gradients): the tolerances of the reference numbers' README.
TOLERANCES = {torch.float64: (1e-11, 1e-10), torch.float32: (1e-5, 2e-5)}


def gpt_config(attention_type: str = "cosine", **settings: Any) -> CottentionGPTConfig:
    """A GPT that runs in milliseconds."""
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 8}
    return CottentionGPTConfig(attention_type=attention_type, **{**sizes, **settings})


def bert_config(attention_type: str = "cosine", **settings: Any) -> CottentionBertConfig:
    """A BERT that runs in milliseconds."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return CottentionBertConfig(attention_type=attention_type, **{**sizes, **settings})


def randomised(model: Any, dtype: torch.dtype = torch.float64, std: float = 0.3) -> Any:
    """The model with weights large enough that a mistake anywhere shows in its output."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1 + noise if "LayerNorm.weight" in name or ("ln_" in name and "weight" in name) else noise)
    return model.to(dtype).eval()


def checkpointed(model: Any, **settings: Any) -> Any:
    """The model with activation checkpointing on, as transformers 5.23 renamed it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings or None)
    return model


def some_tokens(B: int, T: int, vocab_size: int = 61, seed: int = 0) -> Tensor:
    """Token ids without 0, which BERT takes for padding."""
    return torch.randint(1, vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def published_folder(request: pytest.FixtureRequest, where: str, name: str) -> Path:
    """tests/fixtures/modules/NAME, or the complete one in shared/oracle; skips where that is missing."""
    root = FIXTURES if where == "fixtures" else request.getfixturevalue("oracle_dir")
    return root / "modules" / name


def published_config(folder: Path, **settings: Any) -> Any:
    """Our config from a stock config.json."""
    stock = json.loads((folder / "config.json").read_text())
    kind = {"bert": CottentionBertConfig, "gptj": CottentionGPTConfig}[stock["model_type"]]
    ours = {field.name for field in dataclasses.fields(kind)} - {"architectures", "dtype", "transformers_version"}
    return kind(**{**{key: value for key, value in stock.items() if key in ours}, **settings})


def published_model(folder: Path, dtype: torch.dtype) -> Any:
    """Our model with a published folder's weights, loaded strictly."""
    config = published_config(folder)
    model: Any
    if isinstance(config, CottentionBertConfig):
        model = CottentionBertForPreTraining(config)
    else:
        model = CottentionGPTForCausalLM(config)
    model.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True), strict=True)
    return model.to(dtype).eval()


def relative_error(got: Tensor, expected: np.ndarray | Tensor) -> float:
    """max |got - expected| / max |expected|."""
    truth = torch.as_tensor(expected).double()
    return ((got.detach().double() - truth).abs().max() / truth.abs().max()).item()


def gradients(model: Any) -> dict[str, Tensor]:
    """Every parameter's gradient by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run_published(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
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


def errors_against_the_original(model: Any, folder: Path, batch: str) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors of every recorded value, and of each parameter's gradient, on one batch of a published folder."""
    arrays = np.load(folder / f"{batch}.npz")
    truth = {key.removesuffix("_f64"): arrays[key] for key in arrays if key.endswith("_f64")}
    inputs = {key: torch.from_numpy(arrays[key]) for key in arrays if not key.endswith(("_f64", "_f32"))}
    got = run_published(model, inputs)
    return {key: relative_error(got[key], value) for key, value in truth.items()}, _gradient_errors(
        model, folder, batch
    )


def _gradient_errors(model: Any, folder: Path, batch: str) -> dict[str, float]:
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
