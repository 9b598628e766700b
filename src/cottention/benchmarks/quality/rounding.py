"""Products in bfloat16 on a processor that has no instructions for them, at the speed of float32.

A product of two bfloat16 numbers is exact in float32, and sums of such are kept in float32 wherever bfloat16 is
multiplied. So multiplying the rounded inputs in float32 and rounding the result comes to the same, but for the order of
the sums (and the weights of softmax attention, which are not rounded in between), in a tenth of the time of torch's own
substitute.

    with products_in_float32(), torch.autocast("cpu", torch.bfloat16):
        model(...).loss.backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.convolution.default,
    _ATTENTION,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
"""What the models of the study multiply by, forward and backward."""


class Float32Products(TorchDispatchMode):
    """Runs the products of bfloat16 tensors in float32 and rounds what they return."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called for every operation."""
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not any(isinstance(each, Tensor) and each.dtype == torch.bfloat16 for each in args):
            return func(*args, **kwargs)
        found = func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})
        if func is _ATTENTION:
            o, log_sums = found  # these are float32 whatever is multiplied
            return o.bfloat16(), log_sums
        return tuple(each.bfloat16() for each in found) if isinstance(found, tuple) else found.bfloat16()


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def products_in_float32(device: str = "cpu") -> AbstractContextManager[Any]:
    """A context for training under bfloat16 autocast; does nothing where the device multiplies bfloat16 itself."""
    has_instructions = torch.device(device).type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return nullcontext() if has_instructions else Float32Products()
