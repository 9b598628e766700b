"""Output layer and cross-entropy in one, a few hundred tokens at a time: the logits of a batch never exist at once.

For a vocabulary of 50,400 the float32 logits of 16 windows of 1024 tokens take 3.3 GB, their gradient as much again.
Here each chunk's logits become its loss and, while they are there, its gradients, so nothing is computed twice and what
stays is a gradient of the size of the weights. Derivatives beyond the first, forward mode and torch.func go through the
plain loss, logits and all. The same idea is in Liger-Kernel and in PyTorch 2.13's
`linear_cross_entropy`; this one runs on every PyTorch of ours, under autocast and in torch.compile.

    loss = linear_cross_entropy(hidden, lm_head.weight, lm_head.bias, targets, num_targets)
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from cottention.files import IGNORE_INDEX
from cottention.models.losses import averaged
from cottention.ops.derivatives import is_transformed, plain_gradients

# A CPU's cache holds the logits of some hundred tokens. A GPU has work with more, and adds up the weights' gradient,
# which a chunk reads and writes as a whole, less often.
_CPU_TOKENS, _GPU_TOKENS = 256, 2048


def linear_cross_entropy(
    x: Float[Tensor, "... D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    labels: Int[Tensor, ...],
    num_items_in_batch: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of `x @ weight.T + bias`, in float32 (float64 for float64 weights).

    Args:
        x: hidden states.
        weight: of the output layer.
        bias: of the output layer.
        labels: the token to predict at each position; -100 where there is none.
        num_items_in_batch: divisor; None: the number of labels here, which gives the mean.

    Returns:
        A scalar, differentiable in x, weight and bias; 0 when there is no label at all.

    Raises:
        IndexError: a label is neither -100 nor a row of weight (on a GPU and when compiled: torch's own assertion).
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    rows, targets = x.flatten(0, -2), labels.to(x.device).flatten()
    if is_transformed(rows, weight, bias):
        total = _plain_loss(rows, weight, bias, targets, dtype)
    else:
        _check_labels(targets, weight.shape[0])
        total = _LinearCrossEntropy.apply(rows, weight, bias, targets, dtype)
    return averaged(total, num_items_in_batch, (targets != IGNORE_INDEX).sum().clamp(min=1))


def chunk_length(device: torch.device) -> int:
    """Tokens whose logits exist at the same time."""
    return _CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS


def _check_labels(targets: Tensor, V: int) -> None:
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return  # to look would make the device wait, or break the graph; gather asserts
    wrong = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= V))
    if wrong.any():
        found = int(targets[wrong][0])
        raise IndexError(f"labels must be {IGNORE_INDEX} or from 0 to {V - 1}; got {found}, which is out of bounds")


def _plain_loss(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the losses by autograd's own operators."""
    with torch.autocast(x.device.type, enabled=False):
        logits = linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return cross_entropy(logits.to(exact), targets, ignore_index=IGNORE_INDEX, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype) -> Tensor:
        wanted = ctx.needs_input_grad[:3]
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=exact, device=x.device)
        dx = torch.empty_like(x) if wanted[0] else None
        dweight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        dbias = torch.zeros_like(bias, dtype=exact) if bias is not None and wanted[2] else None
        step = chunk_length(x.device)
        with torch.autocast(x.device.type, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, x.shape[0], step):
                rows, target = x[start : start + step].to(dtype), labels[start : start + step]
                logits = linear(rows, w, b).to(exact)  # [n, V]
                loss, dlogits = _loss_and_gradient(logits, target, with_gradient=any(wanted))
                total += loss
                dlogits = dlogits.to(dtype)
                if dx is not None:
                    dx[start : start + step] = dlogits @ w
                if dweight is not None and dtype == exact:
                    dweight.addmm_(dlogits.T, rows)  # without a sum on the side
                elif dweight is not None:
                    dweight += dlogits.T @ rows
                if dbias is not None:
                    dbias += dlogits.sum(0, dtype=exact)
        ctx.save_for_backward(x, weight, bias, labels, dx, dweight, dbias)
        ctx.dtype = dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, labels, dx, dweight, dbias = ctx.saved_tensors
        if torch.is_grad_enabled() or is_transformed(*grads, *inputs):  # the gradient is to be differentiated

            def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
                return (_plain_loss(x, weight, bias, labels, ctx.dtype),)

            found = plain_gradients(plain, inputs, grads, ctx.needs_input_grad[:3])
        else:
            pairs = zip(inputs, (dx, dweight, dbias), strict=True)
            found = [None if each is None else (each * grads[0]).to(x.dtype) for x, each in pairs]
        return *found, None, None


def _loss_and_gradient(logits: Tensor, target: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Loss of a chunk, and d loss / d logits, made over the logits: passes through memory are what this costs."""
    real = (target != IGNORE_INDEX)[:, None]
    index = target[:, None].masked_fill(~real, 0)
    largest, told = logits.amax(-1, keepdim=True), logits.gather(1, index)
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    loss = torch.where(real, total.log() + (largest - told), 0).sum()
    if with_gradient:
        logits.mul_(real / total)
        logits.scatter_add_(1, index, -real.to(logits.dtype))
    return loss, logits
