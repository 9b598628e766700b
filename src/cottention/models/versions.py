"""What differs between the transformers that we support, from 5.17 on, in one place.

transformers 5.24 calls `cache` what was `past_key_values` before: among the arguments of a forward and of `generate`,
and in their outputs. Our models take either name under every version, and their outputs carry the one that the
installed version's own code reads.

    cache = either_name(past_key_values, cache)
    output = BaseModelOutputWithPast(last_hidden_state=x, **{CACHE_NAME: cache})
    cache = cache_of(output)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAMES = ("past_key_values", "cache")
# Asked of the library itself, so that its development versions are told apart too.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def either_name(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, given under whichever of its names.

    Raises:
        ValueError: two caches are given.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument; got two different caches")
    return cache if past_key_values is None else past_key_values


def with_one_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for transformers' own code: a cache among them stands under the name that it knows.

    Raises:
        ValueError: two caches are given.
    """
    cache = either_name(*(arguments.get(name) for name in CACHE_NAMES))
    others = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return others if cache is None else {**others, CACHE_NAME: cache}


def cache_of(output: Any) -> Any:
    """The cache in what a forward or `generate` returned; None where there is none."""
    return getattr(output, CACHE_NAME)


def check_chunked_continuation() -> None:
    """Refuse what older transformers do wrong without a word: their chunks start over with the first token.

    Raises:
        ValueError: transformers is older than 5.23.
    """
    major, minor = transformers.__version__.split(".")[:2]
    if (int(major), int(minor)) < (5, 23):
        raise ValueError(
            f"prefill_chunk_size with a filled past_key_values needs transformers 5.23; got {transformers.__version__}"
        )
