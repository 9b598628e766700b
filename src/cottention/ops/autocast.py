"""How the operation behaves inside `torch.autocast`: inputs in the region's dtype, states and sums in their own.

q, k, v = as_autocast_would(q, k, v)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def as_autocast_would(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the autocast region that we are in, if any; float64 stays, as in torch's own ops."""
    if not all(isinstance(x, Tensor) for x in tensors):
        return tensors
    device_type = tensors[0].device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x for x in tensors)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function of a tensor and more with autocast off, so that its matmuls keep the dtype they are given."""

    @wraps(function)
    def wrapper(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        device_type = first.device.type
        if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
            return function(first, *args, **kwargs)  # the region below takes longer to enter than a token to compute
        with torch.autocast(device_type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapper
