"""What a hand-written derivative cannot give: how to see that it is asked for, and how to answer from plain operators.

A forward and a backward of our own are one derivative. Forward mode, torch.func and the derivative of the backward
would find nothing there, which PyTorch takes for zero.

    def forward(*x): return plain(*x) if is_transformed(*x) else Fused.apply(*x)
    def backward(ctx, *grads):
        if torch.is_grad_enabled() or is_transformed(*grads, *x): return plain_gradients(plain, x, grads, wanted)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(*inputs: Any) -> bool:
    """Whether torch.func transforms the present call, or a tensor carries a forward-mode tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def wants_gradient(*inputs: Any) -> bool:
    """Whether autograd records a call of these inputs."""
    if torch.is_grad_enabled():
        for x in inputs:  # any(...) would take longer than all else here
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def plain_gradients(
    plain: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    grads: tuple[Tensor | None, ...],  # of the first outputs
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated themselves, by any kind of derivative."""
    create_graph = torch.is_grad_enabled()
    found: list[Tensor | None] = [None] * len(tensors)
    with torch.enable_grad():
        # Through views of the inputs: one of them may have been computed from another.
        own = [x.view_as(x) if x is not None and needed else x for x, needed in zip(tensors, wanted, strict=False)]
        sources = {i: x for i, x in enumerate(own) if x is not None and wanted[i]}
        for o, grad in zip(plain(*own), grads, strict=False):
            if grad is not None and o.requires_grad:
                reached = torch.autograd.grad(
                    o, list(sources.values()), grad, retain_graph=True, create_graph=create_graph, allow_unused=True
                )
                for i, gradient in zip(sources, reached, strict=True):
                    found[i] = _sum(found[i], gradient)
    return tuple(found)


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y
