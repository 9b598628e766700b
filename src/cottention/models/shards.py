"""Weights in parts, as training on several processes saves them: a folder of safetensors beside a config.json.

A tensor's parts lie in several files; the header of each says where its part begins in the whole, under the name that
torch.distributed.checkpoint gives it. What else the files hold (states of an optimizer) is left where it is.

    weights = join_shards(folder / SHARDS)                # {"transformer.wte.weight": ...}

Source: the format of torch.distributed.checkpoint.HuggingFaceStorageWriter with save_distributed=True.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cottention.errors import CheckpointError
from cottention.files import one_line

WEIGHT = "model."
"""What the names of weights begin with in it."""

_WHERE = "DCP_SHARDING_INFO"


def join_shards(folder: Path) -> dict[str, Tensor]:
    """Every weight, whole, under its name in the model.

    Raises:
        CheckpointError: a file is damaged or missing, or parts do not make up a tensor.
    """
    parts: dict[str, list[tuple[list[int], Tensor]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                where = json.loads((file.metadata() or {})[_WHERE])
                for name in file.keys():  # noqa: SIM118 - no mapping
                    if name.startswith(WEIGHT):
                        begins = [int(number) for number in where[name]["saved_offsets"]]
                        parts.setdefault(name.removeprefix(WEIGHT), []).append((begins, file.get_tensor(name)))
        except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{path} is no part of sharded weights: {one_line(error)}") from error
    if not parts:
        raise CheckpointError(f"{folder} holds no sharded weights")
    return {name: _joined(found, folder / name) for name, found in parts.items()}


def _joined(parts: list[tuple[list[int], Tensor]], where: Any) -> Tensor:
    ends = [[begin + size for begin, size in zip(begins, part.shape, strict=True)] for begins, part in parts]
    whole = torch.empty([max(column) for column in zip(*ends, strict=True)], dtype=parts[0][1].dtype)
    if sum(part.numel() for _, part in parts) != whole.numel() or any(
        min(begins, default=0) < 0 for begins, _ in parts
    ):
        raise CheckpointError(f"the parts of {where} do not make it up; a file may be missing")
    for begins, part in parts:
        whole[tuple(slice(begin, begin + size) for begin, size in zip(begins, part.shape, strict=True))] = part
    return whole
