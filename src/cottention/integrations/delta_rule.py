"""transformers' gated delta rule, in its own terms, by `cosine_attention`: the same numbers and the same gradients.

Theirs divides keys by sqrt(k . k + 1e-6), ours by max(||k||, 1e-12), and takes what is left of a key's length into the
state. With r = ||k|| / sqrt(k . k + 1e-6) its key is r k_hat, so

    S_t = a (I - beta r^2 k_hat k_hat^T) S_{t-1} + beta r k_hat v^T

is ours with beta' = beta r^2 and v' = v / r; the query's r and 1 / sqrt(K) are factors of the output. Autograd has the
gradients through r. States are the same matrices, [B, H, K, V].

    o, state = chunk_gated_delta_rule(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cottention.ops import CosineState, cosine_attention, cosine_attention_step
from cottention.ops.autocast import without_autocast
from cottention.ops.state import accumulation_dtype

_EPS = 1e-6
# Queries and keys shorter than _SHORT, which ours soon takes for zeros, are given to it so many times as long, and
# their first number is raised by _LEAST_LENGTH: a zero has a direction then, and the gradient that theirs has. Beside
# 1e-3, the least that theirs divides by, it is nothing; and its square is still a number of float32.
_SHORT = 1e-11
_TIMES = 2.0**20
_LEAST_LENGTH = 1e-16


def chunk_gated_delta_rule(
    query: Tensor,  # [B, T, G, K], each of G heads serves H / G consecutive ones of the H
    key: Tensor,  # [B, T, G, K]
    value: Tensor,  # [B, T, H, V]
    g: Tensor,  # [B, T, H]
    beta: Tensor,  # [B, T, H]
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,  # [N, H, K, V]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """o `[B, T, H, V]` in the query's dtype, and the state behind the last token `[N, H, K, V]`, or None.

    Args:
        query: `[B, T, G, K]`.
        key: like query.
        value: `[B, T, H, V]`, H a multiple of G.
        g: logarithm of what is kept, `[B, T, H]`, at most 0.
        beta: how far is overwritten, `[B, T, H]`.
        chunk_size: tokens of a tile; None: as `cosine_attention` chooses.
        initial_state: `[N, H, K, V]`, of each of the N = B (or packed) sequences.
        output_final_state: also return the state.
        use_qk_l2norm_in_kernel: divide queries and keys by sqrt(x . x + 1e-6).
        cu_seqlens: `[N+1]`, boundaries of sequences packed into one row.
        seq_idx: the same as the number of each token's sequence, `[1, T]`; cu_seqlens comes first.
        kwargs: what transformers hands on to every kernel; nothing of it is about this one.
    """
    del kwargs
    cu_seqlens = boundaries_of(cu_seqlens, seq_idx)
    given = (query, key, value, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
    return _gated_delta_rule(*given, chunk_size)


def recurrent_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same without a chunk_size; transformers calls it for single tokens."""
    return chunk_gated_delta_rule(
        query,
        key,
        value,
        g,
        beta,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        **kwargs,
    )


@without_autocast  # theirs computes in float32, whatever it is given
def _gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    output_final_state: bool,
    normalise: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor | None]:
    dtype = accumulation_dtype(query.dtype)
    T, H = value.shape[1:3]
    q, k, v = (_contiguous(x.to(dtype)) for x in (query, key, value))
    if T == 1:  # all overhead: both at once
        (q, k), (q_length, k_length) = _with_lengths(torch.stack((q, k)), H, normalise)
    else:
        q, q_length = _with_lengths(q, H, normalise)
        k, k_length = _with_lengths(k, H, normalise)
    v = v * k_length.reciprocal()
    gates: dict[str, Any] = {"log_decay": g.to(dtype), "beta": beta.to(dtype) * k_length.squeeze(-1).square()}
    state = None
    if initial_state is not None:
        seen = torch.zeros(len(initial_state), dtype=torch.int64, device=value.device)
        state = CosineState(initial_state.to(dtype), seen)
    if T == 1 and cu_seqlens is None:
        o, final = cosine_attention_step(q, k, v, None, state, **gates)
    else:
        o, final = cosine_attention(
            q,
            k,
            v,
            None,
            causal=True,
            cu_seqlens=cu_seqlens,
            initial_state=state,
            output_final_state=output_final_state,
            chunk_size=chunk_size,
            **gates,
        )
    o = (o * (q_length * q.shape[-1] ** -0.5)).to(query.dtype)
    return o, final.kv if output_final_state and final is not None else None


def _contiguous(x: Tensor) -> Tensor:
    """`[B, T, H, D]`. It comes from a convolution along T: a matrix is turned three times as fast as four dims."""
    if x.is_contiguous() or x.stride(1) != 1:
        return x.contiguous()
    given = x.unbind() if len(x) > 1 else [x.squeeze(0)]
    rows = [row.permute(1, 2, 0).flatten(0, 1).t().contiguous().unflatten(1, x.shape[2:]) for row in given]
    return torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)


def _with_lengths(x: Tensor, H: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Queries or keys `[..., G, K]` for H heads, and the lengths that theirs have in the state, `[..., H, 1]`."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if torch.compiler.is_compiling() or bool((length.detach() < _SHORT).any()):
        is_short = length < _SHORT
        first = torch.arange(x.shape[-1], device=x.device) == 0
        x = torch.where(is_short, _TIMES * (x + _LEAST_LENGTH * first), x)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        length = torch.where(is_short, length / _TIMES, length)
    if normalise:
        length = length / torch.hypot(length, length.new_tensor(_EPS**0.5))
    repeats = H // x.shape[-2]
    if repeats > 1:  # as repeat_interleave does, in fewer steps
        x, length = (y.unsqueeze(-2).expand(*y.shape[:-1], repeats, -1).flatten(-3, -2) for y in (x, length))
    return x, length


def boundaries_of(cu_seqlens: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
    """cu_seqlens, or what the number of each token's sequence says instead; None where nothing is packed."""
    if cu_seqlens is not None or seq_idx is None:
        return cu_seqlens
    numbers = seq_idx.reshape(-1)
    starts = (numbers[1:] != numbers[:-1]).nonzero().flatten() + 1
    return torch.cat([starts.new_tensor([0]), starts, starts.new_tensor([numbers.shape[0]])]).to(torch.int32)


def packed_causal_conv1d(
    hidden_states: Tensor,  # [1, D, T]
    weight: Tensor,  # [D, W]
    bias: Tensor | None,  # [D]
    activation: str | None,
    cu_seqlens: Tensor,  # [N+1]
) -> Tensor:
    """The depthwise convolution before the rule, for packed sequences: none reads what is before its own start.

    Raises:
        ValueError: the tokens are not those of cu_seqlens, as with a cache that holds a past.
    """
    T, width = hidden_states.shape[-1], weight.shape[-1]
    if hidden_states.shape[0] != 1 or int(cu_seqlens[-1]) != T:
        raise ValueError(
            f"packed sequences must be one row of cu_seq_lens_q[-1] = {int(cu_seqlens[-1])} tokens, without a past in "
            f"a cache; got {hidden_states.shape[0]} rows of {T}"
        )
    position = torch.arange(T, device=hidden_states.device)
    starts = cu_seqlens.to(torch.int64)
    position = position - starts[torch.bucketize(position, starts[1:], right=True)]  # [T] in its own sequence
    x = hidden_states.to(weight.dtype)
    out = x * weight[:, -1:] if bias is None else x * weight[:, -1:] + bias[:, None]
    for back in range(1, width):
        earlier = pad(x, (back, 0))[..., :T].masked_fill(position < back, 0)
        out = out + earlier * weight[:, width - 1 - back, None]
    if activation is not None:
        from transformers.activations import ACT2FN

        out = ACT2FN[activation](out)
    return out.to(hidden_states.dtype)
