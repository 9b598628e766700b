"""Cosine attention in Triton kernels for NVIDIA and AMD GPUs: forward, backward and the one-token step.

Everything is fused into the loads: unit vectors, padding, count ** sigmoid(m). Between segments of a sequence goes a
plain prefix sum of K x V states (with log_decay of pairs, a decay and a state), so that all segments run at once
whatever B and H are; inside a segment the state stays in registers. docs/kernels-gpu.md describes the kernels and what
they compile to.

    o, state = cosine_attention(q, k, v, norm_const, causal=True, implementation="triton")        # q on a GPU
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from cottention.ops.triton.config import MAX_HEAD_DIM, choose, pad, segment_length

__all__ = ["cut", "why_not"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads this once, when kernels are defined; then they run on the CPU, slowly, to be checked.
_DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def why_not(device: torch.device, dtype: torch.dtype, K: int, V: int) -> str | None:
    """Why the kernels cannot run on such tensors, with the remedy; None when they can."""
    if device.type != _DEVICE:
        return (
            f"it needs tensors on a CUDA or HIP device, these are on {device.type}: move them there, or use "
            'implementation="auto"'
        )
    if not _HAS_TRITON:
        return "it needs the package triton: pip install 'triton>=3.6'"
    if dtype not in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f'it takes float32, bfloat16 and float16, not {name}: convert them, or use implementation="chunk"'
    if not 1 <= min(K, V) <= max(K, V) <= MAX_HEAD_DIM:
        return f'it takes head dims up to {MAX_HEAD_DIM}, not K={K}, V={V}: use implementation="chunk"'
    return None


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
    """Tokens of a chunk (0: as the table says) and of a segment (-1: sequences are whole, 0: the quadratic form).

    `chunk_size` can only make tiles shorter than the table says, and is taken as a power of two of at least 16.

    Raises:
        TypeError: the kernels do not take q's dtype.
        ValueError: they cannot run for another reason.
    """
    K, V = q.shape[3], v.shape[3]
    reason = why_not(q.device, q.dtype, K, V)
    if reason is not None:
        error = TypeError if q.dtype not in _DTYPES and q.device.type == _DEVICE else ValueError
        raise error(f'implementation="triton" cannot run here: {reason}')
    config = choose(q.device, q.dtype, max(pad(K), pad(V)), forgets=forgets)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = (N, q.shape[2], q.shape[1], k.shape[1], K, V)
    return chunk_size or 0, segment_length(config, *sizes, causal, has_states or forgets)  # no quadratic form forgets
