"""Argument checks of the public operations: one place, one error naming the argument, the rule and the value.

norm_const = check_arguments(q, k, v, norm_const, ...)      # raises, or returns norm_const as [H]
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cottention.ops.state import CosineState

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    *,
    causal: bool,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: CosineState | None,
    output_final_state: bool,
    chunk_size: int | None,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    is_slice: bool = False,
) -> Tensor | None:
    """Check everything that `cosine_attention` promises about its arguments; returns norm_const as `[H]`.

    Where cu_seqlens must end is not checked of a slice, which does not know.
    """
    _check_qkv(q, k, v, num_dims=4)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False; got {causal!r}")
    B, T, H, K = q.shape
    S, V = v.shape[1], v.shape[3]
    if causal and S != T:
        raise ValueError(
            f"k and v must have as many tokens as q when causal=True; got T={T} for q and T={S} for k and v"
        )
    if chunk_size is not None:
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
            raise TypeError(f"chunk_size must be an int; got {chunk_size!r}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
    if attention_mask is not None:
        if cu_seqlens is not None:
            raise ValueError(
                "attention_mask and cu_seqlens exclude each other: packed sequences hold no padding; got both"
            )
        _check_mask(attention_mask, (B, S), "[B, T] of k")
        _check_device(attention_mask, "attention_mask", q)
    num_sequences = B
    if cu_seqlens is not None:
        num_sequences = _check_cu_seqlens(cu_seqlens, q, S, is_slice)
    if (initial_state is not None or output_final_state) and not causal:
        name = "initial_state" if initial_state is not None else "output_final_state"
        raise ValueError(f"{name} needs causal=True: bidirectional attention has no running state; got causal=False")
    if initial_state is not None:
        _check_state(initial_state, (num_sequences, H, K, V), q, "initial_state")
    if not causal and beta is not None:
        raise ValueError("beta needs causal=True: what erases what has no order otherwise; got causal=False")
    if log_decay is not None:
        if S != T:
            raise ValueError(f"log_decay needs k and v with as many tokens as q; got T={T} for q and T={S} for k and v")
        _check_log_decay(log_decay, [(B, T, H)], "[B, T, H]", q)
    if beta is not None:
        _check_gate(beta, [(B, T, H)], "[B, T, H]", q, "beta")
    return _check_norm_const(norm_const, H, q)


def check_step_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    state: CosineState | None,
    attention_mask: Tensor | None,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor | None:
    """Check the arguments of `cosine_attention_step`; returns norm_const as `[H]`."""
    num_dims = 4 if isinstance(q, Tensor) and q.dim() == 4 else 3
    _check_qkv(q, k, v, num_dims=num_dims)
    if num_dims == 4 and (q.shape[1] != 1 or k.shape[1] != 1):
        raise ValueError(f"q, k and v must hold exactly one token; got T={q.shape[1]} and T={k.shape[1]}")
    B, (H, K), V = q.shape[0], q.shape[-2:], v.shape[-1]
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise TypeError(f"attention_mask must be a tensor; got {type(attention_mask).__name__}")
        if tuple(attention_mask.shape) not in ((B,), (B, 1)):
            raise ValueError(
                f"attention_mask must have shape [B] or [B, 1] = [{B}, 1]; got {list(attention_mask.shape)}"
            )
        _check_mask(attention_mask.reshape(B, -1), (B, 1), "[B, 1]")
        _check_device(attention_mask, "attention_mask", q)
    num_rows = B
    if state_indices is not None:
        num_rows = _check_state_indices(state_indices, state, B, q)
    if state is not None:
        _check_state(state, (num_rows, H, K, V), q, "state")
    if log_decay is not None:
        _check_log_decay(log_decay, [(B, H), (B, 1, H)], "[B, H] or [B, 1, H]", q)
    if beta is not None:
        _check_gate(beta, [(B, H), (B, 1, H)], "[B, H] or [B, 1, H]", q, "beta")
    return _check_norm_const(norm_const, H, q)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, *, num_dims: int) -> None:
    layout = "[B, T, H, K]" if num_dims == 4 else "[B, H, K] or [B, 1, H, K]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
        if x.dim() != num_dims:
            raise ValueError(f"{name} must have shape {layout}; got {list(x.shape)}")
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {_dtype_name(x)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {_dtype_name(q)}; got {_dtype_name(x)}")
        _check_device(x, name, q)
    (Bq, Hq, Kq), (Bk, Hk, Kk), (Bv, Hv) = (
        (q.shape[0], *q.shape[-2:]),
        (k.shape[0], *k.shape[-2:]),
        (v.shape[0], v.shape[-2]),
    )
    if Bk != Bq or Bv != Bq:
        raise ValueError(f"q, k and v must have the same batch size; got {Bq}, {Bk} and {Bv}")
    if Hk != Hq or Hv != Hq:
        raise ValueError(f"q, k and v must have the same number of heads; got {Hq}, {Hk} and {Hv}")
    if Kk != Kq:
        raise ValueError(f"k must have the head dim of q, K={Kq}; got {Kk}")
    if num_dims == 4 and v.shape[1] != k.shape[1]:
        raise ValueError(f"v must have as many tokens as k, T={k.shape[1]}; got {v.shape[1]}")


def _check_norm_const(norm_const: Tensor | None, H: int, q: Tensor) -> Tensor | None:
    if norm_const is None:
        return None
    if not isinstance(norm_const, Tensor):
        raise TypeError(f"norm_const must be a tensor or None; got {type(norm_const).__name__}")
    if tuple(norm_const.shape) not in ((H,), (1, H, 1, 1)):
        raise ValueError(f"norm_const must have shape [H] or [1, H, 1, 1] with H={H}; got {list(norm_const.shape)}")
    if norm_const.dtype not in FLOAT_DTYPES:
        raise TypeError(f"norm_const must be floating point; got {_dtype_name(norm_const)}")
    _check_device(norm_const, "norm_const", q)
    return norm_const.reshape(H)


def _check_mask(mask: Tensor, shape: tuple[int, int], layout: str) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor; got {type(mask).__name__}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask must have shape {layout} = {list(shape)}; got {list(mask.shape)}")
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"attention_mask must be bool or int, 1 = real; got {_dtype_name(mask)}")


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor, S: int, is_slice: bool) -> int:
    """Number of packed sequences N. The values are read only outside torch.compile, which cannot see them."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor; got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [N+1]; got {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32; got {_dtype_name(cu_seqlens)}")
    B, T = q.shape[:2]
    if B != 1:
        raise ValueError(f"cu_seqlens needs a batch of one packed row, B=1; got B={B}")
    if S != T:
        raise ValueError(f"cu_seqlens needs q and k of the same length; got T={T} and T={S}")
    _check_device(cu_seqlens, "cu_seqlens", q)
    if not is_slice and not torch.compiler.is_compiling():
        check_boundaries(cu_seqlens.tolist(), T)
    return cu_seqlens.shape[0] - 1


def check_boundaries(boundaries: list[int], T: int) -> None:
    """Packed boundaries must run from 0 to T without going back."""
    if boundaries[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0; got {boundaries[0]}")
    for i, (start, end) in enumerate(itertools.pairwise(boundaries)):
        if end < start:
            raise ValueError(f"cu_seqlens must not decrease; got {start} before {end} at index {i + 1}")
    if boundaries[-1] != T:
        raise ValueError(f"cu_seqlens must end at the number of tokens, T={T}; got {boundaries[-1]}")


def _check_is_state(state: CosineState, name: str) -> None:
    if not (isinstance(state, tuple) and len(state) == 2 and all(isinstance(x, Tensor) for x in state)):
        raise TypeError(f"{name} must be a CosineState(kv, seen); got {type(state).__name__}")


def _check_state(state: CosineState, shape: tuple[int, int, int, int], q: Tensor, name: str) -> None:
    _check_is_state(state, name)
    kv, seen = state
    if tuple(kv.shape) != shape:
        raise ValueError(f"{name}.kv must have shape [N, H, K, V] = {list(shape)}; got {list(kv.shape)}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if kv.dtype != dtype:
        raise TypeError(
            f"{name}.kv must be {str(dtype).removeprefix('torch.')} for {_dtype_name(q)} inputs; got {_dtype_name(kv)}"
        )
    if tuple(seen.shape) != shape[:1]:
        raise ValueError(f"{name}.seen must have shape [N] = {list(shape[:1])}; got {list(seen.shape)}")
    if seen.dtype != torch.int64:
        raise TypeError(f"{name}.seen must be int64; got {_dtype_name(seen)}")
    _check_device(kv, f"{name}.kv", q)
    _check_device(seen, f"{name}.seen", q)


def _check_gate(gate: Tensor, shapes: list[tuple[int, ...]], layout: str, q: Tensor, name: str) -> None:
    if not isinstance(gate, Tensor):
        raise TypeError(f"{name} must be a tensor or None; got {type(gate).__name__}")
    if tuple(gate.shape) not in shapes:
        raise ValueError(f"{name} must have shape {layout} = {list(shapes[0])}; got {list(gate.shape)}")
    if gate.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be floating point; got {_dtype_name(gate)}")
    _check_device(gate, name, q)


def _check_log_decay(log_decay: Tensor, shapes: list[tuple[int, ...]], layout: str, q: Tensor) -> None:
    _check_gate(log_decay, shapes, layout, q, "log_decay")
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"log_decay must be float32, because its sums are exponents; got {_dtype_name(log_decay)}")
    if _can_be_read(log_decay):
        own, strides = log_decay.detach(), log_decay.stride()
        if 0 in strides:  # one number for all that an expanded view repeats
            own = own[tuple(slice(0, 1 if stride == 0 else None) for stride in strides)]
        if own.numel() and (largest := own.max().item()) > 0:
            raise ValueError(f"log_decay must be at most 0, a logarithm of what is kept; got {largest}")


def _can_be_read(x: Tensor) -> bool:
    """Whether its values are there, and reading them waits for no device."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch._C._are_functorch_transforms_active():
        return False
    return type(x) in (Tensor, torch.nn.Parameter)


def _check_state_indices(indices: Tensor, state: CosineState | None, B: int, q: Tensor) -> int:
    """Number of states in the pool. That rows differ and exist is seen on the CPU alone."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"state_indices must be a tensor or None; got {type(indices).__name__}")
    if state is None:
        raise ValueError("state_indices needs the state that it names rows of; got state=None")
    _check_is_state(state, "state")
    if tuple(indices.shape) != (B,):
        raise ValueError(f"state_indices must have shape [B] = [{B}]; got {list(indices.shape)}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"state_indices must be int64; got {_dtype_name(indices)}")
    _check_device(indices, "state_indices", q)
    num_states = len(state[0])
    if _can_be_read(indices):
        rows = indices.tolist()
        for row in rows:
            if not 0 <= row < num_states:
                raise ValueError(f"state_indices must lie from 0 to {num_states - 1}, the rows of state; got {row}")
        if len(set(rows)) != len(rows):
            raise ValueError(f"state_indices must name each row once; got {rows}")
    return num_states


def _check_device(x: Tensor, name: str, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}; got {x.device}")


def _dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
