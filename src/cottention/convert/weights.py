"""Reads the tensors of a published checkpoint, from safetensors or from a pickled .bin, without running any code.

A .bin file is opened with torch's restricted unpickler alone: a file that names anything but tensors is refused with
that name. Big files are mapped into memory, not copied; a .bin's stored checksums are verified first, because a mapped
file is otherwise read without looking at them.

    weights = read_weights(Path("Cosine_Attention_BERT"))
    weights.tensors["bert.pooler.dense.bias"], weights.files
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cottention.convert.pickles import check_archive, check_legacy
from cottention.data.opening import check_regular
from cottention.errors import CheckpointError, CottentionError
from cottention.files import one_line
from cottention.models.directory import shards_of

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names that hold all tensors, best first; a sharded checkpoint has NAME.index.json instead."""

# What the unpickler and the zip reader raise on damaged bytes (found by flipping and cutting bytes of real files).
_DAMAGE = (
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of one checkpoint."""

    tensors: dict[str, Tensor]
    """Every tensor by its published name, on the CPU, in the stored dtype."""
    files: tuple[str, ...]
    """File names that were read."""


def read_weights(directory: Path) -> Weights:
    """Read model.safetensors or pytorch_model.bin, whole or sharded; safetensors first where both are there.

    Raises:
        CheckpointError: no weights, a missing shard, a damaged file, or pickled code.
    """
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return Weights(tensors=_read_file(directory / name), files=(name,))
        if (directory / f"{name}.index.json").is_file():
            return _read_shards(directory, f"{name}.index.json")
    raise CheckpointError(f"{directory} has no weights: expected {' or '.join(WEIGHT_FILES)}, or an index of shards")


def load_pickle_of_primitives(path: Path) -> Any:
    """Unpickle a torch file that may hold tensors and primitives only.

    Raises:
        CheckpointError: the file is damaged, or names code to run.
    """
    try:
        check_regular(path)
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            check_archive(path)
            _verify_checksums(path)
        else:
            check_legacy(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols that the restricted unpickler knows in part
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CottentionError:
        raise
    except pickle.UnpicklingError as error:
        raise _explained(path, error) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{path} cannot be read, it is damaged or cut short: {one_line(error)}") from error


def _read_shards(directory: Path, index_name: str) -> Weights:
    wanted = shards_of(directory / index_name)
    tensors: dict[str, Tensor] = {}
    shard_names = sorted(set(wanted.values()))
    for shard_name in shard_names:
        tensors.update(_read_file(directory / shard_name))
    disagreeing = sorted(tensors.keys() ^ wanted.keys())
    if disagreeing:
        raise CheckpointError(f"{index_name} and its shards disagree about {listed(disagreeing)}")
    return Weights(tensors=tensors, files=(index_name, *shard_names))


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be read, it is damaged or cut short: {one_line(error)}") from error

    state = load_pickle_of_primitives(path)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds no dictionary of tensors but {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path} holds no dictionary of tensors: {key!r} is {type(value).__name__}")
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(f"{path} holds {key} as a sparse or quantised tensor; expected a plain one")
        if value.is_nested or value.is_meta or value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path} holds less of {key} than its shape {tuple(value.shape)} has")
    return {key: value.detach() for key, value in state.items()}


def _verify_checksums(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        # Writers may leave the checksums out (all zero); then there is nothing to verify.
        if any(entry.CRC for entry in archive.infolist()) and (damaged := archive.testzip()):
            raise zipfile.BadZipFile(f"checksum of {damaged} does not match")


def _explained(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """Tell a file that names code from one whose bytes are merely broken."""
    named = re.search(r"(?:GLOBAL|global:? )\s*([\w.]+)", str(error))
    if named:
        return CheckpointError(f"{path} contains pickled code ({named.group(1)}), which could run anything: refused")
    return CheckpointError(f"{path} is damaged, or contains pickled code: refused")


def listed(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
