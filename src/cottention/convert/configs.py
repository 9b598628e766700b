"""Translates a config.json that names a stock class into the fields of our own configs.

Such a file does not say which attention a model shall have; the caller knows that. Only fields that change the function
are taken over, under their stock names, which ours share; the rest is named in the report.

    translated = translate_config(directory, {"bert": ("BertForPreTraining",)})
    config = CottentionBertConfig(**translated.fields, attention_type="cosine")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cottention.convert.weights import load_pickle_of_primitives
from cottention.errors import CheckpointError
from cottention.json_files import read_json_object
from cottention.models import CottentionBertConfig, CottentionGPTConfig
from cottention.models.layer_types import LAYER_TYPES, is_uniform

Architecture = Literal["bert", "gpt"]
AttentionType = Literal["cosine", "softmax"]

_ARCHITECTURES: dict[str, Architecture] = {
    "bert": "bert",
    "gptj": "gpt",
    "cottention-bert": "bert",
    "cottention-gpt": "gpt",
}

_OUR_CONFIGS: dict[Architecture, Any] = {"bert": CottentionBertConfig, "gpt": CottentionGPTConfig}

# Without these the model would silently be another one, so they have no default here.
_SIZES: dict[Architecture, tuple[str, ...]] = {
    "bert": (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    ),
    "gpt": ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"),
}
_OTHERS: dict[Architecture, tuple[str, ...]] = {
    "bert": (
        "type_vocab_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "layer_norm_eps",
        "initializer_range",
        "classifier_dropout",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
    ),
    "gpt": (
        "n_inner",
        "rotary_dim",
        "activation_function",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "layer_norm_epsilon",
        "initializer_range",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
    ),
}
# Fields that choose another function than ours when they have another value than this.
_FIXED: dict[Architecture, dict[str, Any]] = {
    "bert": {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "sliding_window": None,
    },
    "gpt": {"rotary": True, "scale_attn_weights": True, "sliding_window": None},
}
# Options that do nothing in a softmax layer, so that a softmax source says nothing by them.
_OF_COSINE_ALONE = {"decay", "erase", "divisor"}
# What a config says about itself, and what the conversion decides anew.
_SETTLED = {"model_type", "architectures", "attention_type", "norm_const_init", "original_init"}


@dataclass(frozen=True, kw_only=True)
class TranslatedConfig:
    """What a config.json means for our models."""

    architecture: Architecture
    """bert or gpt."""
    fields: dict[str, Any]
    """Keyword arguments for our config class, without attention_type."""
    left_out: tuple[str, ...]
    """Names in config.json that have no meaning here."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The two things that config.pt, the training settings of the original code, says about a model."""

    attention_type: AttentionType | None
    """None where the file does not say."""
    step: int | None
    """Optimiser updates done."""


def translate_config(directory: Path, classes: Mapping[str, tuple[str, ...]]) -> TranslatedConfig:
    """Read config.json and keep the fields that our configs know.

    Args:
        directory: where it is.
        classes: model classes that the caller can convert, by model_type; a file that names none holds the first.

    Raises:
        CheckpointError: no config.json, damaged, of another class, or a size is missing.
    """
    path = directory / "config.json"
    published = read_json_object(path)
    model_type: Any = published.get("model_type")
    if not isinstance(model_type, str) or model_type not in classes:
        hint = " (it is one of ours already)" if str(model_type).startswith("cottention-") else ""
        raise CheckpointError(f"{path}: model_type must be {' or '.join(classes)}; got {model_type!r}{hint}")
    architecture, known = _ARCHITECTURES[model_type], classes[model_type]
    named = published.get("architectures") or [known[0]]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in known:
        expected = " or ".join(f"[{name!r}]" for name in known)
        raise CheckpointError(f"{path}: architectures must be {expected}; got {named!r}")

    missing = [name for name in _SIZES[architecture] if not isinstance(published.get(name), int)]
    if missing:
        raise CheckpointError(f"{path} lacks a whole number for {', '.join(missing)}")
    kept: tuple[str, ...] = (*_SIZES[architecture], *_OTHERS[architecture])
    settled = set(_SETTLED)
    layer_types = published.get("layer_types")
    if model_type.startswith("cottention-"):
        kept += tuple(name for name in _OUR_CONFIGS[architecture].later_options if name not in _OF_COSINE_ALONE)
        kept += () if is_uniform(layer_types) else ("layer_types",)
        settled.add("layer_types")
    else:
        _check_stock(path, published, architecture)
    fields = {name: published[name] for name in kept if name in published}
    left_out = sorted(published.keys() - fields.keys() - settled)
    return TranslatedConfig(architecture=architecture, fields=fields, left_out=tuple(left_out))


def _check_stock(path: Path, published: Mapping[str, Any], architecture: Architecture) -> None:
    """Refuse what chooses another function than that of the stock class."""
    for name, value in _FIXED[architecture].items():
        if published.get(name, value) != value:
            raise CheckpointError(f"{path}: {name} must be {value!r}; got {published[name]!r}")
    layer_types = published.get("layer_types")
    if layer_types is not None and not (is_uniform(layer_types) and LAYER_TYPES["softmax"] in layer_types):
        raise CheckpointError(
            f"{path}: layer_types must be {LAYER_TYPES['softmax']!r} for each layer of a {published['model_type']} "
            "model; got others"
        )


def read_training_settings(path: Path) -> TrainingSettings:
    """Read config.pt.

    Raises:
        CheckpointError: the file is damaged, contains pickled code, or holds something else.
    """
    settings = load_pickle_of_primitives(path)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no settings but {type(settings).__name__}")
    attention = str(settings.get("attention_type", "")).lower()
    attention_type: AttentionType | None = (
        "cosine" if attention.startswith("cos") else "softmax" if attention.startswith("soft") else None
    )
    step = settings.get("step_ckpt")
    return TrainingSettings(attention_type=attention_type, step=step if isinstance(step, int) else None)
