"""The compiled library in Python: found beside this file, loaded by ctypes, called with one packed struct of words.

`Call` of `src/abi.h` is packed here field by field. Packing a struct and passing it as bytes costs
a microsecond or two, which is what keeps short sequences and single tokens fast.

    if is_available():
        run("forward", q, k, v, norm_const, causal=True, o=o)  # writes o
    use_instruction_set("avx2")                                # COTTENTION_NATIVE_ISA=avx2 does it for a process
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cottention.ops.validation import check_boundaries

_FOLDER = Path(__file__).parent
_ABI_VERSION = 1
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_VIEW = (0, 0, 0, 0)
_NO_GRADIENTS = (0,) * 10
_OUT_OF_MEMORY, _BAD_BOUNDARIES = 1, 2
_REMEDY = (
    "install a C++17 compiler and reinstall cottention: "
    "pip install --force-reinstall --no-deps --no-cache-dir cottention"
)
_pack = struct.Struct("=47q").pack


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    beside = sorted(path for path in _FOLDER.glob("_kernels.*") if path.suffix in (".so", ".dylib"))
    given = os.environ.get("COTTENTION_NATIVE_LIBRARY")
    if not given and not beside:
        return None, f"the native kernels were not built when cottention was installed{_why_not_built()}; {_REMEDY}"
    path = Path(given) if given else beside[0]
    remedy = "COTTENTION_NATIVE_LIBRARY names it" if given else _REMEDY
    try:
        library = ctypes.CDLL(str(path))
        version = library.cottention_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"the native kernels cannot be loaded ({error}); {remedy}"
    if version != _ABI_VERSION:
        return None, f"{path.name} belongs to another version of cottention; {remedy}"
    library.cottention_instruction_set.argtypes = [ctypes.c_int64]
    library.cottention_instruction_set.restype = ctypes.c_char_p
    library.cottention_use_instruction_set.argtypes = [ctypes.c_char_p]
    for name in ("forward", "backward", "step"):
        getattr(library, f"cottention_{name}").argtypes = [ctypes.c_char_p]
    wanted = os.environ.get("COTTENTION_NATIVE_ISA")
    if wanted and library.cottention_use_instruction_set(wanted.encode()) != 0:
        known = ", ".join(_names(library))
        return None, f"COTTENTION_NATIVE_ISA must be one of {known} on this machine; got {wanted!r}"
    return library, ""


def _why_not_built() -> str:
    """What the install noted about its failure, in brackets; nothing where it noted nothing."""
    try:
        reason = json.loads((_FOLDER / "_build.json").read_text(encoding="utf-8"))["reason"]
    except (OSError, ValueError, KeyError):
        return ""
    return f" ({reason})"


def _names(library: ctypes.CDLL) -> list[str]:
    names = []
    while name := library.cottention_instruction_set(len(names)):
        names.append(name.decode())
    return names


# Loaded now and not at the first call: the library tells a forked child, which must not use the parent's threads, by
# the process that loaded it.
_library, _reason = _load()


@cache
def loaded_library() -> ctypes.CDLL:
    """The library itself, for what is not wrapped here.

    Raises:
        RuntimeError: it is missing; the message says why.
    """
    _check_loaded()
    assert _library is not None
    return _library


def _check_loaded() -> None:
    if _library is None:
        raise RuntimeError(f"implementation='native' cannot run: {_reason}")


def is_available() -> bool:
    """Whether the library was built and can be loaded."""
    return _library is not None


def suits_native(q: Tensor) -> bool:
    """Whether tensors like q can be given to the library."""
    return _library is not None and q.dtype in _NATIVE_DTYPES and q.device.type == "cpu"


def instruction_sets() -> list[str]:
    """Those that this CPU runs, plainest first."""
    return _names(loaded_library())


def instruction_set() -> str:
    """The one that calls run with."""
    return loaded_library().cottention_instruction_set(-1).decode()


def use_instruction_set(name: str) -> None:
    """Let calls run with another instruction set than the widest.

    Raises:
        ValueError: this CPU, or this build, has none of that name.
    """
    library = loaded_library()
    if library.cottention_use_instruction_set(name.encode()) != 0:
        raise ValueError(f"name must be one of {', '.join(_names(library))} on this machine; got {name!r}")


def check_native(q: Tensor) -> None:
    """Raise unless tensors like q can be given to the library.

    Raises:
        RuntimeError: the library is missing.
        ValueError: q is not on the CPU.
        TypeError: q's dtype has no kernels.
    """
    _check_loaded()  # not loaded_library: torch.compile traces this
    if q.device.type != "cpu":
        raise ValueError(f"implementation='native' needs tensors on the CPU; got {q.device}")
    if q.dtype not in _NATIVE_DTYPES:
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
    """Call "forward" or "backward" of `src/abi.h`.

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
    status = getattr(loaded_library(), f"cottention_{function}")(call)
    if status == _BAD_BOUNDARIES and cu_seqlens is not None:
        check_boundaries(cu_seqlens.tolist(), T)
    _check_status(status)


def run_step(
    q: Tensor,  # [B, H, K] or [B, 1, H, K]
    k: Tensor,  # like q
    v: Tensor,  # [B, H, V] or [B, 1, H, V]
    norm_const: Tensor | None,  # [H]
    mask: Tensor | None,  # [B] bool
    kv: Tensor | None,  # [B, H, K, V]
    seen: Tensor | None,  # [B]
    final_kv: Tensor,
    final_seen: Tensor,
    o: Tensor,
) -> None:
    """Call "step" of `src/abi.h`. It writes o, final_kv and final_seen, all contiguous; they may be kv and seen.

    Apart from `run`, because packing takes as long here as the arithmetic.
    """
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    if kv is not None and seen is not None:
        kv, seen = kv.contiguous(), seen.contiguous()
    B, H, K, V = final_kv.shape
    (q_batch, *_, q_head, _), (k_batch, *_, k_head, _), (v_batch, *_, v_head, _) = q.stride(), k.stride(), v.stride()
    call = _pack(
        *(_DTYPES[q.dtype], True, torch.get_num_threads(), 0, B, 1, 1, H, K, V, B, 0),
        *((0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))),
        *(
            (0, 0, 0)
            if norm_const is None
            else (norm_const.data_ptr(), _DTYPES[norm_const.dtype], norm_const.stride(0))
        ),
        *((0, 0) if kv is None or seen is None else (seen.data_ptr(), kv.data_ptr())),
        *(final_kv.data_ptr(), final_seen.data_ptr()),
        *(q.data_ptr(), q_batch, 0, q_head),
        *(k.data_ptr(), k_batch, 0, k_head),
        *(v.data_ptr(), v_batch, 0, v_head),
        *(o.data_ptr(), H * V, 0, V),
        *_NO_GRADIENTS,
    )
    _check_status(loaded_library().cottention_step(call))


def _check_status(status: int) -> None:
    if status == _OUT_OF_MEMORY:
        raise MemoryError("the native kernels found no memory for their scratch")
    assert status == 0, status
