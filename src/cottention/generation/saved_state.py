"""A text that was read, as a file: read a long document once, ask about it many times.

The file is safetensors: each layer's state and count, the last tokens, which tokens occurred, and in its metadata what
made it. A state means nothing to another model, even one of the same shape, so config, weights (a sample of every
tensor) and tokenizer are fingerprinted and compared; a hash of the content tells damage. Softmax models are refused:
their keys and values grow with the text, and reading it again is what they are for. A hybrid's file holds its states
beside the keys and values of its softmax layers, those of a window or all.

    state = read_text(model, tokenizer, document)
    save_state("document.state", state, model, tokenizer)
    state = load_state("document.state", model, tokenizer)
    generate_text(model, tokenizer, ["Who?", "When?"], state=state)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.errors import CheckpointError, SettingsError
from cottention.files import one_line, written_file
from cottention.generation.encoding import encode
from cottention.generation.reading import TAIL, ReadState, read_one
from cottention.models import CosineCache
from cottention.models.configuration import check_vocabulary

_FORMAT = "cottention-state-2"
_FORMAT_UNSEALED = "cottention-state-1"
_NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path", "dtype", "architectures", "use_cache")
_SAMPLED = 64  # numbers of each weight tensor


def read_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    state: ReadState | None = None,
    prefill_chunk: int = 2048,
) -> ReadState:
    """Read a text, of any length, in constant memory.

    Args:
        model: a cosine or hybrid CottentionGPTForCausalLM.
        tokenizer: the model's own.
        text: what to read.
        state: of what was read before, which the text goes on from.
        prefill_chunk: tokens read at a time.

    Raises:
        SettingsError: the model is a softmax model, the text is empty, or the tokenizer is not the model's.
        DataError: it is no text.
    """
    check_state_support(model)
    check_vocabulary(tokenizer, model.config)
    if prefill_chunk < 1:
        raise SettingsError(f"prefill_chunk must be at least 1; got {prefill_chunk}")
    token_ids = encode(tokenizer, text, "the prompt", add_special_tokens=state is None)
    if not len(token_ids):
        raise SettingsError("there is nothing to read: the prompt is empty")
    with torch.inference_mode():
        return read_one(model, token_ids, chunk=prefill_chunk, start=state)


def check_state_support(model: PreTrainedModel) -> None:
    """Refuse a model without any state of fixed size.

    Raises:
        SettingsError: it is a softmax model.
    """
    attention_type = getattr(model.config, "attention_type", "softmax")
    if not getattr(model.config, "keeps_states", False):
        raise SettingsError(
            f"a state to save or load needs a cosine model, whose state has one size; got {attention_type}"
        )


def save_state(path: str | Path, state: ReadState, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a state; under its name only when it is whole.

    Args:
        path: the file; one that is there is replaced.
        state: what `read_text` returned.
        model: the model that read.
        tokenizer: the tokenizer that the text went through.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors = {
        **state.cache.to_tensors(),
        "tail": torch.tensor(state.tail),
        "occurred": state.occurred,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _FORMAT, "num_tokens": str(state.num_tokens), **_fingerprints(model, tokenizer)}
    metadata["content_sha256"] = _content_hash(tensors, metadata)
    try:
        with written_file(Path(path).expanduser()) as file:
            file.write(save(tensors, metadata=metadata))
    except OSError as error:
        raise CheckpointError(f"cannot write the state {path}: {one_line(error)}") from error


def load_state(path: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ReadState:
    """Read a state back, onto the model's device.

    Args:
        path: a file of `save_state`.
        model: the model that wrote it.
        tokenizer: its tokenizer.

    Raises:
        CheckpointError: the file is missing, damaged, no state, or of another model or tokenizer.
        SettingsError: the model is a softmax model.
    """
    check_state_support(model)
    try:
        with safe_open(Path(path).expanduser(), framework="pt") as file:  # pyright: ignore[reportArgumentType]
            metadata = file.metadata() or {}
            if metadata.get("format") not in (_FORMAT, _FORMAT_UNSEALED):
                raise CheckpointError(f"{path} is not a saved state (its format is not {_FORMAT!r})")
            for name, fingerprint in _fingerprints(model, tokenizer).items():
                if metadata.get(name) != fingerprint:
                    raise CheckpointError(f"{path} is the state of another model: {_WHAT_DIFFERS[name]}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        _check_shapes(tensors, model, path)
        sealed = metadata.pop("content_sha256", None)
        if metadata["format"] == _FORMAT and sealed != _content_hash(tensors, metadata):
            raise CheckpointError(
                f"the state {path} is damaged: it was changed after it was written; read the text again"
            )
        tail, occurred = tensors.pop("tail"), tensors.pop("occurred")
        return ReadState(
            cache=CosineCache.from_tensors({name: tensor.to(model.device) for name, tensor in tensors.items()}),
            tail=tuple(tail.tolist()),
            occurred=occurred.to(model.device),
            num_tokens=int(metadata["num_tokens"]),
        )
    except CheckpointError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"the state {path} cannot be read: {one_line(error)}") from error


_WHAT_DIFFERS = {
    "config_sha256": "its config differs from this model's",
    "weights_sha256": "its weights differ from this model's",
    "tokenizer_sha256": "its tokenizer differs from this model's",
}


def _fingerprints(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    described = json.loads(backend.to_str())
    described.update(truncation=None, padding=None)  # which earlier calls leave behind
    weights = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(len(flat) // _SAMPLED, 1)].cpu().to(torch.float64)
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + sample.numpy().tobytes())
    return {
        "config_sha256": _hash_of(config),
        "weights_sha256": weights.hexdigest(),
        "tokenizer_sha256": _hash_of(described),
    }


def _content_hash(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.clone(memory_format=torch.contiguous_format).flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hash_of(described: Any) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def _check_shapes(tensors: dict[str, Tensor], model: PreTrainedModel, path: str | Path) -> None:
    """Refuse what no `save_state` wrote; a wrong shape would only show deep inside the model."""
    body: Any = model.base_model
    expected: dict[str, tuple[int, ...]] = {
        "num_tokens": (),
        "next_position": (1,),
        "occurred": (model.config.vocab_size,),
    }
    for i, block in enumerate(body.h):
        for name, part in block.attn.empty_state(1)._asdict().items():
            if part is None:
                continue
            key, shape = f"layers.{i}.{name}", tuple(part.shape)
            if name in ("k", "v", "real") and key in tensors:
                # Of keys there may be any number, but those of a window are fewer than it has tokens.
                num_keys = tensors[f"layers.{i}.real"].numel() if f"layers.{i}.real" in tensors else -1
                window = block.attn.sliding_window
                shape = (1, num_keys if window is None or num_keys < window else -1, *shape[2:])
            expected[key] = shape
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name != "tail"}
    tail = tensors.get("tail")
    if found != expected or tail is None or tail.dim() != 1 or not 1 <= len(tail) <= TAIL:
        raise CheckpointError(f"the state {path} is damaged: its tensors are not those of a state of this model")
