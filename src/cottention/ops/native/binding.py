"""The compiled library in Python: found beside this file, loaded by ctypes, called with one structure of named words.

Filling in the fields that a call uses and passing their address costs a few microseconds, which is what keeps short
sequences and single tokens fast.

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

from cottention.ops.native.call import Call, ConvolutionCall, layout_difference
from cottention.ops.validation import check_boundaries

_FOLDER = Path(__file__).parent
_ABI_VERSION = 4
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OUT_OF_MEMORY, _BAD_BOUNDARIES = 1, 2
_REMEDY = (
    "install a C++17 compiler and reinstall cottention: "
    "pip install --force-reinstall --no-deps --no-cache-dir cottention"
)


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    beside = sorted(path for path in _FOLDER.glob("_kernels.*") if path.suffix in (".so", ".dylib"))
    given = os.environ.get("COTTENTION_NATIVE_LIBRARY")
    if not given and not beside:
        return None, f"the native kernels were not built when cottention was installed{_why_not_built()}; {_REMEDY}"
    path = Path(given) if given else beside[0]
    remedy = "COTTENTION_NATIVE_LIBRARY names it" if given else _REMEDY
    try:
        if _is_cut_off(path):
            return None, f"the native kernels cannot be loaded ({path} ends too early); {remedy}"
        library = ctypes.CDLL(str(path))
        version = library.cottention_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"the native kernels cannot be loaded ({error}); {remedy}"
    if version != _ABI_VERSION:
        return None, f"{path.name} belongs to another version of cottention; {remedy}"
    if difference := layout_difference(library) or layout_difference(library, ConvolutionCall, "convolution"):
        return None, f"{path.name} lays out its arguments otherwise than this version, {difference}; {remedy}"
    library.cottention_instruction_set.argtypes = [ctypes.c_int64]
    library.cottention_instruction_set.restype = ctypes.c_char_p
    library.cottention_use_instruction_set.argtypes = [ctypes.c_char_p]
    for name in ("forward", "backward", "step"):
        getattr(library, f"cottention_{name}").argtypes = [ctypes.POINTER(Call)]
    for name in ("convolution", "convolution_backward"):
        getattr(library, f"cottention_{name}").argtypes = [ctypes.POINTER(ConvolutionCall)]
    wanted = os.environ.get("COTTENTION_NATIVE_ISA")
    if wanted and library.cottention_use_instruction_set(wanted.encode()) != 0:
        known = ", ".join(_names(library))
        return None, f"COTTENTION_NATIVE_ISA must be one of {known} on this machine; got {wanted!r}"
    return library, ""


def _is_cut_off(path: Path) -> bool:
    """Whether an ELF file of 64 bits is shorter than its header says: touching what is missing ends the process."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:6] != b"\x7fELF\x02\x01":  # little-endian; of others the loader says what is wrong
        return False
    if len(header) < 64:
        return True
    section_headers = struct.unpack_from("<Q", header, 0x28)[0]
    size, count = struct.unpack_from("<HH", header, 0x3A)
    return path.stat().st_size < section_headers + size * count


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
    log_decay: Tensor | None = None,  # [B, T, H] float32, like the three below
    beta: Tensor | None = None,
    dlog_decay: Tensor | None = None,
    dbeta: Tensor | None = None,
    saved: Tensor | None = None,  # [., H, K, V]
    saved_tokens: int = 0,
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
    call = Call()
    call.dtype, call.causal, call.num_threads, call.chunk = (
        DTYPES[q.dtype],
        causal,
        torch.get_num_threads(),
        chunk_size,
    )
    call.B, call.T, call.H, call.K = q.shape
    call.S, call.V = k.shape[1], v.shape[3]
    call.num_sequences = call.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _set_norm_const(call, norm_const)
    if mask is not None:
        call.mask, call.mask_row = mask.data_ptr(), mask.stride(0)
    call.q_data, (call.q_batch, call.q_token, call.q_head, _) = q.data_ptr(), q.stride()
    call.k_data, (call.k_batch, call.k_token, call.k_head, _) = k.data_ptr(), k.stride()
    call.v_data, (call.v_batch, call.v_token, call.v_head, _) = v.data_ptr(), v.stride()
    if o is not None:
        call.o_data, (call.o_batch, call.o_token, call.o_head, _) = o.data_ptr(), o.stride()
    if grad is not None:
        call.grad_data, (call.grad_batch, call.grad_token, call.grad_head, _) = grad.data_ptr(), grad.stride()
    call.boundaries, call.seen, call.kv = _address(cu_seqlens), _address(seen), _address(kv)
    call.final_kv, call.final_seen = _address(final_kv), _address(final_seen)
    call.dq, call.dk, call.dv, call.dm = _address(dq), _address(dk), _address(dv), _address(dm)
    call.grad_final, call.dkv = _address(grad_final), _address(dkv)
    if log_decay is not None:
        call.log_decay_data = log_decay.data_ptr() or ctypes.addressof(
            call
        )  # an empty tensor is nowhere, and yet given
        call.log_decay_batch, call.log_decay_token, call.log_decay_head = log_decay.stride()
    if beta is not None:
        call.beta_data = beta.data_ptr() or ctypes.addressof(call)
        call.beta_batch, call.beta_token, call.beta_head = beta.stride()
    call.dlog_decay, call.dbeta = _address(dlog_decay), _address(dbeta)
    if saved is not None:
        call.saved, call.saved_tokens = saved.data_ptr(), saved_tokens
    status = getattr(loaded_library(), f"cottention_{function}")(ctypes.byref(call))
    if status == _BAD_BOUNDARIES and cu_seqlens is not None:
        check_boundaries(cu_seqlens.tolist(), q.shape[1])
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
    log_decay: Tensor | None = None,  # [B, H] or [B, 1, H] float32
    beta: Tensor | None = None,  # like log_decay
    state_indices: Tensor | None = None,  # [B] int64: rows of kv and seen, which then are written over
) -> None:
    """Call "step" of `src/abi.h`. It writes o, final_kv and final_seen, all contiguous; they may be kv and seen.

    Apart from `run`, because filling in the structure takes as long here as the arithmetic.
    """
    q, k, v = with_unit_stride(q), with_unit_stride(k), with_unit_stride(v)
    call = Call()
    call.dtype, call.causal, call.num_threads = DTYPES[q.dtype], True, torch.get_num_threads()
    B, (_, call.H, call.K, V) = q.shape[0], final_kv.shape
    call.B, call.T, call.S, call.V, call.num_sequences = B, 1, 1, V, B
    _set_norm_const(call, norm_const)
    if mask is not None:
        call.mask, call.mask_row = mask.data_ptr(), mask.stride(0)
    if kv is not None and seen is not None:
        kv, seen = kv.contiguous(), seen.contiguous()
        call.kv, call.seen = kv.data_ptr(), seen.data_ptr()
    call.final_kv, call.final_seen = final_kv.data_ptr(), final_seen.data_ptr()
    call.q_data, (call.q_batch, *_, call.q_head, _) = q.data_ptr(), q.stride()
    call.k_data, (call.k_batch, *_, call.k_head, _) = k.data_ptr(), k.stride()
    call.v_data, (call.v_batch, *_, call.v_head, _) = v.data_ptr(), v.stride()
    call.o_data, (call.o_batch, *_, call.o_head, _) = o.data_ptr(), o.stride()
    if log_decay is not None:
        call.log_decay_data, (call.log_decay_batch, *_, call.log_decay_head) = log_decay.data_ptr(), log_decay.stride()
    if beta is not None:
        call.beta_data, (call.beta_batch, *_, call.beta_head) = beta.data_ptr(), beta.stride()
    if state_indices is not None:
        state_indices = state_indices.to(torch.int64).contiguous()
        call.state_indices = state_indices.data_ptr()
    _check_status(loaded_library().cottention_step(ctypes.byref(call)))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _set_norm_const(call: Call, norm_const: Tensor | None) -> None:
    if norm_const is not None:
        call.norm_const, call.norm_const_stride = norm_const.data_ptr(), norm_const.stride(0)
        call.norm_const_dtype = DTYPES[norm_const.dtype]


def _check_status(status: int) -> None:
    if status == _OUT_OF_MEMORY:
        raise MemoryError("the native kernels found no memory for their scratch")
    assert status == 0, status
