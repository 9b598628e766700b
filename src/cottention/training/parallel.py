"""How several processes share a run: copies of the model, shards of its weights, slices of each window.

Processes are numbered so that those that share a window are neighbours, then those that share weights. Weights are
sharded by FSDP2, block by block; slices of windows go through `cottention.distributed`. Both gather what they need in
the forward pass; a loss is each process's share, and gradients are averaged over all processes, so the share is scaled
by their number.

    parallel = Parallel(recipe.parallelism.layout(dist.get_world_size()), "cpu")
    parallel.apply(model, compute_type=torch.float32)        # before the optimizer is made
    parallel.slice_of(model, batch)                          # what this process computes
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from cottention.distributed import shard_sequence, slice_batch
from cottention.training.recipe_sections import Layout

# What `slice_batch` adds and an objective says itself, of the whole step.
_COUNTS = ("num_items_in_batch", "num_sequences_in_batch")


class Parallel:
    """The place of this process among all.

    Args:
        layout: what the processes share out; None: there is one.
        device_type: "cpu" or "cuda".
    """

    def __init__(self, layout: Layout | None = None, device_type: str = "cpu") -> None:
        self.layout = layout = layout or Layout()
        self.is_sharded = layout.shard > 1
        self.reader = (dist.get_rank() if layout.size > 1 else 0) // layout.sequence
        if layout.size == layout.data:
            return  # DDP, or one process, asks for no groups
        ranks = torch.arange(layout.size).view(layout.data, layout.shard, layout.sequence)
        if layout.sequence > 1:
            self.sequence_mesh = DeviceMesh(device_type, ranks, mesh_dim_names=Layout._fields)["sequence"]
        if self.is_sharded:
            self.saving_group: Any = dist.new_group(backend="gloo")  # of a save that goes on beside training
            # Those that share a window hold the same weights, as copies of the model do.
            same = ranks.transpose(1, 2).reshape(-1, layout.shard)
            if len(same) > 1:
                self.weights_mesh = DeviceMesh(device_type, same, mesh_dim_names=("replicate", "shard"))
            else:
                self.weights_mesh = DeviceMesh(device_type, same[0], mesh_dim_names=("shard",))

    def apply(self, model: nn.Module, *, compute_type: torch.dtype) -> None:
        """Share the model out, in place: the sequence groups of its layers, then the shards of its weights.

        Args:
            model: on its device, with the same weights in every process; blocks may be compiled and recompute
                activations.
            compute_type: bfloat16: the linear layers of blocks are gathered in it, as autocast would round them, and
                gradients are added up in float32. All else stays as it is: an exponent of the length or a rate of
                decay takes no rounding, and neither does the stream between the blocks.

        Raises:
            TypeError: the model reads whole texts and windows are to be shared.
        """
        if self.layout.sequence > 1:
            shard_sequence(model, self.sequence_mesh)
        if not self.is_sharded:
            return
        as_they_are = MixedPrecisionPolicy(cast_forward_inputs=False)
        for block in blocks_of(model):
            if compute_type == torch.bfloat16:
                halves = MixedPrecisionPolicy(
                    param_dtype=compute_type, reduce_dtype=torch.float32, cast_forward_inputs=False
                )
                linear: list[nn.Module] = [module for module in block.modules() if isinstance(module, nn.Linear)]
                fully_shard(linear, mesh=self.weights_mesh, mp_policy=halves)
            fully_shard(block, mesh=self.weights_mesh, mp_policy=as_they_are)
        fully_shard(model, mesh=self.weights_mesh, mp_policy=as_they_are)

    @contextmanager
    def kept_back(self, model: nn.Module) -> Iterator[None]:
        """Around passes of a sharded model that others of the same step follow: copies are averaged behind the last.

        Shards are added up at each pass, so that no process ever holds the whole gradient.
        """
        assert isinstance(model, FSDPModule)
        model.set_requires_all_reduce(False)
        try:
            yield
        finally:
            model.set_requires_all_reduce(True)

    def slice_of(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """The part of a pass that this process computes: all of it, or its slice of every window with its counts."""
        return batch if self.layout.sequence == 1 else slice_batch(model, batch)

    def pass_of(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """`slice_of` without what an objective counts over the whole step."""
        return {name: part for name, part in self.slice_of(model, batch).items() if name not in _COUNTS}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of one of our models, which are compiled, computed twice and sharded one by one."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def unsharded_class(model: nn.Module) -> Any:
    """The class of a model, which FSDP2 derives another from."""
    return type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which processes hold parts, put together on each of them; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor, the same in every process, into one of which processes may hold parts; none is asked."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    target.detach().copy_(value)
