"""The model of a cell: its config, made equal in parameters to the plainest one, and what it remembers.

Options add parameters (an output gate, a quarter of the projections), so the feed-forward part gives some of its width
back: `n_inner` is the one that brings the count nearest to that of cosine attention as published.

    model = new_model(cell, vocab_size=4096)
    num_parameters(model.config), state_bytes(model, length=256)
"""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cottention.benchmarks.quality.cells import SIZES, Cell, Size, options_of
from cottention.errors import SettingsError
from cottention.models import CottentionGPTConfig, CottentionGPTForCausalLM
from cottention.models.versions import cache_of

MOST_APART = 0.01
"""Of the parameters: variants that differ by more are not compared."""


def new_model(cell: Cell, vocab_size: int) -> CottentionGPTForCausalLM:
    """The cell's model with the weights that its seed gives."""
    config = matched_config(cell.plan.size, cell.variant, vocab_size, cell.plan.length)
    torch.manual_seed(cell.seed)
    return CottentionGPTForCausalLM(config)


def matched_config(size_name: str, variant: str, vocab_size: int, length: int) -> CottentionGPTConfig:
    """The settings of a variant with as many parameters as "cosine" of the same size.

    Args:
        size_name: in `cells.SIZES`.
        variant: parts, as in `cells.PARTS`.
        vocab_size: tokens.
        length: of a training row; half-lives of a decay go up to it.

    Raises:
        SettingsError: the counts cannot be brought within 1 %.
    """
    size = SIZES[size_name]
    wanted = num_parameters(_config(size, options_of("cosine"), vocab_size, length, size.n_inner))
    options = options_of(variant)
    config = _config(size, options, vocab_size, length, size.n_inner)
    per_unit = size.n_layer * (2 * size.n_embd + 1)
    n_inner = size.n_inner + round((wanted - num_parameters(config)) / per_unit)
    if n_inner > 0:
        config = _config(size, options, vocab_size, length, n_inner)
    found = num_parameters(config)
    if n_inner <= 0 or abs(found - wanted) > MOST_APART * wanted:
        raise SettingsError(f"{variant} of size {size_name} must come within 1 % of {wanted} parameters; got {found}")
    return config


def _config(size: Size, options: dict[str, Any], vocab_size: int, length: int, n_inner: int) -> CottentionGPTConfig:
    options = dict(options)
    head_dim = size.n_embd // size.n_head
    share, every = options.pop("rotary_share", 1.0), options.pop("softmax_every", None)
    if every is not None:
        options["layer_types"] = _layer_types(size.n_layer, every)
    # A config of transformers takes any word in silence.
    assert all(hasattr(CottentionGPTConfig, name) for name in options), options
    return CottentionGPTConfig(
        vocab_size=vocab_size,
        n_positions=length,
        n_embd=size.n_embd,
        n_layer=size.n_layer,
        n_head=size.n_head,
        n_inner=n_inner,
        rotary_dim=2 * round(share * head_dim / 2) or None,
        position_embedding_type="rotary" if share else "none",
        tie_word_embeddings=size.tied,
        **options,
    )


def _layer_types(num_layers: int, every: int) -> list[str]:
    """Softmax in the last layer of every so many; in the very last of a model with fewer."""
    every = min(every, num_layers)
    return ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(num_layers)]


def num_parameters(config: CottentionGPTConfig) -> int:
    """Parameters of a model of these settings, shared ones once."""
    return _num_parameters(config.to_json_string(use_diff=False))


@lru_cache
def _num_parameters(settings: str) -> int:
    with torch.device("meta"):
        model = CottentionGPTForCausalLM(CottentionGPTConfig(**json.loads(settings)))
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """For AdamW: matrices of embeddings and projections decay; norms, convolutions, rates and exponents do not."""
    matrices = {
        id(module.weight) for module in model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [each for each in parameters if id(each) in matrices], "weight_decay": weight_decay},
        {"params": [each for each in parameters if id(each) not in matrices], "weight_decay": 0.0},
    ]


@torch.no_grad()
def state_bytes(model: CottentionGPTForCausalLM, length: int) -> int:
    """Bytes that the model keeps of a text of `length` tokens in order to go on with it."""
    was_training = model.training
    model.eval()
    ids = torch.zeros(1, length, dtype=torch.int64, device=model.device)
    cache = cache_of(model.transformer(ids, use_cache=True))
    model.train(was_training)
    return sum(tensor.nbytes for layer in cache.layers for tensor in _kept(layer) if tensor.is_floating_point())


def _kept(layer: Any) -> tuple[Tensor, ...]:
    state = getattr(layer, "state", None)
    return (layer.keys, layer.values) if state is None else tuple(state)


def reads_longer(model: CottentionGPTForCausalLM, length: int) -> CottentionGPTForCausalLM:
    """The same weights in a model that does not refuse texts of `length` tokens, as softmax does beyond n_positions."""
    if model.config.n_positions >= length:
        return model
    longer = copy.deepcopy(model)
    longer.config.n_positions = length
    return longer.eval()
