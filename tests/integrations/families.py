"""Small random models of transformers' families with gated delta layers, and their functions in float64."""

from __future__ import annotations

import importlib
import inspect
from functools import update_wrapper
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    **_LINEAR,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
# Family -> its config and model, and what its config takes beside the rest.
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**_EXPERTS, "decoder_sparse_step": 2}),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _EXPERTS),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", {"linear_allow_neg_eigval": True}),
}
FAMILIES = list(_FAMILIES)


def modeling(family: str) -> Any:
    """transformers' file of a family; the test is skipped where this version has none."""
    if find_spec(f"transformers.models.{family}") is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def make_model(family: str, **changes: Any) -> Any:
    """A model in evaluation mode, computed by transformers' PyTorch form."""
    config_name, model_name, options = _FAMILIES[family]
    module = modeling(family)
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    torch.manual_seed(0)
    config = getattr(configuration, config_name)(**{**_COMMON, **options, **changes})
    config._experts_implementation = "eager"  # the others know no float64
    model = getattr(module, model_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the tiny weights of the start: gates and keys that differ
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


class InFloat64:
    """torch, but that its float32 is float64: their functions compute in float32 whatever they are given."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def their_rule(family: str, name: str, dtype: torch.dtype) -> Any:
    """One of their two functions, in the PyTorch form, with what it calls; grouped heads in 5.17 too."""
    module = modeling(family)
    function = inspect.unwrap(getattr(module, name))
    names = {**function.__globals__, "torch": InFloat64() if dtype == torch.float64 else torch}
    rule = FunctionType(function.__code__, names, name, function.__defaults__, function.__closure__)

    def with_all_heads(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        repeats = value.shape[2] // query.shape[2]
        query, key = (x.repeat_interleave(repeats, dim=2) for x in (query, key))
        return rule(query, key, value, *args, **kwargs)

    return update_wrapper(with_all_heads, function)


def relative(found: Tensor, expected: Tensor, least: float = 1e-12) -> float:
    """The norm of the difference, relative to that of what was expected, or to the least that counts."""
    return float((found - expected).norm() / expected.norm().clamp(min=least))
