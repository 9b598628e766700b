"""Cosine attention over a sequence that the ranks of a process group share, each of them a slice of it.

cosine_attention(q, k, v, norm_const, causal=True, process_group=group)

collectives.py      collectives with gradients, begun and finished in different places
slices.py           where a rank's slice lies: counts, packed texts, who goes on from whom
causal.py           one gather of the states of all slices
bidirectional.py    one sum of them
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cottention.ops.derivatives import is_transformed
from cottention.ops.sharded.bidirectional import sharded_bidirectional
from cottention.ops.sharded.causal import Gates, sharded_causal
from cottention.ops.sharded.collectives import as_group, outside_graphs
from cottention.ops.sharded.slices import slice_of
from cottention.ops.state import CosineState

__all__ = ["as_group", "attend_sharded"]


@outside_graphs
def attend_sharded(
    run: Callable[..., tuple[Tensor, CosineState | None]],  # an implementation with its options
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
    log_decay: Tensor | None,
    beta: Tensor | None,
    process_group: Any,
) -> tuple[Tensor, CosineState | None]:
    """This rank's part of `cosine_attention`, for its checked arguments.

    Raises:
        NotImplementedError: under torch.func or with forward-mode tangents, which no collective can follow.
    """
    group = as_group(process_group)
    if is_transformed(q, k, v, norm_const, log_decay, beta, *(initial_state or ())):
        raise NotImplementedError("process_group has reverse-mode derivatives alone: no torch.func, no forward mode")
    if not causal:
        o = sharded_bidirectional(
            q,
            k,
            v,
            norm_const,
            run=run,
            group=group,
            attention_mask=attention_mask,
            cu_seqlens=cu_seqlens,
            log_decay=log_decay,
        )
        return o, None
    return sharded_causal(
        q,
        k,
        v,
        norm_const,
        run=run,
        place=slice_of(q, attention_mask, cu_seqlens, initial_state, group),
        attention_mask=attention_mask,
        initial_state=initial_state,
        output_final_state=output_final_state,
        gates=Gates(log_decay, beta),
    )
