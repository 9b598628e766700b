"""Arguments that transformers' own code and its clients hand to every forward, read or refused at the models' boundary.

An operation is strict: a mask is bool or int. A model takes what stock models take: float masks of 0 and 1 (PEFT's
prompts), and the library's words for what a model has not, as long as they ask for nothing.

    attention_mask = zeros_and_ones(attention_mask)
    settings = known_arguments(kwargs, ("num_items_in_batch",), "CottentionBertModel.forward", ENCODER_WORDS)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cottention.errors import did_you_mean

# Words that clients pass to whatever model they have, with the values that ask for nothing of ours.
_BOTH: dict[str, tuple[Any, ...]] = {
    "encoder_hidden_states": (None,),
    "encoder_attention_mask": (None,),
    "output_router_logits": (None, False),
}
ENCODER_WORDS: Mapping[str, tuple[Any, ...]] = {
    **_BOTH,
    "is_causal": (None, False),
    "use_cache": (None, False, True),  # stock encoders have none to return either, and say nothing
    "past_key_values": (None,),
    "cache": (None,),
}
DECODER_WORDS: Mapping[str, tuple[Any, ...]] = {**_BOTH, "is_causal": (None, True), "token_type_ids": (None,)}


def known_arguments(
    given: Mapping[str, Any], known: Iterable[str], where: str, words: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """Those of a forward's further keyword arguments that it reads; unlike a plain **kwargs this swallows no typo.

    Args:
        given: what came.
        known: what is read.
        where: the forward, as it should read in the message.
        words: what may come with certain values, which ask for nothing.

    Raises:
        TypeError: a keyword is not known.
        ValueError: one of `words` asks for something.
    """
    names = list(known)
    for name, value in given.items():
        if name in names:
            continue
        if name not in words:
            raise TypeError(f"{where} got an unexpected keyword argument {name!r}{did_you_mean(name, names)}")
        if not any(value is harmless for harmless in words[name]):
            expected = " or ".join(map(repr, words[name]))
            shown = repr(value) if isinstance(value, bool | int | str) else type(value).__name__
            raise ValueError(f"{name} of {where} must be {expected}: this model has nothing of the kind; got {shown}")
    return {name: value for name, value in given.items() if name in names}


def zeros_and_ones(attention_mask: Tensor | None) -> Tensor | None:
    """The mask as bool where it is a float one; others as they are.

    Raises:
        ValueError: a float mask holds anything but 0 and 1. In a compiled graph, which cannot wait for the answer, this
            is a RuntimeError.
    """
    if attention_mask is None or not attention_mask.is_floating_point():
        return attention_mask
    values = attention_mask.float()  # 8-bit floats compare with nothing
    is_real = values == 1
    is_binary = (is_real | (values == 0)).all()
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(is_binary, "attention_mask must hold 0 (padding) and 1 (real) alone")
    elif values.device.type != "meta" and not is_binary:
        other = values[~is_real & (values != 0)][0].item()
        raise ValueError(f"attention_mask must hold 0 (padding) and 1 (real) alone; got {other:g}")
    return is_real
