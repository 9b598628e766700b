"""Which attention each layer has, by transformers' names: all the same, or a mix that makes a hybrid.

A list that says no more than `attention_type` does is not kept: it follows from it, and an edited `attention_type` is
judged by the weights. Any other list is a setting of its own. `attention_type` then says whether there is any cosine
attention in the model: "cosine" where the list has linear_attention, "softmax" where it has none.

    check_layer_types(["linear_attention", "full_attention"], "cosine", 2, None, known=GPT_LAYER_TYPES)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cottention.errors import SettingsError, did_you_mean

# With transformers' names for what each layer keeps: a recurrent state, every key, or the keys of a window.
LAYER_TYPES = {"cosine": "linear_attention", "softmax": "full_attention"}
SLIDING = "sliding_attention"
BERT_LAYER_TYPES = tuple(LAYER_TYPES.values())
GPT_LAYER_TYPES = (*BERT_LAYER_TYPES, SLIDING)
TYPE_WORDS = {
    LAYER_TYPES["cosine"]: "cosine",
    LAYER_TYPES["softmax"]: "softmax",
    SLIDING: "sliding-window softmax",
}
"""What people read in place of those names."""
_LONGEST_NAME = 40


def uniform(attention_type: str, num_layers: int) -> list[str]:
    """The list that follows from `attention_type`."""
    return [LAYER_TYPES[attention_type]] * num_layers


def every_nth_softmax(num_layers: int, every: int) -> list[str]:
    """A hybrid: cosine layers, and softmax in the last of every so many."""
    names = LAYER_TYPES["softmax"], LAYER_TYPES["cosine"]
    return [names[0] if number % every == 0 else names[1] for number in range(1, num_layers + 1)]


def is_uniform(layer_types: Any) -> bool:
    """Whether a list may have followed from an `attention_type`."""
    return isinstance(layer_types, list) and any(
        layer_types == [name] * len(layer_types) for name in LAYER_TYPES.values()
    )


def check_layer_types(
    given: Any, attention_type: str, num_layers: int, sliding_window: int | None, *, known: Sequence[str]
) -> None:
    """Refuse a list that no model can be built by.

    Args:
        given: what is to be one name for each layer.
        attention_type: "cosine" or "softmax".
        num_layers: layers of the model.
        sliding_window: tokens that a layer of sliding_attention sees; None: no such layer is meant.
        known: names that this kind of model has.

    Raises:
        SettingsError: it is no list of so many known names, contradicts `attention_type`, or lacks its window.
    """
    own = LAYER_TYPES[attention_type]
    rule = f"layer_types must be {own!r} for each of {num_layers} layers with attention_type={attention_type!r}, or"
    if not isinstance(given, (list, tuple)):
        raise SettingsError(f"{rule} a list of so many names; got {_shown(given)}")
    if len(given) != num_layers:
        raise SettingsError(f"{rule} a list of so many names; got {len(given)}")
    for name in given:
        if not isinstance(name, str) or name not in known:
            hint = did_you_mean(name, known) if isinstance(name, str) and len(name) <= _LONGEST_NAME else ""
            raise SettingsError(f"{rule} one of {', '.join(known)} for each; got {_shown(name)}{hint}")
    if attention_type == "cosine" and own not in given:
        raise SettingsError(f"{rule} others beside it (attention_type='softmax' has none); got no {own!r}")
    if attention_type == "softmax" and LAYER_TYPES["cosine"] in given:
        raise SettingsError(f"{rule} {SLIDING!r} (attention_type='cosine' mixes); got {LAYER_TYPES['cosine']!r}")
    if SLIDING in given and sliding_window is None:
        raise SettingsError(f"{rule} {SLIDING!r} beside a sliding_window, its number of tokens; got no sliding_window")


def check_carries(layer_types: Sequence[str]) -> None:
    """Refuse layers whose states cannot go from window to window in training.

    Raises:
        SettingsError: a layer keeps keys.
    """
    if keeping := [name for name in layer_types if name != LAYER_TYPES["cosine"]]:
        raise SettingsError(
            f"data.carry_state needs layers of linear_attention alone, whose state has a constant size; "
            f"got {keeping[0]} in layer_types"
        )


def _shown(given: Any) -> str:
    text = repr(given) if isinstance(given, (str, int, float, bool, type(None))) else type(given).__name__
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
