"""The native kernels as functions of tensors: what `dispatch` runs for implementation="native".

o, kv, seen, _ = causal(q, k, v, m, mask, cu_seqlens, kv0, seen0, True, 0, -1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from cottention.ops.dispatch import num_saved
from cottention.ops.native.binding import check_native, run, run_step

# Tokens between the states that forward keeps for the backward of an erasing call: kTurn of `src/kernels.h`, for which
# the kernels have room.
ERASE_SEGMENT = 512


def cut(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    cu_seqlens: Tensor | None,
    has_states: bool,
    chunk_size: int | None,
    forgets: bool,
    erases: bool,
    has_backward: bool,
) -> tuple[int, int]:
    """Tokens of a chunk, 0: as the kernels choose; sequences are whole, but for the states that backward starts from.

    Raises:
        RuntimeError: the kernels were not built.
        ValueError: tensors are not on the CPU.
        TypeError: tensors are float64.
    """
    check_native(q)
    if not (forgets or erases):
        return chunk_size or 0, -1
    return chunk_size or 0, ERASE_SEGMENT if erases and has_backward else 0


def _states(q: Tensor, v: Tensor, num: int) -> Tensor:
    return torch.empty((num, *q.shape[-2:], v.shape[-1]), dtype=torch.float32, device=q.device)


def _nothing(q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(0, dtype=dtype, device=q.device)


def _num_sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def causal(q, k, v, norm_const, mask, cu_seqlens, kv, seen, output_final_state, chunk_size, segment_tokens):
    """o `[B, T, H, V]`, the final kv and seen (empty unless asked for); nothing is kept for backward."""
    o, saved = q.new_empty((*q.shape[:3], v.shape[3])), _nothing(q)
    options = {"causal": True, "chunk_size": chunk_size, "mask": mask, "cu_seqlens": cu_seqlens, "kv": kv, "seen": seen}
    if not output_final_state:
        run("forward", q, k, v, norm_const, **options, o=o)
        return o, _nothing(q), _nothing(q, torch.int64), saved
    N = _num_sequences(q, cu_seqlens)
    final_kv, final_seen = _states(q, v, N), torch.empty(N, dtype=torch.int64, device=q.device)
    run("forward", q, k, v, norm_const, **options, o=o, final_kv=final_kv, final_seen=final_seen)
    return o, final_kv, final_seen, saved


def causal_backward(grad, grad_kv, q, k, v, norm_const, mask, cu_seqlens, kv, seen, saved, chunk_size, segment_tokens):
    """dq, dk, dv, dm and the gradient of the initial kv (the last two empty where there is none)."""
    gradients = _Gradients(q, k, v, norm_const)
    dkv = torch.empty(0 if kv is None else kv.shape, dtype=torch.float32, device=q.device)
    options = {"causal": True, "chunk_size": chunk_size, "mask": mask, "cu_seqlens": cu_seqlens, "kv": kv, "seen": seen}
    options |= {"grad": grad, "grad_final": grad_kv, "dkv": None if kv is None else dkv}
    run("backward", q, k, v, norm_const, **options, **gradients.buffers)
    return *gradients.finished(), dkv


def bidirectional(q, k, v, norm_const, mask, cu_seqlens, chunk_size, segment_tokens):
    """o `[B, T, H, V]` and each sequence's state over all its keys `[N, H, K, V]`, which backward needs again."""
    o, kv = q.new_empty((*q.shape[:3], v.shape[3])), _states(q, v, _num_sequences(q, cu_seqlens))
    options = {"causal": False, "chunk_size": chunk_size, "mask": mask, "cu_seqlens": cu_seqlens}
    run("forward", q, k, v, norm_const, **options, final_kv=kv, o=o)
    return o, kv


def bidirectional_backward(grad, q, k, v, norm_const, mask, cu_seqlens, kv, chunk_size, segment_tokens):
    """dq, dk, dv and dm (empty without norm_const)."""
    gradients = _Gradients(q, k, v, norm_const)
    options = {"causal": False, "chunk_size": chunk_size, "mask": mask, "cu_seqlens": cu_seqlens, "kv": kv}
    run("backward", q, k, v, norm_const, **options, grad=grad, **gradients.buffers)
    return gradients.finished()


def gated(
    q,
    k,
    v,
    norm_const,
    mask,
    cu_seqlens,
    kv,
    seen,
    log_decay,
    beta,
    causal,
    chunk_size,
    segment_tokens,
    output_final_state=True,
) -> tuple[Tensor, ...]:
    """o `[B, T, H, V]`, final kv and seen (empty unless asked for; zeros if not causal), states between segments."""
    o, N = q.new_empty((*q.shape[:3], v.shape[3])), _num_sequences(q, cu_seqlens)
    options = {"causal": causal, "chunk_size": chunk_size, "mask": mask, "cu_seqlens": cu_seqlens}
    options |= {"kv": kv, "seen": seen, "log_decay": _float(log_decay), "beta": _float(beta), "o": o}
    saved = _nothing(q)
    final_kv, final_seen = _nothing(q), _nothing(q, torch.int64)
    if output_final_state:
        final_kv, final_seen = _states(q, v, N), torch.empty(N, dtype=torch.int64, device=q.device)
        if causal:
            options |= {"final_kv": final_kv, "final_seen": final_seen}
        else:
            final_kv.zero_()
            final_seen.zero_()
    assert segment_tokens <= ERASE_SEGMENT, segment_tokens
    if segment_tokens > 0:
        saved = _states(q, v, num_saved(q, cu_seqlens, segment_tokens)).zero_()  # not all are reached
        options |= {"saved": saved, "saved_tokens": segment_tokens}
    run("forward", q, k, v, norm_const, **options)
    return o, final_kv, final_seen, saved


def gated_backward(
    grad,
    grad_kv,
    q,
    k,
    v,
    norm_const,
    mask,
    cu_seqlens,
    kv,
    seen,
    log_decay,
    beta,
    saved,
    causal,
    chunk_size,
    segment_tokens,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, norm_const, kv, log_decay and beta; empty where there is no such input."""
    gradients = _Gradients(q, k, v, norm_const)
    dkv, dlog_decay, dbeta = (
        torch.empty(0 if x is None else x.shape, dtype=torch.float32, device=q.device) for x in (kv, log_decay, beta)
    )
    options = {"causal": causal, "chunk_size": chunk_size, "mask": mask, "cu_seqlens": cu_seqlens}
    options |= {
        "kv": kv,
        "seen": seen,
        "log_decay": _float(log_decay),
        "beta": _float(beta),
        "grad": grad,
        "grad_final": grad_kv,
    }
    given = ((kv, "dkv", dkv), (log_decay, "dlog_decay", dlog_decay), (beta, "dbeta", dbeta))
    options |= {name: written for x, name, written in given if x is not None}
    if segment_tokens > 0:
        options |= {"saved": saved, "saved_tokens": segment_tokens}
    run("backward", q, k, v, norm_const, **options, **gradients.buffers)
    dlog_decay, dbeta = (y if x is None else y.to(x.dtype) for x, y in ((log_decay, dlog_decay), (beta, dbeta)))
    return *gradients.finished(), dkv, dlog_decay, dbeta


def _float(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.float32 else x.to(torch.float32)


class _Gradients:
    """What a backward writes; the kernels give dm in float32."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor | None) -> None:
        self._norm_const = norm_const
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        dm = None if norm_const is None else torch.empty(norm_const.shape, dtype=torch.float32, device=q.device)
        self.buffers = {"dq": dq, "dk": dk, "dv": dv, "dm": dm}

    def finished(self) -> tuple[Tensor, ...]:
        dq, dk, dv, dm = self.buffers.values()
        if self._norm_const is None:
            return dq, dk, dv, _nothing(dq)
        return dq, dk, dv, dm.to(self._norm_const.dtype)


def step(q, k, v, norm_const, real, kv, seen, log_decay=None, beta=None):
    """o, kv and seen after one token, `[B, H, K or V]` or `[B, 1, H, K or V]`."""
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    if kv is None:
        final_kv, final_seen = _states(q, v, q.shape[0]), torch.empty(q.shape[0], dtype=torch.int64, device=q.device)
    else:
        final_kv, final_seen = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (kv, seen))
    run_step(q, k, v, norm_const, real, kv, seen, final_kv, final_seen, o, _float(log_decay), _float(beta))
    return o, final_kv, final_seen


def step_(q, k, v, norm_const, real, kv, seen, log_decay=None, beta=None, state_indices=None):
    """o; kv and seen, which must be contiguous, are written over, or those rows of them."""
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    run_step(q, k, v, norm_const, real, kv, seen, kv, seen, o, _float(log_decay), _float(beta), state_indices)
    return o
