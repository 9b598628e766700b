"""Ways to change a published checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.convert import convert_official
from cottention.errors import CheckpointError

BIN = "pytorch_model.bin"


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """The weights in pytorch_model.bin."""
    return torch.load(directory / BIN, weights_only=True)


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Let `change` edit the weights in place, and store them again."""
    tensors = tensors_of(directory)
    change(tensors)
    torch.save(tensors, directory / BIN)


def change_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; a field set to `...` is removed."""
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def without_norm_const(tensors: dict[str, Tensor]) -> None:
    """Make a softmax checkpoint's weights."""
    for name in [name for name in tensors if name.endswith("norm_const")]:
        del tensors[name]


def shard(directory: Path, *, safetensors: bool) -> None:
    """Replace pytorch_model.bin by two shards and their index, as big checkpoints are stored."""
    from safetensors.torch import save_file

    tensors = tensors_of(directory)
    (directory / BIN).unlink()
    names = sorted(tensors)
    halves = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}
    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    weight_map = {}
    for number, half in halves.items():
        file_name = f"{stem}-{number:05d}-of-00002.{suffix}"
        part = {name: tensors[name] for name in half}
        if safetensors:
            save_file(part, directory / file_name)
        else:
            torch.save(part, directory / file_name)
        weight_map.update(dict.fromkeys(half, file_name))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


class RunsCode:
    """Unpickling this object creates the file `path`: what a malicious checkpoint could do, made harmless."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def message_of(source: Path, destination: Path, overwrite: bool = False) -> str:
    """The one line that refuses `source`; nothing may be left at or beside `destination`."""
    before = set(destination.parent.iterdir())
    with pytest.raises(CheckpointError) as refusal:
        convert_official(source, destination, overwrite=overwrite)
    message = str(refusal.value)
    assert "\n" not in message
    assert set(destination.parent.iterdir()) == before
    return message


def with_another_decoder(tensors: dict[str, Tensor]) -> None:
    """Let a BERT's decoder differ from its embeddings."""
    tensors["cls.predictions.decoder.weight"] = tensors["cls.predictions.decoder.weight"] + 1
