"""Cosine attention by the native kernels, for the dispatch of `cosine_attention`.

o, state = native_cosine_attention(q, k, v, norm_const, causal=True)
"""

from __future__ import annotations

import torch
from torch import Tensor

from cottention.ops.native import library as library
from cottention.ops.native.binding import check_native
from cottention.ops.state import CosineState


def native_cosine_attention(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, S, H, K]
    v: Tensor,  # [B, S, H, V]
    norm_const: Tensor | None,  # [H]
    *,
    causal: bool,
    attention_mask: Tensor | None = None,  # [B, S] bool
    cu_seqlens: Tensor | None = None,  # [N+1]
    initial_state: CosineState | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, CosineState | None]:
    """Same numbers as `naive_cosine_attention`, fused. See `cosine_attention` for the arguments.

    Raises:
        RuntimeError: the kernels were not built.
        ValueError: tensors are not on the CPU.
        TypeError: tensors are float64.
    """
    check_native(q)
    chunk_size = chunk_size or 0
    if not causal:
        o, _ = torch.ops.cottention.native_bidirectional.default(
            q, k, v, norm_const, attention_mask, cu_seqlens, chunk_size
        )
        return o, None
    kv, seen = (None, None) if initial_state is None else initial_state
    o, final_kv, final_seen = torch.ops.cottention.native_causal.default(
        q, k, v, norm_const, attention_mask, cu_seqlens, kv, seen, output_final_state, chunk_size
    )
    return o, CosineState(final_kv, final_seen) if output_final_state else None
