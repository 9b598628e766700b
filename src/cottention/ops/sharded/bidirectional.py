"""Bidirectional cosine attention over a sequence of which each rank of a process group holds a slice: one all-reduce.

    S = sum over ranks of k_hat^T v,  n = sum over ranks of real tokens,  o_t = q_hat_t^T S / n ** sigmoid(m)

With log_decay a token's weight falls with its distance on both sides, so each rank sends two states, what a token
behind the slice and what one before it reads, and the sum L of log_decay in it; each rank gathers all of them:

    o_t = (the slice by itself)_t + exp(G_t) q_hat_t^T P_before + exp(L - G_t) q_hat_t^T P_behind      all / n ** p

G is the running sum of log_decay in the slice. Of packed texts only those that a cut runs through are exchanged, at
most R - 1 of them; the others are attended as on one process. Bytes a call and rank, numbers of 4 (float64: 8):

    no decay    N * H * K V summed, N = B rows or texts cut; and 8 (B + 1) of counts
    log_decay   R * N * H * (2 K V + 2) received, N = B, or 1 of packed texts
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cottention.ops.autocast import without_autocast
from cottention.ops.layouts import unit
from cottention.ops.sharded.causal import LEAST_LOG_DECAY, AddingMaps, summed_behind
from cottention.ops.sharded.collectives import begin
from cottention.ops.sharded.slices import check_shared_boundaries, gathered_lengths
from cottention.ops.state import accumulation_dtype


class _Segment(NamedTuple):
    """Tokens here of a text that other ranks hold tokens of, too."""

    part: slice
    ranks: tuple[int, int]  # the first with a token of it, and behind the last
    index: int  # among the texts that are cut
    length: Tensor  # [B] real tokens of it on all ranks


@without_autocast
def sharded_bidirectional(
    q: Tensor,  # [B, T, H, K], T of this rank
    k: Tensor,  # [B, S, H, K]
    v: Tensor,  # [B, S, H, V]
    norm_const: Tensor | None,  # [H]
    *,
    run: Callable[..., tuple[Tensor, object]],
    group: dist.ProcessGroup,
    attention_mask: Tensor | None,  # [B, S] bool
    cu_seqlens: Tensor | None,  # [N+1] of the whole row
    log_decay: Tensor | None,  # [B, T, H]
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks; for the arguments see `cosine_attention`."""
    call = _Call(q, k, v, norm_const, run, group, attention_mask, log_decay)
    if cu_seqlens is not None:
        return call.packed(cu_seqlens)
    return call.padded()


class _Call:
    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norm_const: Tensor | None,
        run: Callable[..., tuple[Tensor, object]],
        group: dist.ProcessGroup,
        mask: Tensor | None,
        log_decay: Tensor | None,
    ) -> None:
        self.q, self.k, self.v, self.norm_const = q, k, v, norm_const
        self.run, self.group, self.mask = run, group, mask
        self.dtype, self.log_decay = accumulation_dtype(q.dtype), log_decay
        decay = None
        if log_decay is not None:
            decay = log_decay.to(self.dtype).clamp(min=LEAST_LOG_DECAY)
            decay = decay if mask is None else decay.masked_fill(~mask[..., None], 0)
        self.decay = decay  # [B, T, H]

    def padded(self) -> Tensor:
        """Each row is one text, which every rank holds a part of."""
        (B, T), S, mask = self.q.shape[:2], self.k.shape[1], self.mask
        own = torch.full((B,), S, device=self.q.device) if mask is None else mask.sum(-1)
        differ = own.new_full((1,), T != S)
        counting = begin("add", torch.cat([own, differ]), self.group)
        everywhere = (0, self.group.size())
        if self.decay is None:
            summing = begin("add", self._state(slice(None)), self.group)
            counts = counting.wait()
            segment = _Segment(slice(None), everywhere, 0, counts[:-1])
            q_hat = unit(self.q, self._query_mask(counts[-1]))
            o = torch.einsum("bthk,bhkv->bthv", q_hat, self._scaled(summing.wait(), segment.length))
        else:
            gathering = begin("gather", self._both_sides(slice(None), slice(None)), self.group)
            counts = counting.wait()
            segment = _Segment(slice(None), everywhere, 0, counts[:-1])
            o = self._decayed(segment, self._attended(segment), gathering.wait())
        query_mask = self._query_mask(counts[-1])
        o = o if query_mask is None else o.masked_fill(~query_mask[..., None, None], 0)
        return o.to(self.q.dtype)

    def _query_mask(self, num_differing: Tensor) -> Tensor | None:
        """The mask speaks of the queries too where they are the keys, so where each rank has as many of both."""
        if self.mask is None or self.q.shape[1] != self.k.shape[1]:
            return None
        return self.mask | (num_differing > 0)

    def packed(self, cu_seqlens: Tensor) -> Tensor:
        """Texts in one row: those within the slice as on one process, of those that are cut the parts here."""
        lengths = gathered_lengths(self.q, self.group)
        bounds = check_shared_boundaries(cu_seqlens, self.q, sum(lengths))
        rank, T = self.group.rank(), self.q.shape[1]
        at = sum(lengths[:rank])
        segments, num_cut = self._segments(bounds, lengths)
        head = next((each for each in segments if each.part.start == 0), None)
        tail = next((each for each in reversed(segments) if each.part.stop == T), None)
        if num_cut == 0:
            exchange = None
        elif self.decay is None:
            nothing = self._state(slice(0, 0))  # of no tokens: zero, and on every rank the same graph
            states = {each.index: self._state(each.part) for each in segments}
            exchange = begin("add", torch.cat([states.get(i, nothing) for i in range(num_cut)]), self.group)
        else:
            sides = (slice(0, 0) if each is None else each.part for each in (head, tail))
            exchange = begin("gather", self._both_sides(*sides), self.group)
        inner = slice(0 if head is None else head.part.stop, T if tail is None else tail.part.start)
        parts: list[tuple[int, Tensor]] = [(inner.start, self._inner(inner, bounds, at))]
        alone = [None if self.decay is None else self._attended(each) for each in segments]
        exchanged = None if exchange is None else exchange.wait()
        for segment, own in zip(segments, alone, strict=True):
            assert exchanged is not None
            if own is None:
                kv = self._scaled(exchanged[segment.index : segment.index + 1], segment.length)
                o = torch.einsum("bthk,bhkv->bthv", unit(self.q[:, segment.part], None), kv)
            else:
                o = self._decayed(segment, own, exchanged)
            parts.append((segment.part.start, o.to(self.q.dtype)))
        o = torch.cat([o for _, o in sorted(parts, key=lambda part: part[0])], 1)
        if exchanged is not None:  # of no numbers it is zero, and still a function of them
            o = o + exchanged.flatten()[:0].sum().to(o.dtype)
        return o

    def _segments(self, bounds: list[int], lengths: list[int]) -> tuple[list[_Segment], int]:
        """The parts here of texts that are cut, and how many texts are cut in all."""
        starts = [0, *accumulate(lengths)]
        rank = self.group.rank()
        at, stop = starts[rank], starts[rank + 1]
        cut = sorted({text for text in (_text_across(bounds, start) for start in starts[1:-1]) if text is not None})
        segments = []
        for index, text in enumerate(cut):
            begun, end = bounds[text], bounds[text + 1]
            if at < stop and at < end and begun < stop:
                holders = [r for r in range(len(lengths)) if lengths[r] and starts[r] < end and begun < starts[r + 1]]
                part = slice(max(begun, at) - at, min(end, stop) - at)
                length = torch.tensor([end - begun], device=self.q.device)
                segments.append(_Segment(part, (holders[0], holders[-1] + 1), index, length))
        return segments, len(cut)

    def _inner(self, part: slice, bounds: list[int], at: int) -> Tensor:
        """Attention of the texts that lie within the slice."""
        if part.stop <= part.start:
            # no tokens, and still a function of all arguments, of which each then has a gradient
            kv = self._scaled(self._state(slice(0, 0)), torch.ones(1, device=self.q.device))
            o = torch.einsum("bthk,bhkv->bthv", unit(self.q[:, :0], None), kv)
            return (o if self.decay is None else o * self.decay[:, :0, :, None]).to(self.q.dtype)
        begin_at, end_at = at + part.start, at + part.stop
        inner = [b - begin_at for b in bounds if begin_at <= b <= end_at]
        own = torch.tensor(inner, dtype=torch.int32, device=self.q.device)
        gates = {} if self.log_decay is None else {"log_decay": self.log_decay[:, part]}
        q, k, v = (x[:, part] for x in (self.q, self.k, self.v))
        return self.run(q, k, v, self.norm_const, causal=False, attention_mask=None, cu_seqlens=own, **gates)[0]

    def _state(self, part: slice) -> Tensor:
        """sum of k_hat^T v, `[B, H, K, V]`; not divided: n is known later, and the same for all."""
        mask = None if self.mask is None else self.mask[:, part]
        return torch.einsum("bthk,bthv->bhkv", unit(self.k[:, part], mask), self._value(part))

    def _value(self, part: slice) -> Tensor:
        v = self.v[:, part].to(self.dtype)
        return v if self.mask is None else v.masked_fill(~self.mask[:, part, None, None], 0)

    def _scaled(self, x: Tensor, length: Tensor) -> Tensor:
        """x `[B, H, K, V]` / max(n ** p, 1)."""
        if self.norm_const is None:
            return x
        p = torch.sigmoid(self.norm_const.to(self.dtype))
        return x * (length.clamp(min=1).to(self.dtype)[:, None] ** -p)[..., None, None]

    # With decay.

    def _both_sides(self, head: slice, tail: slice) -> Tensor:
        """What goes out, `[B, H, 2 (1 + K V)]`: of the tail what those behind read, of the head those before."""
        assert self.decay is not None
        parts = []
        for part, weight in ((tail, summed_behind(self.decay[:, tail])), (head, self.decay[:, head].cumsum(1))):
            mask = None if self.mask is None else self.mask[:, part]
            k_hat = unit(self.k[:, part], mask) * weight.exp()[..., None]
            state = torch.einsum("bthk,bthv->bhkv", k_hat, self._value(part))
            parts += [self.decay[:, part].sum(1)[..., None], state.flatten(2)]
        return torch.cat(parts, -1)

    def _attended(self, segment: _Segment) -> Tensor:
        """The segment by itself, undivided: in the dtype of sums, for these are of any size."""
        assert self.log_decay is not None
        part = segment.part
        q, k, v = (x[:, part].to(self.dtype) for x in (self.q, self.k, self.v))
        if not q.shape[1]:
            return torch.cat([q[..., :0], v], -1)
        mask = None if self.mask is None else self.mask[:, part]
        decay = self.log_decay[:, part]
        return self.run(q, k, v, None, causal=False, attention_mask=mask, cu_seqlens=None, log_decay=decay)[0]

    def _decayed(self, segment: _Segment, own: Tensor, gathered: Tensor) -> Tensor:
        """The segment's output, with what comes from both sides of it."""
        assert self.decay is not None
        decay, rank = self.decay[:, segment.part], self.group.rank()
        from_behind, from_before = gathered.chunk(2, -1)
        sizes = (self.q.shape[3], self.v.shape[3])
        before = AddingMaps(from_behind, True, sizes).composed(segment.ranks[0], rank, None)
        size = len(gathered)
        behind = AddingMaps(from_before.flip(0), True, sizes).composed(size - segment.ranks[1], size - 1 - rank, None)
        mask = None if self.mask is None else self.mask[:, segment.part]
        q_hat = unit(self.q[:, segment.part], mask)
        o = own
        for kv, weight in ((before, decay.cumsum(1)), (behind, summed_behind(decay))):
            o = o + weight.exp()[..., None] * torch.einsum("bthk,bhkv->bthv", q_hat, kv)
        return self._scaled(o.transpose(1, 2), segment.length).transpose(1, 2)


def _text_across(bounds: list[int], cut: int) -> int | None:
    """The text with tokens on both sides of a cut."""
    text = bisect_right(bounds, cut) - 1
    return text if text + 1 < len(bounds) and bounds[text] < cut else None
