"""The compiled library in Python: found beside this file, loaded by ctypes, called with one packed struct of words.

`Call` of `src/abi.h` is packed here field by field. Packing a struct and passing it as bytes costs
a microsecond or two, which is what keeps short sequences and single tokens fast.

    if is_available():
        forward(q, k, v, norm_const, causal=True, o=o)         # writes o
    use_instruction_set("avx2")                                # COTTENTION_NATIVE_ISA=avx2 does it for a process
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cottention.ops.validation import check_boundaries

_ABI_VERSION = 1
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_VIEW = (0, 0, 0, 0)
_OUT_OF_MEMORY, _BAD_BOUNDARIES = 1, 2
_REMEDY = "install a C++17 compiler and reinstall cottention: pip install --force-reinstall --no-deps cottention"
_pack = struct.Struct("=47q").pack


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    files = sorted(path for path in Path(__file__).parent.glob("_kernels.*") if path.suffix in (".so", ".dylib"))
    if not files:
        return None, f"the native kernels were not built when cottention was installed; {_REMEDY}"
    try:
        library = ctypes.CDLL(str(files[0]))
    except OSError as error:
        return None, f"the native kernels cannot be loaded ({error}); {_REMEDY}"
    if library.cottention_abi_version() != _ABI_VERSION:
        return None, f"{files[0].name} belongs to another version of cottention; {_REMEDY}"
    library.cottention_instruction_set.argtypes = [ctypes.c_int64]
    library.cottention_instruction_set.restype = ctypes.c_char_p
    library.cottention_use_instruction_set.argtypes = [ctypes.c_char_p]
    for name in ("forward", "backward", "step"):
        getattr(library, f"cottention_{name}").argtypes = [ctypes.c_char_p]
    return library, ""


# Loaded now and not at the first call: the library tells a forked child, which must not use the parent's threads, by
# the process that loaded it.
_library, _reason = _load()


@cache
def _checked_library() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError(f"implementation='native' cannot run: {_reason}")
    wanted = os.environ.get("COTTENTION_NATIVE_ISA")
    if wanted:
        _select(_library, wanted, "COTTENTION_NATIVE_ISA")
    return _library


def is_available() -> bool:
    """Whether the library was built and can be loaded."""
    return _library is not None


def instruction_sets() -> list[str]:
    """Those that this CPU runs, plainest first."""
    library = _checked_library()
    names = []
    while name := library.cottention_instruction_set(len(names)):
        names.append(name.decode())
    return names


def instruction_set() -> str:
    """The one that calls run with."""
    return _checked_library().cottention_instruction_set(-1).decode()


def use_instruction_set(name: str) -> None:
    """Let calls run with another instruction set than the widest.

    Raises:
        ValueError: this CPU, or this build, has none of that name.
    """
    _select(_checked_library(), name, "name")


def _select(library: ctypes.CDLL, name: str, argument: str) -> None:
    if library.cottention_use_instruction_set(name.encode()) != 0:
        known = []
        while each := library.cottention_instruction_set(len(known)):
            known.append(each.decode())
        raise ValueError(f"{argument} must be one of {', '.join(known)} on this machine; got {name!r}")


def check_native(q: Tensor) -> None:
    """Raise unless tensors like q can be given to the library.

    Raises:
        RuntimeError: the library is missing.
        ValueError: q is not on the CPU.
        TypeError: q's dtype has no kernels.
    """
    _checked_library()
    if q.device.type != "cpu":
        raise ValueError(f"implementation='native' needs tensors on the CPU; got {q.device}")
    if q.dtype not in NATIVE_DTYPES:
        name = str(q.dtype).removeprefix("torch.")
        raise TypeError(f"implementation='native' takes float32, bfloat16 or float16 ('chunk' takes all); got {name}")


def with_unit_stride(x: Tensor) -> Tensor:
    """x itself when the numbers of a token lie side by side, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _view(x: Tensor | None) -> tuple[int, ...]:
    """Address and element strides of `[B, T, H, D]`."""
    return _NO_VIEW if x is None else (x.data_ptr(), *x.stride()[:3])


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def run(
    function: str,
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, S, H, K]
    v: Tensor,  # [B, S, H, V]
    norm_const: Tensor | None,  # [H]
    *,
    causal: bool,
    chunk_size: int = 0,
    mask: Tensor | None = None,  # [B, S] bool
    cu_seqlens: Tensor | None = None,  # [N+1]
    seen: Tensor | None = None,  # [N]
    kv: Tensor | None = None,  # [N, H, K, V]
    final_kv: Tensor | None = None,
    final_seen: Tensor | None = None,
    o: Tensor | None = None,
    grad: Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    dm: Tensor | None = None,
    grad_final: Tensor | None = None,
    dkv: Tensor | None = None,
) -> None:
    """Call "forward", "backward" or "step" of `src/abi.h`.

    Inputs may have any strides; final_kv, final_seen, o and the gradients are written and must be contiguous.
    """
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    if grad is not None:
        grad = with_unit_stride(grad)
    if mask is not None:
        mask = with_unit_stride(mask)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    kv, seen, grad_final = (None if x is None else x.contiguous() for x in (kv, seen, grad_final))
    B, T, H, K = q.shape
    call = _pack(
        _DTYPES[q.dtype],
        causal,
        torch.get_num_threads(),
        chunk_size,
        B,
        T,
        k.shape[1],
        H,
        K,
        v.shape[3],
        B if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        _address(cu_seqlens),
        _address(mask),
        0 if mask is None else mask.stride(0),
        _address(norm_const),
        0 if norm_const is None else _DTYPES[norm_const.dtype],
        0 if norm_const is None else norm_const.stride(0),
        _address(seen),
        _address(kv),
        _address(final_kv),
        _address(final_seen),
        *_view(q),
        *_view(k),
        *_view(v),
        *_view(o),
        *_view(grad),
        _address(dq),
        _address(dk),
        _address(dv),
        _address(dm),
        _address(grad_final),
        _address(dkv),
    )
    status = getattr(_checked_library(), f"cottention_{function}")(call)
    if status == _OUT_OF_MEMORY:
        raise MemoryError("the native kernels found no memory for their scratch")
    if status == _BAD_BOUNDARIES and cu_seqlens is not None:
        check_boundaries(cu_seqlens.tolist(), T)
    assert status == 0, status
