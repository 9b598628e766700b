"""Where the slice of one rank lies in a sequence that a process group shares, for causal attention.

Rank r holds the tokens behind those of ranks 0 .. r - 1; slices may differ in length and be empty. What is given once
for the whole sequence is the same on every rank: the boundaries of packed texts, which count through all slices, and an
initial state. So the gradient of an initial state, like that of any weight, is on each rank the part of its own tokens.

    place = slice_of(q, mask, cu_seqlens, state, group)
    place.counts, place.before, place.head, place.tail
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from cottention.ops.sharded.collectives import begin
from cottention.ops.state import CosineState
from cottention.ops.validation import check_boundaries


def slice_of(
    x: Tensor,  # [B, T, ...]
    mask: Tensor | None,  # [B, T] bool
    cu_seqlens: Tensor | None,  # [N+1] of the whole row
    state: CosineState | None,
    group: dist.ProcessGroup,
) -> Slice:
    """The place of this rank's tokens. All ranks of the group ask at once."""
    if cu_seqlens is None:
        return PaddedSlice(x, mask, state, group)
    return PackedSlice(x, cu_seqlens, state, group)


def gathered_lengths(x: Tensor, group: dist.ProcessGroup) -> list[int]:
    """T of every rank, known to the host."""
    own = torch.tensor([x.shape[1]], dtype=torch.int64, device=x.device)
    return begin("gather", own, group).wait().flatten().tolist()


def check_shared_boundaries(cu_seqlens: Tensor, x: Tensor, num_tokens: int) -> list[int]:
    """The boundaries, as numbers.

    Raises:
        ValueError: they do not run through all slices from 0 to the last token.
    """
    boundaries = cu_seqlens.tolist()
    if boundaries[-1] == x.shape[1] != num_tokens:
        raise ValueError(
            "cu_seqlens must be the boundaries of the whole row, through all ranks of process_group, "
            f"{num_tokens} tokens; got those of this rank's {x.shape[1]}"
        )
    check_boundaries(boundaries, num_tokens)
    return boundaries


class Slice:
    """What both kinds tell.

    Attributes:
        group: who shares the sequence.
        size: R.
        counts: `[B, T]`, real tokens of its text up to each token, this one included.
        num_texts: texts with a token here; rows where they are not packed.
        own_boundaries: those of packed texts, within this slice; None where each row is one text.
        before: the slices, from the first up to but without the second, whose states the first text here goes on from.
        head: the tokens that go on from them.
        tail: the tokens whose state goes out.
    """

    is_packed: bool
    counts: Tensor
    num_texts: int
    own_boundaries: Tensor | None
    before: tuple[int, int]
    head: slice
    tail: slice

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def own_states(self, state: CosineState | None, zeros: Tensor) -> CosineState:
        """Where the texts here start when the slice is taken by itself; `zeros` are states of nothing."""
        raise NotImplementedError

    def start(self, state: CosineState | None) -> Tensor | None:
        """The state before the first of the slices that are composed; None: nothing."""
        raise NotImplementedError

    def begun_here(self, state: CosineState | None) -> Tensor | None:
        """The initial state that the text at the end of this slice brings along, `[1, H, K, V]`."""
        raise NotImplementedError

    def entered_first(self, eye: Tensor) -> Tensor:
        """`eye` `[num_texts, H, K, K]` where a text goes on from an earlier slice, zero elsewhere."""
        raise NotImplementedError

    def last_of(self, kv: Tensor) -> Tensor:
        """Of the texts' states and maps `[num_texts, H, K, V + K]` those that go out."""
        raise NotImplementedError

    def total(self, state: CosineState | None) -> Tensor:
        """Real tokens of each sequence in all, `[N]`."""
        raise NotImplementedError

    def final_states(
        self, state: CosineState | None, own: CosineState | None, entered: Tensor, zeros: Tensor
    ) -> CosineState:
        """Each packed text's state at its end, on every rank; of states here, and what of P is left in the first."""
        raise NotImplementedError


class PaddedSlice(Slice):
    """Each row is one text, real where the mask is."""

    is_packed = False

    def __init__(self, x: Tensor, mask: Tensor | None, state: CosineState | None, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        B, T = x.shape[:2]
        own = torch.full((B,), T, device=x.device) if mask is None else mask.sum(-1)
        everyone = begin("gather", own, group).wait()  # [R, B]
        self._before, self._total = everyone[: self.rank].sum(0), everyone.sum(0)
        if state is not None:
            self._before, self._total = self._before + state.seen, self._total + state.seen
        within = torch.arange(1, T + 1, device=x.device)[None] if mask is None else mask.cumsum(-1)
        self.counts = within + self._before[:, None]
        self.num_texts, self.own_boundaries = B, None
        self.before = (0, self.rank)
        self.head = self.tail = slice(None)

    def own_states(self, state: CosineState | None, zeros: Tensor) -> CosineState:
        """See `Slice`."""
        return CosineState(zeros, self._before)

    def start(self, state: CosineState | None) -> Tensor | None:
        """See `Slice`."""
        return None if state is None else state.kv

    def begun_here(self, state: CosineState | None) -> Tensor | None:
        """See `Slice`."""
        return None

    def entered_first(self, eye: Tensor) -> Tensor:
        """See `Slice`."""
        return eye

    def last_of(self, kv: Tensor) -> Tensor:
        """See `Slice`."""
        return kv

    def total(self, state: CosineState | None) -> Tensor:
        """See `Slice`."""
        return self._total


class PackedSlice(Slice):
    """Texts packed into one row, cut wherever the slices end. Only what crosses a cut is exchanged."""

    is_packed = True

    def __init__(self, x: Tensor, cu_seqlens: Tensor, state: CosineState | None, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        T, device = x.shape[1], x.device
        lengths = gathered_lengths(x, group)
        bounds = check_shared_boundaries(cu_seqlens, x, sum(lengths))
        starts = [sum(lengths[:r]) for r in range(self.size)]
        at = starts[self.rank]
        # texts with a token here: the first that ends behind the slice's begin, up to those that begin before its end
        self._first = bisect_right(bounds, at, lo=1) - 1
        self._stop = bisect_left(bounds, at + T, hi=len(bounds) - 1) if T else self._first
        self.num_texts = self._stop - self._first
        self._whole_lengths = cu_seqlens.to(torch.int64).diff()  # [N]
        inner = [min(max(b - at, 0), T) for b in bounds[self._first : self._stop + 1]] if T else [0]
        self.own_boundaries = torch.tensor(inner, dtype=torch.int32, device=device)
        self.goes_on = T > 0 and bounds[self._first] < at
        self.head, self.tail, self.before = slice(0, 0), slice(0, 0), (self.rank, self.rank)
        if self.goes_on:
            # of the slices that begin in this text or at its begin, the last empty ones are in front of it
            begun = bounds[self._first]
            holder = max(r for r in range(self.size) if starts[r] <= begun and lengths[r])
            self.before = (holder, self.rank)
            self.head = slice(0, inner[1])
        if T:
            self.tail = slice(inner[-2], T)
        self._ends = [at < b <= at + T and b > a for a, b in pairwise(bounds)]
        self._begins_here = T > 0 and bounds[self._stop - 1] >= at
        first = torch.zeros(self.num_texts, dtype=torch.int64, device=device)
        if self.goes_on:
            first[0] = at - bounds[self._first]
        self._seen = first if state is None else first + state.seen[self._first : self._stop]
        token = torch.arange(T, device=device)
        text = torch.bucketize(token, self.own_boundaries[1:].to(torch.int64), right=True)
        self.counts = (token - self.own_boundaries[text] + 1 + self._seen[text])[None] if T else token[None]

    def own_states(self, state: CosineState | None, zeros: Tensor) -> CosineState:
        """See `Slice`."""
        kv = zeros if state is None else state.kv[self._first : self._stop]
        if state is not None and self.goes_on:  # its text began, with its state, in an earlier slice
            kv = torch.cat([zeros[:1], kv[1:]])
        return CosineState(kv, self._seen)

    def start(self, state: CosineState | None) -> Tensor | None:
        """See `Slice`."""
        return None

    def begun_here(self, state: CosineState | None) -> Tensor | None:
        """See `Slice`."""
        if state is None:
            return None
        last = self._stop - 1
        # of no states it is zero, and still a function of them: on every rank the same graph
        return state.kv[last : last + 1] if self._begins_here else state.kv[:0].sum(0, keepdim=True)

    def entered_first(self, eye: Tensor) -> Tensor:
        """See `Slice`."""
        if not self.num_texts:
            return eye
        return torch.cat([eye[:1] if self.goes_on else torch.zeros_like(eye[:1]), torch.zeros_like(eye[1:])])

    def last_of(self, kv: Tensor) -> Tensor:
        """See `Slice`."""
        if self.num_texts:
            return kv[-1:]
        H, K, wide = kv.shape[1:]
        one = torch.eye(K, dtype=kv.dtype, device=kv.device).expand(1, H, K, K)
        return torch.cat([kv.new_zeros(1, H, K, wide - K), one], -1)

    def total(self, state: CosineState | None) -> Tensor:
        """See `Slice`."""
        return self._whole_lengths if state is None else self._whole_lengths + state.seen

    def final_states(
        self, state: CosineState | None, own: CosineState | None, entered: Tensor, zeros: Tensor
    ) -> CosineState:
        """See `Slice`."""
        N = len(self._whole_lengths)
        kv = zeros if own is None else own.kv
        if self.goes_on:
            kv = torch.cat([kv[:1] + entered, kv[1:]])
        else:
            kv = kv + entered[:0].sum(0)
        ended = torch.tensor(self._ends, dtype=torch.bool, device=kv.device)
        kv = pad(kv, (0, 0, 0, 0, 0, 0, self._first, N - self._stop))
        kv = torch.where(ended[:, None, None, None], kv, 0)
        kv = begin("add", kv, self.group).wait()
        if state is not None:
            kv = torch.where((self._whole_lengths > 0)[:, None, None, None], kv, state.kv)
        return CosineState(kv, self.total(state))
