"""Which cache a GPT decodes from, and one line for any other.

check_cache(past_key_values, model.config)
"""

from __future__ import annotations

from transformers.cache_utils import Cache

from cottention.layers import AttentionState
from cottention.models.cache import STATES, CosineCache
from cottention.models.gpt.configuration_gpt import CottentionGPTConfig


def check_cache(past: Cache | None, config: CottentionGPTConfig) -> None:
    """Refuse a cache for other attention, or of another depth.

    Raises:
        ValueError: the model cannot go on from it.
    """
    if past is None:
        return
    if config.keeps_states != isinstance(past, CosineCache):
        expected = "a CosineCache" if config.keeps_states else "a DynamicCache"
        mixed = len(set(config.layer_types)) > 1
        kind = "a mix of layer_types" if mixed else f"attention_type={config.attention_type!r}"
        kind += f" with short_conv={config.short_conv}" if config.short_conv else ""
        raise ValueError(f"past_key_values must be {expected} for {kind}; got {type(past).__name__}")
    if past.is_compileable:
        raise ValueError(f"past_key_values must hold the tokens so far and no more; got {type(past).__name__}")
    if not isinstance(past, CosineCache):
        return
    if len(past) != config.n_layer:
        raise ValueError(f"past_key_values must have {config.n_layer} layers; got {len(past)}")
    for i, (name, state) in enumerate(zip(config.layer_types, past.states, strict=True)):
        kind = AttentionState if config.short_conv and name == "linear_attention" else STATES[name]
        if state is not None and not isinstance(state, kind):
            convolved = f" with short_conv={config.short_conv}" if config.short_conv else ""
            raise ValueError(
                f"layer {i} of past_key_values must hold a {kind.__name__}, as it is {name}{convolved}; "
                f"got {type(state).__name__}"
            )


def what_caches(config: CottentionGPTConfig) -> str:
    """What is special about the model's cache, for messages."""
    if config.short_conv:
        return f"short_conv={config.short_conv}, whose cache holds what the convolutions read"
    if config.keeps_every_key:
        return "a hybrid, whose cache holds states beside keys"
    return f"attention_type={config.attention_type!r}, whose cache has a constant size"
