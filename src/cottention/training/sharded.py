"""Weights and optimizer states that many processes hold parts of, as files that any number of processes reads again.

Each process writes its own parts as safetensors, through torch.distributed.checkpoint; nothing is pickled. Where a part
lies in its tensor stands in the header of the file, so that others find what they need whatever their own parts are,
and one process puts the weights together (`cottention.models.shards`).

    saving.begin(state_tensors(model, optimizer), folder / SHARDS, group)
    saving.wait()
    read_shards(state_tensors(model, optimizer), folder / SHARDS)        # in place, on other processes
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from cottention.errors import CheckpointError
from cottention.files import one_line
from cottention.models.shards import WEIGHT
from cottention.training.checkpoints import writing_to
from cottention.training.parallel import put, whole

_STATE = "optimizer."
_MOMENTS = ("exp_avg", "exp_avg_sq")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, each once, by the first of its names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def whole_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Weights put together out of the parts of all processes, who all call this; with `keep`, on the CPU here."""
    weights = {}
    for name, tensor in weights_of(model).items():
        joined = whole(tensor.detach())
        if keep:
            weights[name] = joined.cpu()
    return weights


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
                state["step"] = torch.zeros(
                    (), dtype=torch.float32, device=parameter.device if group["fused"] else "cpu"
                )
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
        Done when all have written; an error of any is raised in each.
    """
    # Not every torch that trains unsharded has it.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    return cast(Future[Any], async_save(tensors, storage_writer=writer, process_group=group))


def read_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill tensors, whole ones or this process's parts, with what is in a folder.

    Raises:
        CheckpointError: it lacks a tensor, holds one of another shape, or is damaged.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            load(cast(dict[str, Any], tensors), storage_reader=HuggingFaceStorageReader(str(folder)))
        except CheckpointException as error:
            raise CheckpointError(f"{folder} is not of this model or damaged: {one_line(_cause(error))}") from error


def spread(saved: nn.Module, state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take up what one process, or copies of a model, saved whole, on processes that hold parts.

    Args:
        saved: a model with the weights.
        state: of its optimizer, by `state_dict`.
        model: that is trained.
        optimizer: of it, made by the same settings.
    """
    weights = weights_of(saved)
    for name, tensor in weights_of(model).items():
        put(tensor, weights[name])
    state_tensors(model, optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        for name, value in values.items():
            put(optimizer.state[parameters[index]][name], value)


def set_rates(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Give each group the rate of the next update, where no state of the optimizer itself was loaded."""
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


class Saving:
    """A checkpoint of which shards are on their way to the disk; at most one at a time."""

    def __init__(self) -> None:
        self._folder = Path()
        self._writing: Future[Any] | None = None
        self._ended: Future[None] | None = None

    def begin(self, tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup) -> None:
        """As `begin_writing`."""
        self._folder = folder
        self._writing = begin_writing(tensors, folder, group)

    def goes_on(self, ending: ExitStack) -> None:
        """Leave what ends a save (seal, rename, rotate) until all is written; nothing where no shards are."""
        if self._writing is None:
            return
        rest, ended = ending.pop_all(), Future[None]()

        def end(writing: Future[Any]) -> None:
            error = writing.exception()
            try:
                if rest.__exit__(type(error) if error else None, error, None) or error is None:
                    ended.set_result(None)
                else:
                    ended.set_exception(error)
            except BaseException as failure:  # noqa: BLE001 - told to whoever waits
                ended.set_exception(failure)

        self._writing.add_done_callback(end)
        self._writing, self._ended = None, ended

    def wait(self) -> None:
        """Go on when the last save has come to its end.

        Raises:
            CheckpointError: it could not be written; what was saved before is intact.
        """
        ended, self._ended = self._ended, None
        if ended is not None:
            with writing_to(self._folder):
                try:
                    ended.result()
                except CheckpointException as error:
                    raise _cause(error) from error


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong in the first process where something did."""
    return next(iter(error.failures.values()))[0]
