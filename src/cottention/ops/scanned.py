"""Decay and erase for programs that are exported: the recurrence itself, token by token, as one loop of any length.

torch.export writes it as `scan`, so that no number of chunks is fixed in the program, and no triangular system has to
be solved, for which ONNX has no operator. Every value is that of `naive`.

    o, state = scanned_cosine_attention(q, k, v, m, causal=True, log_decay=log_decay, beta=beta)
"""

from __future__ import annotations

import torch
from torch import Tensor

# The module of torch that loops are written with; `torch.scan` does not exist yet.
from torch._higher_order_ops.scan import scan

from cottention.ops.autocast import without_autocast
from cottention.ops.gated import Call, Tokens, diagonal
from cottention.ops.layouts import finished
from cottention.ops.state import CosineState


@without_autocast
def scanned_cosine_attention(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,
    v: Tensor,  # [B, T, H, V]
    norm_const: Tensor | None,  # [H]
    *,
    causal: bool,
    attention_mask: Tensor | None = None,  # [B, T] bool
    cu_seqlens: None = None,
    initial_state: CosineState | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    log_decay: Tensor | None = None,  # [B, T, H]
    beta: Tensor | None = None,  # [B, T, H]
) -> tuple[Tensor, CosineState | None]:
    """Same numbers as `naive_cosine_attention`, of rows; `chunk_size` is not asked."""
    kv, seen = initial_state or (None, None)
    given = (q, k, v, norm_const, attention_mask, cu_seqlens, kv, seen, log_decay, beta)
    call = Call(*given, causal=causal, chunk_size=0)
    o, reached = _walk(call.tokens, call.kv)
    if not causal:
        _, turned = call.backwards()
        back, _ = _walk(turned, call.kv)
        o = o + back.flip(1) - diagonal(call.tokens) * call.tokens.v
    return finished(o, q, attention_mask), CosineState(reached, call.total) if output_final_state else None


def _walk(tokens: Tokens, kv: Tensor) -> tuple[Tensor, Tensor]:
    """o `[B, T, H, V]` and the state behind the last token `[B, H, K, V]`."""
    parts = (tokens.q, tokens.k, tokens.v, tokens.log_decay.exp(), tokens.beta)
    if torch.onnx.is_in_onnx_export():  # whose exporter fails on loops over what wants gradients
        parts, kv = tuple(None if x is None else x.detach() for x in parts), kv.detach()
    along_time = tuple(x.transpose(0, 1) for x in parts if x is not None)  # [T, B, H, K, V or 1]

    def step(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q, k, write, kept, *strength = token
        state = kept[..., None] * state
        if strength:
            write = strength[0] * (write - torch.einsum("bhk,bhkv->bhv", k, state))
        state = state + k[..., None] * write[..., None, :]
        return state, torch.einsum("bhk,bhkv->bhv", q, state)

    reached, o = scan(step, kv, along_time)
    return o.transpose(0, 1), reached
