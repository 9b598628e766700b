"""What a model has learned, and how it looks at a text: numbers per head, and attention maps.

head_rows(model, tokenizer, "My fellow Americans")     # [[layer, head, attention, exponent, half-life, write], ...]
map_picture(model, tokenizer, "My fellow Americans", layer=0, head=1)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.errors import SettingsError
from cottention.generation.encoding import encode
from cottention.layers import CosineAttention, SoftmaxAttention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAD_COLUMNS = ("layer", "head", "attention", "exponent of the divisor", "half-life in tokens", "write strength")
LONGEST = 128
"""Tokens of a map: more are no picture."""


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    token_ids = encode(tokenizer, text, "the text")[:LONGEST]
    if not len(token_ids):
        raise SettingsError("the text is empty")
    return torch.from_numpy(token_ids).long()[None]  # [1, T]


def _attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The attention of every layer, in order."""
    return [module for module in model.modules() if isinstance(module, (CosineAttention, SoftmaxAttention))]


def head_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> list[list[Any]]:
    """A row of `HEAD_COLUMNS` for every head; half-life and write strength are medians over the text's tokens."""
    layers = _attentions(model)
    seen: dict[nn.Module, Tensor] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[module] = args[0] if args else kwargs["hidden_states"]

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        with torch.inference_mode():
            model(_token_ids(tokenizer, text).to(model.device))
            gates = [layer.gates(seen[layer]) if isinstance(layer, CosineAttention) else {} for layer in layers]
    finally:
        for hook in hooks:
            hook.remove()
    return [row for number, layer in enumerate(layers) for row in _rows_of(number, layer, gates[number])]


def _rows_of(number: int, layer: Any, gates: dict[str, Tensor]) -> list[list[Any]]:
    H = layer.num_attention_heads
    exponents = getattr(layer, "norm_const", None)
    exponent = (
        [""] * H if exponents is None else [f"{x:.2f}" for x in exponents.detach().float().sigmoid().flatten().tolist()]
    )
    decay, beta = gates.get("log_decay"), gates.get("beta")
    half_lives = [""] * H if decay is None else [_half_life(x) for x in _medians(decay)]
    writes = [""] * H if beta is None else [f"{x:.2f}" for x in _medians(beta)]
    kind = "cosine" if isinstance(layer, CosineAttention) else "softmax"
    return [[number, head, kind, exponent[head], half_lives[head], writes[head]] for head in range(H)]


def _medians(gate: Tensor) -> list[float]:
    return gate.float().flatten(0, 1).median(0).values.tolist()  # [H]


def _half_life(log_decay: float) -> str:
    return "never" if log_decay == 0 else f"{math.log(2) / -log_decay:.3g}"


def map_picture(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, layer: int, head: int
) -> Figure:
    """How much each token (row) takes from each (column); blue below zero, which cosine attention can be.

    Raises:
        SettingsError: the text is empty, there is no such layer or head, or the layer has no map (it erases).
    """
    from matplotlib.figure import Figure

    token_ids = _token_ids(tokenizer, text).to(model.device)
    try:
        with torch.inference_mode():
            maps = model(token_ids, output_attentions=True).attentions
    except ValueError as error:
        raise SettingsError(str(error)) from None
    if not 0 <= layer < len(maps) or not 0 <= head < maps[0].shape[1]:
        raise SettingsError(f"the model has layers 0 to {len(maps) - 1} and heads 0 to {maps[0].shape[1] - 1}")
    weights = maps[layer][0, head].float().cpu()  # [T, T]
    names = [_shown(tokenizer, token) for token in token_ids[0].tolist()]
    size = min(12.0, 2.5 + 0.22 * len(names))
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    most = float(weights.abs().max()) or 1.0
    image = axes.imshow(weights.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("takes from")
    figure.colorbar(image, ax=axes, shrink=0.6)
    return figure


def _shown(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token])).strip().replace("$", r"\$") or "␣"
