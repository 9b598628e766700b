"""Cosine attention as the paper writes it: quadratic, in plain torch operators, the oracle for every other form.

Change this file first; the fast ones follow. Symbols are the paper's (arXiv 2409.18747, section 3):

    q_hat = q / max(||q||, 1e-12)                     c_j = number of real tokens up to j in j's sequence
    p     = sigmoid(m)                                n   = number of real tokens in the sequence
    o_t   = sum_{j <= t} (q_hat_t . k_hat_j) v_j / max(c_j ** p, 1)          causal
    o_t   = sum_j        (q_hat_t . k_hat_j) v_j / max(n ** p, 1)            bidirectional

The divisor stands under the VALUE, at the key's position j. Padded q, k and v are zero.

    o, state = naive_cosine_attention(q, k, v, norm_const, causal=True)
"""

from __future__ import annotations

import torch
from torch import Tensor

from cottention.ops.autocast import without_autocast
from cottention.ops.state import MIN_NORM, CosineState, accumulation_dtype


@without_autocast
def naive_cosine_attention(
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
) -> tuple[Tensor, CosineState | None]:
    """The equations above, differentiable by autograd in every argument. See `cosine_attention` for the arguments."""
    B, T = q.shape[:2]
    S = k.shape[1]
    dtype, device = accumulation_dtype(q.dtype), q.device

    real = torch.ones(B, S, dtype=torch.bool, device=device) if attention_mask is None else attention_mask
    if T == S:  # self-attention: padded queries are zero too; in cross-attention the mask speaks of keys alone
        q = q.masked_fill(~real[..., None, None], 0)
    k, v = (x.masked_fill(~real[..., None, None], 0) for x in (k, v))
    q_hat, k_hat = (
        x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=MIN_NORM) for x in (q.to(dtype), k.to(dtype))
    )

    key_sequence = _sequence_of_each_token(B, S, cu_seqlens, device)  # [B, S]
    query_sequence = key_sequence if T == S else _sequence_of_each_token(B, T, None, device)  # [B, T]
    num_sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    belongs = (key_sequence[..., None] == torch.arange(num_sequences, device=device)).to(torch.int64)  # [B, S, N]
    seen = torch.zeros(num_sequences, dtype=torch.int64, device=device) if initial_state is None else initial_state.seen
    real_of = belongs * real[..., None]  # [B, S, N]
    total = seen + real_of.sum((0, 1))  # [N]

    if causal:
        count = ((seen + real_of.cumsum(1)) * belongs).sum(-1)  # [B, S] c_j
    else:
        count = (total * belongs).sum(-1)  # [B, S] n
    value = v.to(dtype)
    if norm_const is not None:
        p = torch.sigmoid(norm_const.to(dtype))  # [H]
        # a count of 0 (nothing real yet) divides by 1, and 1 ** p has no gradient: the max(c ** p, 1) of the equations
        value = value / (count.clamp(min=1).to(dtype)[..., None] ** p)[..., None]

    allowed = query_sequence[:, :, None] == key_sequence[:, None, :]  # [B, T, S]
    if causal:
        allowed = allowed & torch.ones(T, S, dtype=torch.bool, device=device).tril()
    scores = torch.einsum("bthk,bshk->bhts", q_hat, k_hat).masked_fill(~allowed[:, None], 0)
    o = torch.einsum("bhts,bshv->bthv", scores, value)

    member = belongs.to(dtype)
    if initial_state is not None:
        o = o + torch.einsum("btn,bthk,nhkv->bthv", member, q_hat, initial_state.kv.to(dtype))
    if T == S:  # zero already; this is for what flows back
        o = o.masked_fill(~real[..., None, None], 0)
    if not output_final_state:
        return o.to(q.dtype), None
    kv = torch.einsum("bsn,bshk,bshv->nhkv", member, k_hat, value)
    if initial_state is not None:
        kv = kv + initial_state.kv.to(dtype)
    return o.to(q.dtype), CosineState(kv, total)


def _sequence_of_each_token(B: int, T: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """`[B, T]` int64: the row of each token, or the packed sequence that it lies in."""
    if cu_seqlens is None:
        return torch.arange(B, device=device)[:, None].expand(B, T)
    positions = torch.arange(T, device=device)
    return torch.bucketize(positions, cu_seqlens[1:].to(torch.int64), right=True)[None]
