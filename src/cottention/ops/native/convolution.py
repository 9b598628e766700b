"""The native kernels of the short convolution as functions of tensors.

y = convolved(x, weight, before=3, S=x.shape[1], activates=True)
dx, dweight = convolved_backward(grad, x, weight, before=3, activates=True)
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cottention.ops.native.binding import DTYPES, loaded_library, with_unit_stride
from cottention.ops.native.call import ConvolutionCall

MOST_TAPS = 64
"""Widths beyond it have no kernel: kWidth of `src/convolution.h`."""


def convolved(x: Tensor, weight: Tensor, *, before: int, S: int, activates: bool) -> Tensor:
    """y `[R, S, C]` of x `[R, T, C]` and weight `[C, W]`, in x's dtype; see `src/convolution.h`."""
    x, weight = with_unit_stride(x), weight.float().contiguous()
    y = x.new_empty(x.shape[0], S, x.shape[2])
    call = _call(x, weight, before, S, activates)
    call.y = y.data_ptr()
    loaded_library().cottention_convolution(ctypes.byref(call))
    return y


def convolved_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *, before: int, activates: bool, needs_dx: bool, needs_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx `[R, T, C]` in x's dtype and dweight `[C, W]` in float32, None where not asked for."""
    x, grad, weight = with_unit_stride(x), with_unit_stride(grad), weight.float().contiguous()
    call = _call(x, weight, before, grad.shape[1], activates)
    call.dy, (call.dy_row, call.dy_token, _) = grad.data_ptr(), grad.stride()
    dx = dweight = None
    if needs_dx:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        call.dx = dx.data_ptr()
    if needs_dweight:
        dweight = weight.new_empty(x.shape[0], *weight.shape)
        call.dweight = dweight.data_ptr()
    loaded_library().cottention_convolution_backward(ctypes.byref(call))
    return dx, None if dweight is None else dweight.sum(0)


def _call(x: Tensor, weight: Tensor, before: int, S: int, activates: bool) -> ConvolutionCall:
    call = ConvolutionCall()
    call.dtype, call.activates, call.num_threads = DTYPES[x.dtype], activates, torch.get_num_threads()
    call.R, call.T, call.C = x.shape
    call.S, call.W, call.before = S, weight.shape[1], before
    call.weight = weight.data_ptr()
    call.x, (call.x_row, call.x_token, _) = x.data_ptr(), x.stride()
    return call
