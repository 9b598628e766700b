"""Turns a candidate and a workload into a call that can be timed, measured or checked.

call = prepare(candidate.function, workload, Inputs(workload, "cpu"))
o, *gradients = call()
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cottention.benchmarks.peers import Attention
from cottention.benchmarks.settings import Workload

# The published initialisation.
_NORM_CONST = 0.5
_FRESH = 1 << 20


class Inputs:
    """q, k, v, norm_const and the gradient of the output: one set for all candidates of a workload."""

    def __init__(self, workload: Workload, device: str, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, workload.dtype)

        def normal() -> Tensor:
            return _normal(workload.shape, generator).to(device, dtype)

        needs_grad = workload.backward
        self.q, self.k, self.v = (normal().requires_grad_(needs_grad) for _ in range(3))
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        m = torch.full((workload.num_heads,), _NORM_CONST, device=device, dtype=exact)
        self.norm_const = m.requires_grad_(needs_grad)
        self.do = normal() if needs_grad else None

    @staticmethod
    def num_bytes(workload: Workload) -> int:
        """What the inputs of a workload take."""
        B, T, H, K = workload.shape
        return (4 if workload.backward else 3) * B * T * H * K * getattr(torch, workload.dtype).itemsize

    def in_float64(self) -> Inputs:
        """The same numbers, for the reference."""
        exact = object.__new__(Inputs)
        for name, x in vars(self).items():
            setattr(exact, name, None if x is None else x.detach().double().requires_grad_(x.requires_grad))
        return exact


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers; from the first million on they repeat, because drawing more would take longer than the calls."""
    x = torch.empty(math.prod(shape))
    first = x[:_FRESH].normal_(generator=generator)
    for start in range(_FRESH, x.numel(), _FRESH):
        part = x[start : start + _FRESH]
        part.copy_(first[: part.numel()])
    return x.view(shape)


def prepare(function: Attention, workload: Workload, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """A call without arguments that returns the output, and with backward the gradients.

    The gradients of q, k and v, and that of norm_const from a function that uses it, are returned, not accumulated,
    so a call holds nothing from one time to the next.
    """
    q, k, v, m = inputs.q, inputs.k, inputs.v, inputs.norm_const

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(q, k, v, m, workload.causal),)

    def forward_and_backward() -> tuple[Tensor, ...]:
        o = function(q, k, v, m, workload.causal)
        gradients = torch.autograd.grad(o, (q, k, v, m), inputs.do, allow_unused=True)
        return (o.detach(), *(g for g in gradients if g is not None))

    return forward_and_backward if workload.backward else forward


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if device != "cpu":
        torch.cuda.synchronize()
