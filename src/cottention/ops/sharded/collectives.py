"""Collectives that autograd goes through, begun in one place and finished in another: there is time to work between.

    gather   x [...] of each rank -> [R, ...], everyone's            its gradient: scatter
    scatter  x [R, ...] of each rank -> [...], the sum of row r      its gradient: gather
    add      x [...] of each rank -> [...], the sum                  its gradient: add

Each is linear and has another of the three for its gradient, so that derivatives of any order are right. The gradient
is begun where the result was waited for and finished where the collective was begun: what was computed in between is
differentiated while it is under way. All ranks of a group must go through the same collectives in the same order,
backward too: a rank whose loss misses one keeps the others waiting until the group's time-out.

    pending = begin("gather", x, group)
    y = local_work()
    states = pending.wait()             # [R, ...]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

_GRADIENT_OF = {"gather": "scatter", "scatter": "gather", "add": "add"}


Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(function: Function) -> Function:
    """Let torch.compile leave a function alone that goes through these: it breaks the graph there."""
    return cast(Function, torch.compiler.disable(function))


def as_group(group: Any) -> dist.ProcessGroup:
    """The process group of a one-dimensional DeviceMesh, or the process group itself.

    Raises:
        TypeError: it is neither.
        ValueError: this process is no part of it, or the mesh has more dimensions.
    """
    if isinstance(group, dist.device_mesh.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"process_group must be a mesh of one dimension, as mesh['sequence']; got {group.ndim}")
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must be one that this process belongs to; it does not")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup or a DeviceMesh; got {type(group).__name__}")
    return group


class Pending:
    """A collective that is under way."""

    def __init__(self, kind: str, x: Tensor, group: dist.ProcessGroup) -> None:
        self._flight = _Flight(kind, group)
        self._token = _Begin.apply(x, self._flight)

    def wait(self) -> Tensor:
        """What came of it; once."""
        return _Finish.apply(self._token, self._flight)  # type: ignore[return-value]


def begin(kind: str, x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Begin one of the collectives above; x is left as it is."""
    return Pending(kind, x, group)


class _Flight:
    """The buffers and the handle of a collective under way, and that of its gradient's."""

    def __init__(self, kind: str, group: dist.ProcessGroup) -> None:
        self.kind, self.group = kind, group
        self.gradient: _Flight | None = None
        self._sent = self._received = self._work = None

    def launch(self, x: Tensor) -> None:
        size = self.group.size()
        self._sent = x.contiguous()  # held: it must outlive what reads it
        if self.kind == "add":
            self._received = self._sent.clone()
            self._work = dist.all_reduce(self._received, group=self.group, async_op=True)
            return
        shape = (size, *x.shape) if self.kind == "gather" else x.shape[1:]
        self._received = x.new_empty(shape)
        # flat: what lies behind one another in memory is all that these ask
        to, of = self._received.view(-1), self._sent.view(-1)
        run = _gather if self.kind == "gather" else _scatter
        self._work = run(to, of, group=self.group, async_op=True)

    def land(self) -> Tensor:
        assert self._work is not None, "a collective is waited for once"
        self._work.wait()
        received = self._received
        self._sent = self._received = self._work = None
        assert received is not None
        return received


class _Begin(torch.autograd.Function):
    """Hands on nothing but a token, which ties the end to the beginning in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.launch(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None]:
        return _Finish.apply(grads[0], ctx.flight.gradient), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None]:
        ctx.flight.gradient = gradient = _Flight(_GRADIENT_OF[ctx.flight.kind], ctx.flight.group)
        return _Begin.apply(grads[0], gradient), None


# Their names from PyTorch 2.13 on, and before.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
