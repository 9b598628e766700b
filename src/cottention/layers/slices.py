"""What a layer asks of other ranks where a process group shares the sequence, beside the operation's own exchange.

short convolutions      the last real inputs of the slices before, centred ones also the first of those behind
softmax                 keys and values of all slices: the layers of a hybrid whose traffic grows with the sequence
positions               real tokens in the slices before

q, k, v, inputs = convolve_slice(layer.convolve_whole, (q, k, v), width, num_before, group, attention_mask=mask)
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from cottention.ops import CosineState
from cottention.ops.sharded import as_group
from cottention.ops.sharded.collectives import begin, outside_graphs
from cottention.ops.sharded.slices import check_shared_boundaries, gathered_lengths, slice_of

Three = tuple[Tensor, Tensor, Tensor]


@outside_graphs
def counts_before(
    x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, seen: Tensor | None, process_group: Any
) -> Tensor:
    """The number of real tokens of its text before each token here, `[B, T]`, with those that a state has seen."""
    mask = None if attention_mask is None else attention_mask.to(torch.bool)
    state = None if seen is None else CosineState(seen.new_empty(0), seen)
    counts = slice_of(x, mask, cu_seqlens, state, as_group(process_group)).counts
    # padding before the first token is at its place, as on one process
    return (counts - 1).clamp(min=0) if seen is None or cu_seqlens is not None else (counts - 1).maximum(seen[:, None])


@outside_graphs
def convolve_slice(
    convolve: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]],
    projected: Three,  # [B, T, C] each
    width: int,
    num_before: int,
    process_group: Any,
    *,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    inputs: Tensor | None,  # [N, W-1, 3 C]
    keep_inputs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A layer's convolutions over slices: over this one and the tokens around it that its taps read, then cut out.

    Raises:
        ValueError: the inputs that packed texts go on from are asked for.
    """
    group = as_group(process_group)
    num_behind = width - 1 - num_before
    T = projected[0].shape[1]
    if cu_seqlens is not None:
        if keep_inputs:
            raise ValueError("output_final_state, cu_seqlens and process_group exclude each other beside short_conv")
        *wide, cu_seqlens, before = _around_packed(projected, num_before, num_behind, cu_seqlens, group)
        q, k, v, _ = convolve(*wide, attention_mask=None, cu_seqlens=cu_seqlens, inputs=inputs, keep_inputs=False)
        q, k, v = (x[:, before : before + T] for x in (q, k, v))
        return q, k, v, None
    halos = _Halos(projected, num_before, num_behind, attention_mask, inputs, group)
    wide = [torch.cat(parts, 1) for parts in zip(halos.before, projected, halos.behind, strict=True)]
    q, k, v, _ = convolve(
        *wide, attention_mask=halos.mask(attention_mask), cu_seqlens=None, inputs=None, keep_inputs=False
    )
    q, k, v = (x[:, num_before : num_before + T] for x in (q, k, v))
    return q, k, v, halos.last if keep_inputs else None


class _Halos:
    """The real tokens next to the slice on both sides, zeros where there are none. Bytes do not grow with T."""

    def __init__(
        self,
        projected: Three,
        num_before: int,
        num_behind: int,
        attention_mask: Tensor | None,
        inputs: Tensor | None,
        group: dist.ProcessGroup,
    ) -> None:
        x = projected[0]
        real = x.new_ones(x.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask.to(torch.bool)
        own = [_ends(projected, real, num_before, last=True), _ends(projected, real, num_behind, last=False)]
        everyone = begin("gather", torch.cat(own, 1), group).wait()  # [R, B, W-1, 3 C + 1]
        tails, heads = everyone.split([num_before, num_behind], 2)
        rank = group.rank()
        nothing = tails.new_zeros(*tails.shape[1:])
        if inputs is not None:  # of zeros where there were no tokens, which the taps then read as such
            nothing = pad(inputs.to(x.dtype), (0, 1), value=1)
        self._before = _nearest([nothing, *tails[:rank].unbind(0)], num_before, last=True, of=tails)
        self._behind = _nearest([*heads[rank + 1 :].unbind(0)], num_behind, last=False, of=heads)
        self.before = self._before[..., :-1].chunk(3, -1)
        self.behind = self._behind[..., :-1].chunk(3, -1)
        self.last = _nearest([nothing, *tails.unbind(0)], num_before, last=True, of=tails)[..., :-1]

    def mask(self, attention_mask: Tensor | None) -> Tensor | None:
        """That of the slice with its halos."""
        if attention_mask is None:
            return None
        before, behind = (x[..., -1].detach() > 0 for x in (self._before, self._behind))
        return torch.cat([before, attention_mask.to(torch.bool), behind], 1)


def _ends(projected: Three, real: Tensor, num: int, *, last: bool) -> Tensor:
    """The last or first real tokens `[B, num, 3 C + 1]`, close to the end they are of; the last channel says which."""
    order = real.to(torch.uint8).argsort(dim=1, stable=True, descending=not last)
    order = order[:, max(order.shape[1] - num, 0) :] if last else order[:, :num]
    found = torch.cat([x.gather(1, order[..., None].expand(-1, -1, x.shape[2])) for x in projected], -1)
    is_real = real.gather(1, order)[..., None]
    found = torch.cat([found.masked_fill(~is_real, 0), is_real.to(found.dtype)], -1)
    missing = num - found.shape[1]
    return pad(found, (0, 0, missing, 0) if last else (0, 0, 0, missing))


def _nearest(parts: list[Tensor], num: int, *, last: bool, of: Tensor) -> Tensor:
    """The last or first real ones of these in a row, `[B, num, 3 C + 1]`; a function of all that was gathered."""
    nothing = of[:0].sum(0)
    x = torch.cat([*([] if last else parts), nothing, *(parts if last else [])], 1)
    order = (x[..., -1].detach() > 0).to(torch.uint8).argsort(dim=1, stable=True, descending=not last)
    order = order[:, order.shape[1] - num :] if last else order[:, :num]
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))


def _around_packed(
    projected: Three, num_before: int, num_behind: int, cu_seqlens: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """The slice of a packed row with its neighbours, the boundaries in it, and how many tokens stand before it."""
    x, rank = projected[0], group.rank()
    lengths = gathered_lengths(x, group)
    bounds = check_shared_boundaries(cu_seqlens, x, sum(lengths))
    at = sum(lengths[:rank])
    every = x.new_ones(x.shape[:2], dtype=torch.bool)
    own = [_ends(projected, every, num_before, last=True), _ends(projected, every, num_behind, last=False)]
    everyone = begin("gather", torch.cat(own, 1), group).wait()[..., :-1]
    tails, heads = everyone.split([num_before, num_behind], 2)
    before = [tails[s][:, num_before - min(num_before, lengths[s]) :] for s in range(rank)]
    behind = [heads[s][:, : min(num_behind, lengths[s])] for s in range(rank + 1, len(lengths))]
    left = torch.cat([tails[:1, :, :0].sum(0), *before], 1)
    left = left[:, max(left.shape[1] - num_before, 0) :]
    right = torch.cat([*behind, heads[:1, :, :0].sum(0)], 1)[:, :num_behind]
    wide = torch.cat([left, torch.cat(projected, -1), right], 1)
    start = at - left.shape[1]
    inside = [min(max(bound - start, 0), wide.shape[1]) for bound in bounds]
    q, k, v = wide.chunk(3, -1)
    return q, k, v, torch.tensor(inside, dtype=torch.int32, device=x.device), left.shape[1]


@outside_graphs
def first_tokens(x: Tensor, cu_seqlens: Tensor | None, process_group: Any) -> Tensor:
    """The first token of each row `[B, D]`, on every rank.

    Raises:
        ValueError: the texts are packed, and begin on different ranks.
    """
    if cu_seqlens is not None:
        raise ValueError("a row for each text, cu_seqlens and process_group exclude each other; got all")
    own = pad(x[:, :1], (0, 1), value=1)  # the last channel says that there is a token
    everyone = begin("gather", pad(own, (0, 0, 0, 1 - own.shape[1])), as_group(process_group)).wait()[:, :, 0]
    has = everyone[..., -1].detach() > 0  # [R, B]
    is_first = has & (has.cumsum(0) == 1)
    return torch.where(is_first[..., None], everyone[..., :-1], 0).sum(0)


class AllKeys:
    """Keys, values and mask of the slices that this rank's queries may see: all, or with causal=True up to its own.

    Attributes:
        k: `[B, S, H, K]`.
        v: `[B, S, H, V]`.
        attention_mask: `[B, S]` or None.
        lengths: tokens of every rank.
        at: tokens in the slices before this one.
    """

    def __init__(self, k: Tensor, v: Tensor, attention_mask: Tensor | None, causal: bool, process_group: Any) -> None:
        group = as_group(process_group)
        rank = group.rank()
        self.lengths = gathered_lengths(k, group)
        self.at = sum(self.lengths[:rank])
        missing, K = max(self.lengths) - k.shape[1], k.shape[-1]
        both = begin("gather", pad(torch.cat([k, v], -1), (0, 0, 0, 0, 0, missing)), group).wait()
        both = self._seen(both, rank + 1 if causal else group.size())
        self.k, self.v = both[..., :K], both[..., K:]
        self.attention_mask = None
        if attention_mask is not None:
            real = begin("gather", pad(attention_mask.to(torch.uint8), (0, missing)), group).wait()
            self.attention_mask = self._seen(real, rank + 1 if causal else group.size())

    def _seen(self, gathered: Tensor, stop: int) -> Tensor:
        return torch.cat([gathered[s][:, : self.lengths[s]] for s in range(stop)], 1)


@outside_graphs
def softmax_over_slices(
    attend: Callable[..., Tensor],
    q: Tensor,  # [B, T, H, K]
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    process_group: Any,
    **others: Any,
) -> Tensor:
    """Softmax attention of this rank's queries; `attend` is `softmax_attention` of one process."""
    every = AllKeys(k, v, attention_mask, causal, process_group)
    T, at = q.shape[1], every.at
    if not T:  # of no numbers, and still a function of all
        return torch.einsum("bthk,bshk,bshv->bthv", q, every.k, every.v)
    if cu_seqlens is None:
        return attend(q, every.k, every.v, causal=causal, attention_mask=every.attention_mask, **others)
    bounds = check_shared_boundaries(cu_seqlens, q, sum(every.lengths))
    parts = []
    for begun, end in pairwise(bounds):
        first, stop = max(begun, at), min(end, at + T)
        if first < stop:
            seen = slice(begun, stop if causal else end)
            queries = q[:, first - at : stop - at]
            parts.append(attend(queries, every.k[:, seen], every.v[:, seen], causal=causal, **others))
    return torch.cat(parts, 1)
