"""The arguments of one call of the library, by name: the structures `Call` and `Convolution` of `src/abi.h`.

The library names its fields with their places in memory, and `layout_difference` compares the two when it is loaded.

    call = Call()
    call.dtype, call.T = 0, 512
    library.cottention_forward(ctypes.byref(call))
"""

from __future__ import annotations

import ctypes
from itertools import zip_longest
from typing import Literal


class Call(ctypes.Structure):
    """64-bit words, 0 where nothing is set; see `src/abi.h`. A tensor `[B, T, H, D]` is an address and its strides."""

    __slots__ = ()  # a name that is no field raises

    dtype: int
    causal: int
    num_threads: int
    chunk: int
    B: int
    T: int
    S: int
    H: int
    K: int
    V: int
    num_sequences: int
    boundaries: int
    mask: int
    mask_row: int
    norm_const: int
    norm_const_dtype: int
    norm_const_stride: int
    seen: int
    kv: int
    final_kv: int
    final_seen: int
    q_data: int
    q_batch: int
    q_token: int
    q_head: int
    k_data: int
    k_batch: int
    k_token: int
    k_head: int
    v_data: int
    v_batch: int
    v_token: int
    v_head: int
    o_data: int
    o_batch: int
    o_token: int
    o_head: int
    grad_data: int
    grad_batch: int
    grad_token: int
    grad_head: int
    dq: int
    dk: int
    dv: int
    dm: int
    grad_final: int
    dkv: int
    log_decay_data: int
    log_decay_batch: int
    log_decay_token: int
    log_decay_head: int
    beta_data: int
    beta_batch: int
    beta_token: int
    beta_head: int
    dlog_decay: int
    dbeta: int
    saved: int
    saved_tokens: int
    state_indices: int

    _fields_ = [(name, ctypes.c_int64) for name in __annotations__]


class ConvolutionCall(ctypes.Structure):
    """64-bit words of a short convolution, 0 where nothing is set; see `src/abi.h`."""

    __slots__ = ()

    dtype: int
    activates: int
    num_threads: int
    R: int
    T: int
    S: int
    C: int
    W: int
    before: int
    weight: int
    x: int
    x_row: int
    x_token: int
    y: int
    dy: int
    dy_row: int
    dy_token: int
    dx: int
    dweight: int

    _fields_ = [(name, ctypes.c_int64) for name in __annotations__]


def layout_of(structure: type[ctypes.Structure]) -> list[str]:
    """Each field's name and offset, then the size, as the library writes them."""
    fields = [f"{name} {getattr(structure, name).offset}" for name, *_ in structure._fields_]
    return [*fields, f"size {ctypes.sizeof(structure)}"]


def layout_difference(
    library: ctypes.CDLL, structure: type[ctypes.Structure] = Call, name: Literal["call", "convolution"] = "call"
) -> str:
    """The first field that the library has elsewhere than the structure; "" where both are the same."""
    written = getattr(library, f"cottention_{name}_layout")
    written.restype = ctypes.c_char_p
    theirs, ours = written().decode().split("\n"), layout_of(structure)
    for found, expected in zip_longest(theirs, ours, fillvalue="nothing"):
        if found != expected:
            return f"{found!r} where {expected!r} is expected"
    return ""
