"""The processes that train together, and what they tell each other.

torchrun starts them, TrainingArguments joins them (gloo on CPUs, NCCL on GPUs). Each has a copy of the model and its
own micro batches of a step, or shares them with others (`parallel.py`); gradients are averaged once a step. One process
alone exchanges nothing.

    processes = Processes.joined(arguments)
    wrapped = processes.wrap(model, leaves_parameters_unused=False)
    with processes.exchange(wrapped, now=is_last):
        loss.backward()
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from cottention.training.parallel import Parallel
from cottention.training.recipe_sections import ParallelismSettings


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Who trains, and which of them this one is."""

    device: torch.device
    """Where this process computes."""
    process_index: int = 0
    """Its number."""
    num_processes: int = 1
    """How many there are."""
    parallel: Parallel = field(default_factory=Parallel)
    """What they share out."""

    @classmethod
    def joined(cls, arguments: TrainingArguments, parallelism: ParallelismSettings | None = None) -> Processes:
        """Those that were started together; asking the arguments for their number has joined them.

        Args:
            arguments: name the device.
            parallelism: what the processes share out; None: examples alone.

        Raises:
            SettingsError: they are too many or too few for it.
        """
        num_processes = max(1, arguments.world_size)
        layout = (parallelism or ParallelismSettings()).layout(num_processes)
        return cls(
            device=arguments.device,
            process_index=arguments.process_index,
            num_processes=num_processes,
            parallel=Parallel(layout, arguments.device.type),
        )

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and lines."""
        return self.process_index == 0

    @property
    def num_readers(self) -> int:
        """How many of them, or groups of them, read examples of their own."""
        return self.parallel.layout.num_readers

    @property
    def reader(self) -> int:
        """Which of these this one is, or belongs to."""
        return self.parallel.reader

    def wrap(self, model: nn.Module, *, leaves_parameters_unused: bool) -> nn.Module:
        """The model as the loop calls it: backward through it averages the gradients over all processes.

        Args:
            model: on the device, the same weights in every process afterwards.
            leaves_parameters_unused: some get no gradient; looking for them costs time at each step.
        """
        if self.num_processes == 1 or self.parallel.is_sharded:
            return model
        return DistributedDataParallel(
            model,
            device_ids=None if self.device.type == "cpu" else [self.device],
            find_unused_parameters=leaves_parameters_unused,
        )

    def exchange(self, wrapped: nn.Module, *, now: bool) -> AbstractContextManager[Any]:
        """Around a forward and a backward pass: whether gradients are averaged behind it, or kept for a later one."""
        if now or self.num_processes == 1:
            return nullcontext()
        if self.parallel.is_sharded:
            return self.parallel.kept_back(wrapped)
        return cast(DistributedDataParallel, wrapped).no_sync()

    def reduce(self, tensor: Tensor, how: str = "sum") -> Tensor:
        """The sum, or the "mean", of all processes' tensors."""
        if self.num_processes == 1:
            return tensor
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total / self.num_processes if how == "mean" else total

    def gather(self, tensor: Tensor) -> Tensor:
        """All processes' tensors `[N, ...]`, joined along the first dimension."""
        if self.num_processes == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.num_processes)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def wait_for_everyone(self) -> None:
        """Go on when all have come here."""
        if self.num_processes > 1:
            torch.distributed.barrier()


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device, however deep they lie in dictionaries and lists."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(part, device) for name, part in batch.items()}
    return [to_device(part, device) for part in batch] if isinstance(batch, list) else batch
