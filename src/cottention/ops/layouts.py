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


class _Layout:
    """Tokens are found by index and never by slices: exported for any length, a program needs no proof that they fit.

    Attributes:
        token: `[M, C]`, the token of each slot; T where there is none.
        slot: `[T]`, the slot of each token.
    """

    token: Tensor
    slot: Tensor

    def chunks(self, x: Tensor) -> Tensor:
        """`[B, T, H, D]` as `[R, M, C, H, D]`."""
        slots = pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, self.token.flatten())
        return slots.unflatten(1, self.token.shape)

    def tokens(self, chunks: Tensor) -> Tensor:
        """`[R, M, C, H, D]` as `[B, T, H, D]`."""
        return chunks.flatten(1, 2).index_select(1, self.slot)


def _slots(num_chunks: int, chunk_size: int, device: torch.device) -> Tensor:
    """`[M, C]`: 0, 1, 2, ..."""
    return torch.arange(num_chunks, device=device)[:, None] * chunk_size + torch.arange(chunk_size, device=device)


class Padded(_Layout):
    """Each row of a batch in chunks of its own, the last filled up with zeros: R = B, M = ceil(T / C)."""

    def __init__(self, x: Tensor, chunk_size: int) -> None:
        self._B, self._T = x.shape[:2]
        # A program that is exported for any length must know that M is not 1: a spare chunk makes it 2.
        spare = chunk_size if torch.compiler.is_exporting() else 0
        # of positive numbers: ONNX divides towards zero
        num_chunks = (self._T + spare + chunk_size - 1) // chunk_size
        self.slot = torch.arange(self._T, device=x.device)
        self.token = _slots(num_chunks, chunk_size, x.device).clamp(max=self._T)

    def counts(self, mask: Tensor | None, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Real tokens up to each token `[B, T]` and in all `[B]`."""
        if mask is None:
            count = (self.slot + 1).expand(self._B, -1)
            total = torch.full((self._B,), self._T, device=self.slot.device)
        else:
            count, total = mask.cumsum(-1), mask.sum(-1)
        return (count, total) if seen is None else (count + seen[:, None], total + seen)

    def scan(self, states: Tensor, kv: Tensor | None) -> tuple[Tensor, Tensor]:
        """From the chunks' states `[R, M, H, K, V]` those before each, and each sequence's last one `[N, H, K, V]`."""
        # the first state joins the sum at its start: adding it to all would ask of an exported M whether it is 1
        first = states.new_zeros(self._B, 1, *states.shape[2:]) if kv is None else kv[:, None]
        sums = torch.cat([first, states], 1).cumsum(1)  # [R, M + 1, H, K, V]
        return sums[:, :-1], sums[:, -1]

    def enter(self, m: int, state: Tensor, own: Tensor, *, backward: bool = False) -> Tensor:
        """The state `[R, H, K, V]` at which a walk over the chunks meets chunk m, from that behind the one it left.

        own: `[N, H, K, V]`, where each sequence starts. Backward, chunks come in the other order, and so do ends.
        """
        return state

    def reached(self, states: list[Tensor], own: Tensor, *, backward: bool = False) -> Tensor:
        """Each sequence's last state `[N, H, K, V]`, of those behind the chunks as they were walked."""
        return states[-1] if states else own


class Packed(_Layout):
    """Packed sequences, each begun on a chunk of its own: R = 1, M = ceil(T / C) + N, enough for all."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor, chunk_size: int) -> None:
        T, N, device = x.shape[1], cu_seqlens.shape[0] - 1, x.device
        self._M = (T + N * chunk_size + chunk_size - 1) // chunk_size  # as one quotient, which an export can compare
        bounds = cu_seqlens.to(torch.int64)
        self._lengths = bounds.diff()  # [N]
        ends = ((self._lengths + chunk_size - 1) // chunk_size).cumsum(0)  # [N] in chunks
        first = pad(ends, (1, 0)) * chunk_size  # [N + 1] the first slot of each sequence
        tokens = torch.arange(T, device=device)
        self.sequence = torch.bucketize(tokens, bounds[1:], right=True)  # [T]
        self._position = tokens - bounds[self.sequence]
        self.slot = first[self.sequence] + self._position
        chunk = torch.arange(self._M, device=device)
        self._of_chunk = torch.bucketize(chunk, ends, right=True)  # [M], N where a chunk is not used
        position = _slots(self._M, chunk_size, device) - first[self._of_chunk, None]  # [M, C]
        filled = position < pad(self._lengths, (0, 1))[self._of_chunk, None]
        self.token = torch.where(filled, position + bounds[self._of_chunk, None], T)
        self._firsts, self._lasts = pad(ends, (1, 0))[:-1], ends - 1  # [N] in chunks
        differs = self._of_chunk[1:] != self._of_chunk[:-1]
        self._is_first, self._is_last = pad(differs, (1, 0), value=True), pad(differs, (0, 1), value=True)  # [M]
        self._belongs = self._of_chunk[:, None] == torch.arange(N, device=device)  # [M, N]

    def counts(self, mask: Tensor | None, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Padded`."""
        assert mask is None, "packed sequences hold no padding"
        count = (self._position + 1)[None]
        return (count, self._lengths) if seen is None else (count + seen[self.sequence], self._lengths + seen)

    def scan(self, states: Tensor, kv: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Padded`."""
        same = (self._of_chunk[:, None] == self._of_chunk).tril(-1).to(states.dtype)  # [M, M]
        before, reached = torch.einsum("nm,rmhkv->rnhkv", same, states), self.sums(states)
        return (before, reached) if kv is None else (before + self.of_chunks(kv), reached + kv)

    def of_chunks(self, kv: Tensor) -> Tensor:
        """The state of each chunk's sequence."""
        return torch.einsum("mn,nhkv->mhkv", self._belongs.to(kv.dtype), kv)[None]

    def sums(self, states: Tensor) -> Tensor:
        """The sum of each sequence's states `[N, H, K, V]`."""
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
