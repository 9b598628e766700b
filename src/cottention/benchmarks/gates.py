"""Decay and erase in the attention benchmark: gates of fixed random numbers, of the shape that a call has.

gates_of(("decay", "erase"), q)        # {"log_decay": [B, T, H], "beta": [B, T, H]}
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

RULES = ("decay", "erase")
"""What may follow the name of an implementation, with a plus: native+decay, native+erase, native+decay+erase."""

# Half-lives from 7 tokens on: what heads of a language model learn.
_STRONGEST_DECAY = -0.1


def gates_of(rules: tuple[str, ...], q: Tensor) -> dict[str, Any]:
    """Arguments of `cosine_attention` for q `[B, T, H, K]`: the same numbers in every dtype."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    named = {
        "log_decay" if rule == "decay" else "beta": _gate(rule, tuple(q.shape[:3]), q.device.type) for rule in rules
    }
    return {name: x.to(dtype) for name, x in named.items()}


@lru_cache(maxsize=8)  # drawing them is no part of a call
def _gate(rule: str, shape: tuple[int, ...], device: str) -> Tensor:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(RULES.index(rule)))
    return (_STRONGEST_DECAY * x if rule == "decay" else x).to(device)
