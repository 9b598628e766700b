"""Tokens in chunks of C slots, in shapes that no value decides: for forms that are mapped, traced and differentiated.

A sequence begins on a chunk of its own; empty slots hold zeros, which add nothing to any sum. `R` is the number of
rows, `M` that of chunks in each.

    layout = layout_of(q, cu_seqlens, C)
    chunks = layout.chunks(unit(q, mask))        # [R, M, C, H, K]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from cottention.ops.state import MIN_NORM, accumulation_dtype

CHUNK_SIZE = 64


def layout_of(x: Tensor, cu_seqlens: Tensor | None, chunk_size: int = CHUNK_SIZE) -> Padded | Packed:
    """Where the tokens of x `[B, T, ...]` lie."""
    return Padded(x, chunk_size) if cu_seqlens is None else Packed(x, cu_seqlens, chunk_size)


def unit(x: Tensor, mask: Tensor | None) -> Tensor:
    """x_hat; its length is a root of a clamped square, which has derivatives of any order where x is zero."""
    x = x.to(accumulation_dtype(x.dtype))
    if mask is not None:
        x = x.masked_fill(~mask[..., None, None], 0)
    return x / x.square().sum(-1, keepdim=True).clamp(min=MIN_NORM**2).sqrt()


def divided(v: Tensor, norm_const: Tensor | None, count: Tensor, mask: Tensor | None) -> Tensor:
    """v' = v / max(c ** p, 1), with counts `[B, S]` or `[B, 1]`."""
    v = v.to(accumulation_dtype(v.dtype))
    if mask is not None:
        v = v.masked_fill(~mask[..., None, None], 0)
    if norm_const is None:
        return v
    p = torch.sigmoid(norm_const.to(v.dtype))
    return v / (count.clamp(min=1).to(v.dtype)[..., None] ** p)[..., None]


def finished(o: Tensor, q: Tensor, mask: Tensor | None) -> Tensor:
    """In q's dtype; padded queries are zero, and so is what flows back from them."""
    return (o if mask is None else o.masked_fill(~mask[..., None, None], 0)).to(q.dtype)


class Padded:
    """Each row of a batch in chunks of its own, the last filled up with zeros: R = B, M = ceil(T / C)."""

    def __init__(self, x: Tensor, chunk_size: int) -> None:
        self._B, self._T = x.shape[:2]
        self._C = chunk_size
        self._M = -(-self._T // chunk_size)
        self._device = x.device

    def chunks(self, x: Tensor) -> Tensor:
        """`[B, T, H, D]` as `[R, M, C, H, D]`."""
        filled = pad(x, (0, 0, 0, 0, 0, self._M * self._C - self._T))
        return filled.reshape(self._B, self._M, self._C, *x.shape[2:])

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

    def enter(self, m: int, state: Tensor, own: Tensor, *, backward: bool = False) -> Tensor:
        """The state `[R, H, K, V]` at which a walk over the chunks meets chunk m, from that behind the one it left.

        own: `[N, H, K, V]`, where each sequence starts. Backward, chunks come in the other order, and so do ends.
        """
        return state

    def reached(self, states: list[Tensor], own: Tensor, *, backward: bool = False) -> Tensor:
        """Each sequence's last state `[N, H, K, V]`, of those behind the chunks as they were walked."""
        return states[-1] if states else own


class Packed:
    """Packed sequences, each begun on a chunk of its own: R = 1, and M = T // C + N, the most that there can be."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor, chunk_size: int) -> None:
        T, N = x.shape[1], cu_seqlens.shape[0] - 1
        self._C = chunk_size
        bounds = cu_seqlens.to(torch.int64)
        self._lengths = bounds.diff()
        self._M = T // self._C + N
        ends = ((self._lengths + self._C - 1) // self._C).cumsum(0)  # [N] in chunks
        tokens = torch.arange(T, device=x.device)
        self.sequence = torch.bucketize(tokens, bounds[1:], right=True)  # [T]
        self._position = tokens - bounds[self.sequence]
        first = pad(ends, (1, 0))[self.sequence]
        self._slot = first * self._C + self._position  # [T]
        # the token of each slot, or T, a row of zeros
        empty = torch.full((self._M * self._C,), T, device=x.device)
        self._token = empty.scatter(0, self._slot, tokens)
        chunk = torch.arange(self._M, device=x.device)
        self._of_chunk = torch.bucketize(chunk, ends, right=True)  # [M], N where a chunk is not used
        self._firsts, self._lasts = pad(ends, (1, 0))[:-1], ends - 1  # [N] in chunks
        differs = self._of_chunk[1:] != self._of_chunk[:-1]
        self._is_first, self._is_last = pad(differs, (1, 0), value=True), pad(differs, (0, 1), value=True)  # [M]
        self._belongs = self._of_chunk[:, None] == torch.arange(N, device=x.device)  # [M, N]

    def chunks(self, x: Tensor) -> Tensor:
        """See `Padded`."""
        slots = pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, self._token)
        return slots.reshape(1, self._M, self._C, *x.shape[2:])

    def tokens(self, chunks: Tensor) -> Tensor:
        """See `Padded`."""
        return chunks.flatten(1, 2).index_select(1, self._slot)

    def counts(self, mask: Tensor | None, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Padded`."""
        assert mask is None, "packed sequences hold no padding"
        count = (self._position + 1)[None]
        return (count, self._lengths) if seen is None else (count + seen[self.sequence], self._lengths + seen)

    def before(self, states: Tensor) -> Tensor:
        """See `Padded`."""
        same = (self._of_chunk[:, None] == self._of_chunk).tril(-1).to(states.dtype)  # [M, M]
        return torch.einsum("nm,rmhkv->rnhkv", same, states)

    def of_chunks(self, kv: Tensor) -> Tensor:
        """See `Padded`."""
        return torch.einsum("mn,nhkv->mhkv", self._belongs.to(kv.dtype), kv)[None]

    def sums(self, states: Tensor) -> Tensor:
        """See `Padded`."""
        return torch.einsum("mn,rmhkv->nhkv", self._belongs.to(states.dtype), states)

    def enter(self, m: int, state: Tensor, own: Tensor, *, backward: bool = False) -> Tensor:
        """See `Padded`."""
        if not len(own):
            return state
        starts = self._is_last if backward else self._is_first
        fresh = own.index_select(0, self._of_chunk[m : m + 1].clamp(max=len(own) - 1))
        return torch.where(starts[m], fresh, state)

    def reached(self, states: list[Tensor], own: Tensor, *, backward: bool = False) -> Tensor:
        """See `Padded`."""
        if not states or not len(own):
            return own
        chunk = self._M - 1 - self._firsts if backward else self._lasts
        found = torch.cat(states).index_select(0, chunk.clamp(0, self._M - 1))
        return torch.where((self._lengths > 0)[:, None, None, None], found, own)
