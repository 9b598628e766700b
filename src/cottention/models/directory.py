"""What a model directory may ask for: it may come from a stranger, and opening it must run and fetch nothing.

transformers acts on more of a config.json than a model's sizes: it downloads kernels by name, imports quantisation
libraries, reads weights and configs from files that are named there. None of it means anything to our models.

    check_config_file(Path("downloads/gpt"))
    check_weights(Path("downloads/gpt"), config)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cottention.errors import CheckpointError
from cottention.json_files import LARGEST_TABLE, kind_of, read_json_object
from cottention.logging import get_logger, log_once

_INDICES = ("*.safetensors.index.json", "*.bin.index.json")
_WEIGHTS = ("*.safetensors", "*.bin")
_SURELY_BUILT = 1 << 26  # numbers; any machine has memory for so many
# Our attention is chosen by attention_type and set_implementation; these names are looked up on the Hub.
_IGNORED = tuple(
    f"{prefix}{part}_implementation{suffix}"
    for part in ("attn", "experts")
    for prefix, suffix in (("", ""), ("_", ""), ("_", "_internal"), ("_", "_autoset"))
)
_REFUSED = {
    "quantization_config": "quantised weights",
    "compression_config": "quantised weights",
    "transformers_weights": "weights of another name",
    "configuration_files": "another config file",
    "fusion_config": "other modules",
    "per_layer_config": "layers of several kinds",
    "distributed_config": "several processes",
}

logger = get_logger(__name__)


def own_fields(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The fields of a config.json that our configs take.

    Args:
        config: what the file holds.
        source: where it was, for messages.

    Returns:
        The same without names of attention kernels, which are ignored, and said in the log.

    Raises:
        CheckpointError: it asks for something that our models do not have.
    """
    for name, what in _REFUSED.items():
        if config.get(name) is not None:
            raise CheckpointError(f"config.json of {source} asks for {what} ({name}), which our models do not have")
    if config.get("is_encoder_decoder"):
        raise CheckpointError(f"config.json of {source} asks for an encoder beside it, which our models do not have")
    for name in _IGNORED:
        if config.get(name) not in (None, "eager", "sdpa", True, False):
            log_once(logger, "config.json of %s: %s is ignored; our models have no such choice", source, name)
    return {name: value for name, value in config.items() if name not in _IGNORED and name not in _REFUSED}


def check_config_file(directory: Path) -> None:
    """Look at a config.json before transformers does.

    Raises:
        CheckpointError: it is no JSON object, or asks for something that our models do not have.
    """
    if not (directory / "config.json").exists():
        return
    try:
        config = read_json_object(directory / "config.json")
    except CheckpointError as error:
        reason = str(error).rpartition("config.json ")[2]
        raise CheckpointError(f"config.json of {directory} must be valid JSON; it is not: it {reason}") from error
    own_fields(config, directory)


def check_weights(directory: Path, config: Any) -> None:
    """Look at the files of weights before anything is built or read.

    Args:
        directory: with the weights.
        config: of the model that they are for, one of ours.

    Raises:
        CheckpointError: an index names files elsewhere; generation_config.json is no JSON object; or the files are
            too small for a model of these sizes.
    """
    if (directory / "generation_config.json").exists():  # transformers takes its fields whatever they are
        read_json_object(directory / "generation_config.json")
    for pattern in _INDICES:
        for index in sorted(directory.glob(pattern)):
            shards_of(index)
    least = config.least_parameters()
    if least <= _SURELY_BUILT:
        return  # where the shapes disagree, loading says which
    files = [path for pattern in _WEIGHTS for path in directory.glob(pattern) if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    if files and least > num_bytes:  # a number takes a byte at the least
        raise CheckpointError(
            f"config.json of {directory} describes a model of {least:,} numbers; its weights have {num_bytes:,} bytes"
        )


def shards_of(index: Path) -> dict[str, str]:
    """Read an index of weights.

    Returns:
        The name of the file in the same directory that holds each tensor.

    Raises:
        CheckpointError: it is damaged, or names a file that is not in its directory.
    """
    weight_map = read_json_object(index, limit=LARGEST_TABLE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is no index of shards: it must hold the object 'weight_map'")
    if strange := [value for value in weight_map.values() if not isinstance(value, str)]:
        raise CheckpointError(f"{index} is no index of shards: it names {kind_of(strange[0])} as a file")
    for name in dict.fromkeys(weight_map.values()):
        if not name or Path(name).name != name or not _stays_inside(index.parent / name):
            raise CheckpointError(f"{index.name} names a shard outside the directory: {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.name} names {name}, which is missing from {index.parent}")
    return weight_map


def _stays_inside(path: Path) -> bool:
    """Whether a file, followed through links, is in its folder, or among the blobs of a Hub cache's snapshot."""
    target, folder = path.resolve(), path.parent.resolve()
    return target.parent in (folder, folder.parent.parent / "blobs")
