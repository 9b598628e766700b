"""Weights and optimizer states that many processes hold parts of, as files that any number of processes reads again.

Each process writes its own parts as safetensors, through torch.distributed.checkpoint; nothing is pickled. Where a part
lies in its tensor stands in the header of the file, so that others find what they need whatever their own parts are, and
one process puts the weights together (`cottention.models.shards`).

    begin_writing(state_tensors(model, optimizer), folder / SHARDS, group).result()
    read_shards(state_tensors(model, optimizer), folder / SHARDS)        # in place, on other processes
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from cottention.errors import CheckpointError
from cottention.files import one_line
from cottention.models.shards import WEIGHT

_STATE = "optimizer."
_MOMENTS = ("exp_avg", "exp_avg_sq")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, each once, by the first of its names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that is to be saved, by name: weights, and the state that AdamW has for each.

    Where the optimizer has no state yet, it is given zeros, for `read_shards` to write into.
    """
    weights = weights_of(model)
    tensors = {f"{WEIGHT}{name}": tensor.detach() for name, tensor in weights.items()}
    names = {tensor: name for name, tensor in weights.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                device = parameter.device if group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.get_default_dtype(), device=device)
                state |= {name: torch.zeros_like(parameter, requires_grad=False) for name in _MOMENTS}
            tensors |= {f"{_STATE}{names[parameter]}.{name}": value for name, value in state.items()}
    return tensors


def begin_writing(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup) -> Future[Any]:
    """Copy what this process holds and write it while training goes on; all processes call this together.

    Args:
        tensors: of `state_tensors`.
        folder: the same for all, to be made.
        group: a gloo group of all processes that nothing else uses meanwhile.

    Returns:
        Done in the first process when all have written; an error of any is raised in each.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    return cast(Future[Any], dcp.async_save(tensors, storage_writer=writer, process_group=group))


def read_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors, whole ones or this process's parts, with what is in a folder.

    Raises:
        CheckpointError: it lacks a tensor, holds one of another shape, or is damaged.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            dcp.load(cast(dict[str, Any], tensors), storage_reader=HuggingFaceStorageReader(str(folder)))
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            raise CheckpointError(f"{folder} is not of this model or damaged: {one_line(first)}") from error
