"""Cosine attention as the paper writes it: quadratic, in plain torch operators, the oracle for every other form.

Change this file first; the fast ones follow. Symbols are the paper's (arXiv 2409.18747, section 3):

    q_hat = q / max(||q||, 1e-12)                     c_j = number of real tokens up to j in j's sequence
    p     = sigmoid(m)                                n   = number of real tokens in the sequence
    o_t   = sum_{j <= t} (q_hat_t . k_hat_j) v_j / max(c_j ** p, 1)          causal
    o_t   = sum_j        (q_hat_t . k_hat_j) v_j / max(n ** p, 1)            bidirectional

The divisor stands under the VALUE, at the key's position j: v' = v / max(c ** p, 1). Padded q, k and v are zero.

With log_decay and beta it is the recurrence, token by token, with a = exp(log_decay), which is 1 at padding:

    S_t = a_t S_{t-1} + k_hat_t v'_t^T                                                         without beta
    S_t = a_t (I - beta_t k_hat_t k_hat_t^T) S_{t-1} + beta_t k_hat_t v'_t^T                   with beta
    o_t = S_t^T q_hat_t                                                                        causal
    o_t = sum_j exp(-|G_t - G_j|) (q_hat_t . k_hat_j) v'_j        G the running sum of log_decay, bidirectional

    o, state = naive_cosine_attention(q, k, v, norm_const, causal=True)
"""

from __future__ import annotations

import torch
from torch import Tensor

from cottention.ops.autocast import without_autocast
from cottention.ops.state import CosineState, accumulation_dtype, norm_of


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
    log_decay: Tensor | None = None,  # [B, T, H]
    beta: Tensor | None = None,  # [B, T, H]
) -> tuple[Tensor, CosineState | None]:
    """The equations above, differentiable by autograd in every argument. See `cosine_attention` for the arguments."""
    B, T = q.shape[:2]
    S = k.shape[1]
    dtype, device = accumulation_dtype(q.dtype), q.device

    real = torch.ones(B, S, dtype=torch.bool, device=device) if attention_mask is None else attention_mask
    if T == S:  # self-attention: padded queries are zero too; in cross-attention the mask speaks of keys alone
        q = q.masked_fill(~real[..., None, None], 0)
    k, v = (x.masked_fill(~real[..., None, None], 0) for x in (k, v))
    q_hat, k_hat = (x / norm_of(x) for x in (q.to(dtype), k.to(dtype)))

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

    if log_decay is not None:
        log_decay = log_decay.to(dtype).masked_fill(~real[..., None], 0)
    if beta is not None:
        beta = beta.to(dtype).masked_fill(~real[..., None], 0)
    if causal and (log_decay is not None or beta is not None):
        shape = (num_sequences, *q.shape[2:], v.shape[3])
        start = q_hat.new_zeros(shape) if initial_state is None else initial_state.kv.to(dtype)
        o, kv = _recurrence(q_hat, k_hat, value, log_decay, beta, start, cu_seqlens)
        return o.to(q.dtype), CosineState(kv, total) if output_final_state else None

    allowed = query_sequence[:, :, None] == key_sequence[:, None, :]  # [B, T, S]
    if causal:
        allowed = allowed & torch.ones(T, S, dtype=torch.bool, device=device).tril()
    scores = torch.einsum("bthk,bshk->bhts", q_hat, k_hat).masked_fill(~allowed[:, None], 0)
    if log_decay is not None:
        scores = scores * _symmetric_weight(log_decay)
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


def _recurrence(
    q_hat: Tensor,  # [B, T, H, K]
    k_hat: Tensor,
    value: Tensor,  # [B, T, H, V]
    log_decay: Tensor | None,  # [B, T, H]
    beta: Tensor | None,  # [B, T, H]
    start: Tensor,  # [N, H, K, V]
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o `[B, T, H, V]`, and the states after the last tokens `[N, H, K, V]`."""
    B, T = q_hat.shape[:2]
    S = start[:1]  # of any sequence: each begins with its own
    sequence = _sequence_of_each_token(B, T, cu_seqlens, q_hat.device)  # [B, T]
    begins = torch.ones(B, T, dtype=torch.bool, device=q_hat.device)
    begins[:, 1:] = sequence[:, 1:] != sequence[:, :-1]
    outputs, states = [], []
    for t in range(T):
        S = torch.where(begins[:, t, None, None, None], start[sequence[:, t]], S)  # [B, H, K, V]
        if log_decay is not None:
            S = log_decay[:, t, :, None, None].exp() * S
        write = value[:, t]  # [B, H, V]
        if beta is not None:
            write = beta[:, t, :, None] * (write - torch.einsum("bhk,bhkv->bhv", k_hat[:, t], S))
        S = S + k_hat[:, t, :, :, None] * write[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_hat[:, t], S))
        states.append(S)
    if not outputs:  # empty, and still a function of the inputs
        return (q_hat * k_hat).sum(-1, keepdim=True) * value, start
    o = torch.stack(outputs, 1)
    if cu_seqlens is None:
        return o, S
    ends = cu_seqlens[1:].to(torch.int64)
    last = torch.cat(states)[(ends - 1).clamp(min=0)]
    return o, torch.where((ends > cu_seqlens[:-1])[:, None, None, None], last, start)


def _symmetric_weight(log_decay: Tensor) -> Tensor:
    """exp(-|G_i - G_j|), `[B, H, T, T]`; where i and j are in one sequence, so is all between them."""
    T = log_decay.shape[1]
    later = torch.ones(T, T, dtype=torch.bool, device=log_decay.device).tril(-1)
    # the sum over j < t <= i itself: G_i - G_j would be what is left of two large numbers
    steps = log_decay.transpose(1, 2)[..., None].expand(-1, -1, T, T).masked_fill(~later, 0)
    between = steps.cumsum(2)  # 0 on and above the diagonal
    return (between + between.mT).exp()


def _sequence_of_each_token(B: int, T: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """`[B, T]` int64: the row of each token, or the packed sequence that it lies in."""
    if cu_seqlens is None:
        return torch.arange(B, device=device)[:, None].expand(B, T)
    positions = torch.arange(T, device=device)
    return torch.bucketize(positions, cu_seqlens[1:].to(torch.int64), right=True)[None]
