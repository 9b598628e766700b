"""The paper's optimizer and schedule: AdamW with one decay for every parameter, linear warmup, then linear to zero.

Parameters of attention's options that are no weights of a sum (a module names them in `without_weight_decay`) are left
out of the decay. Pretraining and the test against the original's loss curves build both through here.

    optimizer = build_optimizer(model, recipe.optimizer)
    scheduler = build_scheduler(optimizer, num_warmup_steps=recipe.num_warmup_steps, num_steps=1000)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cottention.training.recipe_sections import OptimizerSettings


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Make AdamW over all trainable parameters of a model, in one group, and a second where some do not decay.

    Biases, LayerNorm and norm_const decay like everything else, as in the paper.

    Args:
        model: already on its device.
        settings: the recipe's section `optimizer`.

    Source: Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv 1711.05101.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # One fused kernel instead of a dozen passes over the weights; the same numbers up to rounding, and on the CPU a
    # third of the time. It covers the floating types that it is asked for only.
    fused = all(parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point() for parameter in parameters)
    exempt = {id(parameter) for parameter in _without_weight_decay(model)}
    groups: list[dict[str, Any]] = [{"params": [parameter for parameter in parameters if id(parameter) not in exempt]}]
    if exempt:
        kept = [parameter for parameter in parameters if id(parameter) in exempt]
        groups.append({"params": kept, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=fused,
    )


def _without_weight_decay(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        for name in getattr(module, "without_weight_decay", ()):
            parameter = module._parameters.get(name)
            if parameter is not None:
                yield parameter


def build_scheduler(
    optimizer: torch.optim.Optimizer, *, num_warmup_steps: int, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make the schedule: update k (from 0) uses the rate times `linear_schedule(k, ...)`.

    Differs from the original: its scheduler lags one update behind, so that its first two updates change nothing.
    """
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: linear_schedule(step, num_warmup_steps=num_warmup_steps, num_steps=num_steps)
    )


def linear_schedule(step: int, *, num_warmup_steps: int, num_steps: int) -> float:
    """Factor of the learning rate at `step`: step / warmup, then falling in a straight line to 0 at `num_steps`."""
    if step < num_warmup_steps:
        return step / num_warmup_steps
    return max(0.0, 1 - (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
