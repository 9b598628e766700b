"""The loss of an output layer without the logits of a whole batch, whatever stands in the layer's place.

An nn.Linear is its weight and bias, so `linear_cross_entropy` takes those. An adapter (LoRA), a quantised or offloaded
layer, one with hooks or a parametrization is only what calling it gives: it is called, on a few hundred tokens at a
time, whose logits are computed again in the backward pass instead of being kept.

    loss = head_cross_entropy(model.lm_head, hidden, targets, num_targets)
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from cottention.files import IGNORE_INDEX
from cottention.models.linear_cross_entropy import chunk_length, linear_cross_entropy
from cottention.models.losses import averaged, summed_cross_entropy


def head_cross_entropy(
    head: nn.Module,
    x: Float[Tensor, "... D"],
    labels: Int[Tensor, ...],
    num_items_in_batch: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of `head(x)`.

    Args:
        head: the output layer.
        x: hidden states.
        labels: the token to predict at each position; -100 where there is none.
        num_items_in_batch: divisor; None: the number of labels here, which gives the mean.

    Returns:
        A scalar; 0 when there is no label at all.
    """
    if is_plain_linear(head):
        return linear_cross_entropy(x, head.weight, head.bias, labels, num_items_in_batch)  # type: ignore[arg-type]
    targets = labels.to(x.device).flatten()
    step = chunk_length(x.device)
    chunks = zip(x.flatten(0, -2).split(step), targets.split(step), strict=True)
    sums = [checkpoint(_summed_loss, head, rows, part, use_reentrant=False) for rows, part in chunks]
    return averaged(torch.stack(sums).sum(), num_items_in_batch, (targets != IGNORE_INDEX).sum().clamp(min=1))


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling this layer does nothing but apply its own weight and bias, which then may stand for the call."""
    return (
        type(layer) is nn.Linear
        and "forward" not in layer.__dict__  # accelerate's hooks put a wrapper there
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not torch_module._has_any_global_hook()
        and all(_is_real(tensor) for tensor in (layer.weight, layer.bias) if tensor is not None)
    )


def _is_real(tensor: Tensor) -> bool:
    """Whether its numbers are here, as they are: neither sharded, nor quantised, nor still on disk."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.device.type != "meta"


def _summed_loss(head: nn.Module, rows: Tensor, targets: Tensor) -> Tensor:
    return summed_cross_entropy(head(rows), targets)
