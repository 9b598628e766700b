"""Puts stored tensors into one of our models, with names and shapes checked both ways.

attention_type = detect_attention_type(tensors)
built = build_model(translated, attention_type, tensors, CottentionBertForPreTraining)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from cottention import models
from cottention.convert.configs import Architecture, AttentionType, TranslatedConfig
from cottention.convert.report import LeftOut
from cottention.convert.weights import listed
from cottention.errors import CheckpointError
from cottention.files import one_line

# Constants that older versions of the stock classes stored among the weights.
_CONSTANT_BUFFERS = re.compile(
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)|bert\.embeddings\.(position_ids|token_type_ids)"
)
# Two names for one tensor of a tied model; stored files hold either or both.
_TIED_NAMES: dict[Architecture, dict[str, str]] = {
    "bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "gpt": {"lm_head.weight": "transformer.wte.weight"},
}


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A model that holds stored tensors."""

    model: PreTrainedModel
    """In evaluation mode, each tensor in the type that it was stored in."""
    left_out: tuple[LeftOut, ...]
    """Tensors that were not taken over."""
    new: tuple[str, ...]
    """Tensors that were not stored and had to be made."""


def detect_attention_type(tensors: dict[str, Tensor]) -> AttentionType:
    """Cosine where any layer has a norm_const; that a layer lacks its own is for the name check to say."""
    return "cosine" if any(name.endswith(".norm_const") for name in tensors) else "softmax"


def build_model(
    translated: TranslatedConfig,
    attention_type: AttentionType,
    tensors: dict[str, Tensor],
    model_class: type[PreTrainedModel],
    *,
    heads: Sequence[str] = (),
    seed: int = 0,
) -> BuiltModel:
    """Make our model hold these tensors, in the types that they have.

    Args:
        translated: what config.json means.
        attention_type: of the model.
        tensors: by the names that our model gives them.
        model_class: the class to build.
        heads: beginnings of names; a head of which nothing is stored is initialised, where every other gap is an error.
        seed: of that initialisation.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape, or the config makes no model.
    """
    config_class: Any = model_class.config_class
    try:
        config = config_class(**translated.fields, attention_type=attention_type)
        num_stored = sum(tensor.numel() for tensor in tensors.values())
        if config.least_parameters() > num_stored:  # found before anything of its sizes is built
            raise CheckpointError(
                f"config.json describes a model of {config.least_parameters():,} numbers; {num_stored:,} are stored"
            )
        # Memory for the parameters comes with the tensors; a second copy of 5 GB would be made only to be dropped.
        with torch.device("meta"):
            model = model_class(config)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json makes no {config_class.__name__}: {one_line(error)}") from error

    constants = [name for name in sorted(tensors) if _CONSTANT_BUFFERS.fullmatch(name)]
    state = {name: tensor for name, tensor in tensors.items() if name not in constants}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    aliases = _TIED_NAMES[translated.architecture]
    tied = bool(config.tie_word_embeddings)
    shapes = {name: shape for name, shape in wanted.items() if not (tied and name in aliases)}
    new = _new_tensors(state, shapes, heads, std=config.initializer_range, seed=seed)
    state = _with_tied_names({**state, **new}, wanted, aliases, tied=tied)
    _check_names_and_shapes(state, wanted)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.eval()
    left_out = tuple(LeftOut(name=name, reason="a constant, computed when needed") for name in constants)
    return BuiltModel(model=model, left_out=left_out, new=tuple(new))


def settle_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, attention_type: AttentionType
) -> None:
    """Make config, generation config and tokenizer agree on special tokens and on the longest text.

    Raises:
        CheckpointError: config.json and the tokenizer name different tokens.
    """
    config = model.config
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            recorded, actual = getattr(config, name, None), getattr(tokenizer, name)
            if recorded is None:
                setattr(config, name, actual)
            elif actual is not None and recorded != actual:
                raise CheckpointError(f"config.json says {name} is {recorded}, the tokenizer says {actual}")
        if isinstance(config, models.CottentionBertConfig):
            tokenizer.model_max_length = config.max_position_embeddings
        else:
            # A recurrent state has no longest text.
            tokenizer.model_max_length = config.n_positions if attention_type == "softmax" else int(1e30)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_model_config(config)


def _new_tensors(
    state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], heads: Sequence[str], *, std: float, seed: int
) -> dict[str, Tensor]:
    """Tensors of the heads of which nothing is stored, initialised as our models do it, in the type of the stored."""
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(seed)
    absent = tuple(head for head in heads if not any(name.startswith(head) for name in state))
    new: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if not name.startswith(absent):
            continue
        if name.endswith("bias"):
            new[name] = torch.zeros(shape, dtype=dtype)
        elif "LayerNorm" in name:
            new[name] = torch.ones(shape, dtype=dtype)
        else:
            new[name] = (torch.randn(shape, generator=generator) * std).to(dtype)
    return new


def _with_tied_names(
    state: dict[str, Tensor], wanted: dict[str, tuple[int, ...]], aliases: dict[str, str], *, tied: bool
) -> dict[str, Tensor]:
    """Give a tied tensor exactly the names that our model knows, after checking that both names hold the same."""
    state = dict(state)
    for alias, name in aliases.items():
        if alias.endswith(".weight") and not tied:
            continue
        if alias in state and name in state and not same_bits(state[alias], state[name]):
            raise CheckpointError(f"{alias} and {name} must be the same tensor in this model, but their values differ")
        present = state.get(name, state.get(alias))
        for either in (alias, name):
            state.pop(either, None)
            if present is not None and either in wanted:
                # An untied model has two biases; as one memory under two names, only one of them would be saved.
                state[either] = present if tied else present.clone()
    return state


def _check_names_and_shapes(state: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    shapes = [
        f"{name} is {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    kinds = [f"{name} is {tensor.dtype}" for name, tensor in state.items() if not tensor.is_floating_point()]
    complaints = [
        f"{what}: {listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", shapes),
            ("not a floating-point tensor", kinds),
        )
        if names
    ]
    if complaints:
        raise CheckpointError(f"the weights do not fit config.json; {'; '.join(complaints)}")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and bits; unlike ==, a NaN equals itself here."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
