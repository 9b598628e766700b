"""Cosine attention in differentiable PyTorch operators and linear memory: the form that any transform can go through.

The fused forms have a forward and a backward of their own. What else is asked of them is computed here, by autograd:
derivatives of derivatives, forward-mode tangents, torch.func. Chunks of C tokens as in `chunk.py`, all at once:

    S_n = S_0 + sum_{i < n} k_hat_i^T v'_i          v' = v / max(c ** p, 1)
    o_n = q_hat_n S_n + tril(q_hat_n k_hat_n^T) v'_n

No shape depends on a value and no value is read, so these forms can be mapped, traced and exported for any length.

    o, kv, seen = plain_causal(q, k, v, m, mask, cu_seqlens, kv0, seen0, True)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from cottention.ops.autocast import without_autocast
from cottention.ops.state import MIN_NORM, CosineState, accumulation_dtype

_CHUNK_SIZE = 64


@without_autocast
def plain_causal(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,
    v: Tensor,  # [B, T, H, V]
    norm_const: Tensor | None,  # [H]
    mask: Tensor | None,  # [B, T] bool
    cu_seqlens: Tensor | None,  # [N+1]
    kv: Tensor | None,  # [N, H, K, V]
    seen: Tensor | None,  # [N]
) -> tuple[Tensor, Tensor, Tensor]:
    """o `[B, T, H, V]`, and the kv and seen that are reached."""
    layout = _Padded(q) if cu_seqlens is None else _Packed(q, cu_seqlens)
    q_hat, k_hat = (layout.chunks(_unit(x, mask)) for x in (q, k))  # [R, M, C, H, K]
    count, total = layout.counts(mask, seen)
    value = layout.chunks(_divided(v, norm_const, count, mask))  # [R, M, C, H, V]
    states = torch.einsum("rmchk,rmchv->rmhkv", k_hat, value)
    before = layout.before(states)
    if kv is not None:
        before = before + layout.of_chunks(kv)
    scores = torch.einsum("rmchk,rmdhk->rmhcd", q_hat, k_hat).tril()
    o = torch.einsum("rmhcd,rmdhv->rmchv", scores, value) + torch.einsum("rmchk,rmhkv->rmchv", q_hat, before)
    reached = layout.sums(states)
    return _finished(layout.tokens(o), q, mask), reached if kv is None else reached + kv, total


@without_autocast
def plain_bidirectional(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, S, H, K]
    v: Tensor,  # [B, S, H, V]
    norm_const: Tensor | None,  # [H]
    mask: Tensor | None,  # [B, S] bool
    cu_seqlens: Tensor | None,  # [N+1]
) -> tuple[Tensor, Tensor]:
    """o `[B, T, H, V]`, and each sequence's state over all its keys `[N, H, K, V]`."""
    query_mask = mask if q.shape[1] == k.shape[1] else None  # in cross-attention the mask speaks of the keys alone
    q_hat, k_hat = _unit(q, query_mask), _unit(k, mask)
    if cu_seqlens is None:
        B, S = k.shape[:2]
        total = torch.full((B, 1), S, device=k.device) if mask is None else mask.sum(-1, keepdim=True)  # [B, 1]
        kv = torch.einsum("bshk,bshv->bhkv", k_hat, _divided(v, norm_const, total, mask))
        return _finished(torch.einsum("bthk,bhkv->bthv", q_hat, kv), q, query_mask), kv
    layout = _Packed(q, cu_seqlens)
    _, total = layout.counts(mask, None)
    value = layout.chunks(_divided(v, norm_const, total[layout.sequence][None], mask))
    kv = layout.sums(torch.einsum("rmchk,rmchv->rmhkv", layout.chunks(k_hat), value))
    o = torch.einsum("rmchk,rmhkv->rmchv", layout.chunks(q_hat), layout.of_chunks(kv))
    return _finished(layout.tokens(o), q, query_mask), kv


@without_autocast
def plain_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    state: CosineState | None,
    attention_mask: Tensor | None,
) -> tuple[Tensor, CosineState]:
    """One token, for the checked arguments of `cosine_attention_step`."""
    q1, k1, v1 = (x.squeeze(1) if x.dim() == 4 else x for x in (q, k, v))  # [B, H, K or V]
    B, H, K = q1.shape
    dtype = accumulation_dtype(q.dtype)
    if state is None:
        state = CosineState.zeros(B, H, K, v1.shape[-1], dtype=dtype, device=q.device)
    real = None
    if attention_mask is not None:
        real = attention_mask.reshape(B).to(torch.bool)
        q1, k1, v1 = (x.masked_fill(~real[:, None, None], 0) for x in (q1, k1, v1))
    q_hat, k_hat = (torch.nn.functional.normalize(x.to(dtype), dim=-1, eps=MIN_NORM) for x in (q1, k1))
    seen = state.seen + (1 if real is None else real.to(torch.int64))  # [B]
    value = v1.to(dtype)
    if norm_const is not None:
        p = torch.sigmoid(norm_const.to(dtype))  # [H]
        value = value / (seen.clamp(min=1).to(dtype)[:, None] ** p)[..., None]
    kv = state.kv + k_hat[..., None] * value[..., None, :]  # [B, H, K, V]
    o = torch.einsum("bhk,bhkv->bhv", q_hat, kv)
    if real is not None:  # zero already; this is for what flows back
        o = o.masked_fill(~real[:, None, None], 0)
    return o.to(q.dtype).reshape(*q.shape[:-1], v.shape[-1]), CosineState(kv, seen)


def _unit(x: Tensor, mask: Tensor | None) -> Tensor:
    """x_hat; its length is a root of a clamped square, which has derivatives of any order where x is zero."""
    x = x.to(accumulation_dtype(x.dtype))
    if mask is not None:
        x = x.masked_fill(~mask[..., None, None], 0)
    return x / x.square().sum(-1, keepdim=True).clamp(min=MIN_NORM**2).sqrt()


def _divided(v: Tensor, norm_const: Tensor | None, count: Tensor, mask: Tensor | None) -> Tensor:
    """v' = v / max(c ** p, 1), with counts `[B, S]` or `[B, 1]`."""
    v = v.to(accumulation_dtype(v.dtype))
    if mask is not None:
        v = v.masked_fill(~mask[..., None, None], 0)
    if norm_const is None:
        return v
    p = torch.sigmoid(norm_const.to(v.dtype))
    return v / (count.clamp(min=1).to(v.dtype)[..., None] ** p)[..., None]


def _finished(o: Tensor, q: Tensor, mask: Tensor | None) -> Tensor:
    """In q's dtype; padded queries are zero, and so is what flows back from them."""
    return (o if mask is None else o.masked_fill(~mask[..., None, None], 0)).to(q.dtype)


class _Padded:
    """Each row of a batch in chunks of its own, the last filled up with zeros: R = B, M = ceil(T / C)."""

    def __init__(self, x: Tensor) -> None:
        self._B, self._T = x.shape[:2]
        self._M = -(-self._T // _CHUNK_SIZE)
        self._device = x.device

    def chunks(self, x: Tensor) -> Tensor:
        """`[B, T, H, D]` as `[R, M, C, H, D]`."""
        filled = pad(x, (0, 0, 0, 0, 0, self._M * _CHUNK_SIZE - self._T))
        return filled.reshape(self._B, self._M, _CHUNK_SIZE, *x.shape[2:])

    def tokens(self, chunks: Tensor) -> Tensor:
        """`[R, M, C, H, D]` as `[B, T, H, D]`."""
        return chunks.flatten(1, 2)[:, : self._T]

    def counts(self, mask: Tensor | None, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Real tokens up to each token `[B, T]` and in all `[B]`."""
        if mask is None:
            count = torch.arange(1, self._T + 1, device=self._device).expand(self._B, -1)
            total = torch.full((self._B,), self._T, device=self._device)
        else:
            count, total = mask.cumsum(-1), mask.sum(-1)
        return (count, total) if seen is None else (count + seen[:, None], total + seen)

    def before(self, states: Tensor) -> Tensor:
        """The sum of the states `[R, M, H, K, V]` before each chunk."""
        return pad(states.cumsum(1), (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]

    def of_chunks(self, kv: Tensor) -> Tensor:
        """The state of each chunk's sequence."""
        return kv[:, None]

    def sums(self, states: Tensor) -> Tensor:
        """The sum of each sequence's states `[N, H, K, V]`."""
        return states.sum(1)


class _Packed:
    """Packed sequences, each begun on a chunk of its own: R = 1, and M = T // C + N, the most that there can be."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor) -> None:
        T, N = x.shape[1], cu_seqlens.shape[0] - 1
        bounds = cu_seqlens.to(torch.int64)
        self._lengths = bounds.diff()
        self._M = T // _CHUNK_SIZE + N
        ends = ((self._lengths + _CHUNK_SIZE - 1) // _CHUNK_SIZE).cumsum(0)  # [N] in chunks
        tokens = torch.arange(T, device=x.device)
        self.sequence = torch.bucketize(tokens, bounds[1:], right=True)  # [T]
        self._position = tokens - bounds[self.sequence]
        first = pad(ends, (1, 0))[self.sequence]
        self._slot = first * _CHUNK_SIZE + self._position  # [T]
        # the token of each slot, or T, a row of zeros
        empty = torch.full((self._M * _CHUNK_SIZE,), T, device=x.device)
        self._token = empty.scatter(0, self._slot, tokens)
        chunk = torch.arange(self._M, device=x.device)
        self._of_chunk = torch.bucketize(chunk, ends, right=True)  # [M], N where a chunk is not used
        self._belongs = self._of_chunk[:, None] == torch.arange(N, device=x.device)  # [M, N]

    def chunks(self, x: Tensor) -> Tensor:
        slots = pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, self._token)
        return slots.reshape(1, self._M, _CHUNK_SIZE, *x.shape[2:])

    def tokens(self, chunks: Tensor) -> Tensor:
        return chunks.flatten(1, 2).index_select(1, self._slot)

    def counts(self, mask: Tensor | None, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        assert mask is None, "packed sequences hold no padding"
        count = (self._position + 1)[None]
        return (count, self._lengths) if seen is None else (count + seen[self.sequence], self._lengths + seen)

    def before(self, states: Tensor) -> Tensor:
        same = (self._of_chunk[:, None] == self._of_chunk).tril(-1).to(states.dtype)  # [M, M]
        return torch.einsum("nm,rmhkv->rnhkv", same, states)

    def of_chunks(self, kv: Tensor) -> Tensor:
        return torch.einsum("mn,nhkv->mhkv", self._belongs.to(kv.dtype), kv)[None]

    def sums(self, states: Tensor) -> Tensor:
        return torch.einsum("mn,rmhkv->nhkv", self._belongs.to(states.dtype), states)
