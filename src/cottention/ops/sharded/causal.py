"""Cosine attention over a sequence of which each rank of a process group holds a slice: one exchange of states a call.

A slice acts on the state before it as an affine map, S -> A S + B, with B the slice's own state from zero. All maps are
gathered at once (as in LASP-2) and each rank composes those before it to the state P that its slice begins with:

    no gates      A = 1, not sent           P_r = sum_{s < r} B_s
    log_decay     A = exp(L), L the sum of log_decay in the slice: one number per head, sent as L
    beta          A = prod a_t (I - beta_t k_hat_t k_hat_t^T), [K, K] per head: the state that the identity becomes

    o_t = (the slice by itself)_t + q_hat_t^T A_t P,      A_t the map of the slice's tokens up to t

Handing the state on from rank to rank would need no A, but each rank would wait for all before it. What is sent does
not grow with T: bytes received per call and rank, with 4 (float64: 8) a number and N = B rows, or 1 of packed texts,

    forward     R * N * H * (K V + 0, 1 or K K) numbers + 8 R B of counts         backward     the former again

Bidirectional attention adds up one state: see `bidirectional.py`. Counts come first, for the divisors at the keys
need them. The state is computed and sent before the slice attends to itself, so that the exchange has that time (beta
gives state and output in one pass); backward likewise.

Source: LASP-2, arXiv 2502.07563. Differs: decay, erase, divisors by counts, padding, packing, slices of any lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from cottention.ops.autocast import without_autocast
from cottention.ops.layouts import divided, unit
from cottention.ops.sharded.collectives import begin
from cottention.ops.sharded.slices import Slice
from cottention.ops.state import CosineState, accumulation_dtype

# exp of less than this is zero in float64 too; -inf would make 0 * inf of a gradient.
LEAST_LOG_DECAY = -1000.0


class Gates(NamedTuple):
    """log_decay and beta of a slice, or None."""

    log_decay: Tensor | None  # [B, T, H]
    beta: Tensor | None  # [B, T, H]


@without_autocast
def sharded_causal(
    q: Tensor,  # [B, T, H, K], T of this rank
    k: Tensor,
    v: Tensor,  # [B, T, H, V]
    norm_const: Tensor | None,  # [H]
    *,
    run: Callable[..., tuple[Tensor, CosineState | None]],  # an implementation, for what a slice is by itself
    place: Slice,
    attention_mask: Tensor | None,  # [B, T] bool
    initial_state: CosineState | None,
    output_final_state: bool,
    gates: Gates,
) -> tuple[Tensor, CosineState | None]:
    """Causal attention of this rank's tokens; for the arguments see `cosine_attention`."""
    call = _Causal(q, k, v, norm_const, run, place, attention_mask, initial_state, gates)
    return call.erasing(output_final_state) if gates.beta is not None else call.adding(output_final_state)


class _Causal:
    """A causal call: what goes out, what comes in, what the slice is by itself."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norm_const: Tensor | None,
        run: Callable[..., tuple[Tensor, CosineState | None]],
        place: Slice,
        mask: Tensor | None,
        state: CosineState | None,
        gates: Gates,
    ) -> None:
        self.q, self.k, self.v, self.norm_const, self.mask = q, k, v, norm_const, mask
        self.run, self.place, self.state, self.gates = run, place, state, gates
        self.dtype = accumulation_dtype(q.dtype)
        decay = gates.log_decay
        if decay is not None:
            decay = decay.to(self.dtype).clamp(min=LEAST_LOG_DECAY)
            decay = decay if mask is None else decay.masked_fill(~mask[..., None], 0)
        self.decay = decay  # [B, T, H]

    # Without beta: the slice's state first, then what it is by itself.

    def adding(self, output_final_state: bool) -> tuple[Tensor, CosineState | None]:
        place, state = self.place, self.state
        pending = begin("gather", self._sent(), place.group)
        o, own = self._by_itself(self.v, place.own_states(state, self._zeros()), output_final_state and place.is_packed)
        maps = AddingMaps(pending.wait(), self.decay is not None, (self.q.shape[3], self.v.shape[3]))
        head = place.head
        P = maps.composed(*place.before, place.start(state))  # [N, H, K, V]
        o = self._with(o, _read(self.q[:, head], P, self._mask(head)), self._kept(head))
        if not output_final_state:
            return o, None
        if not place.is_packed:
            kv = maps.composed(0, place.size, place.start(state))
            return o, CosineState(kv, place.total(state))
        kept = 1 if self.decay is None else self.decay[:, head].sum(1).exp()[..., None, None]
        return o, place.final_states(state, own, kept * P, self._zeros())

    def _sent(self) -> Tensor:
        """B, and L where there is a decay, `[N, H, 1 + K V]` or `[N, H, K V]`."""
        place, tail = self.place, self.place.tail
        mask, decay = self._mask(tail), None if self.decay is None else self.decay[:, tail]
        k_hat = unit(self.k[:, tail], mask)
        value = divided(self.v[:, tail], self.norm_const, place.counts[:, tail], mask)
        if decay is not None:  # what is left of each token at the end: exp of the sum behind it, of its own terms
            k_hat = k_hat * summed_behind(decay).exp()[..., None]
        B = torch.einsum("bthk,bthv->bhkv", k_hat, value)
        L = None if decay is None else decay.sum(1)  # [N, H]
        begun = place.begun_here(self.state)
        if begun is not None:  # a packed text that begins in this slice brings its own state
            B = B + (begun if L is None else L.exp()[..., None, None] * begun)
        B = B.flatten(2)
        return B if L is None else torch.cat([L[..., None], B], -1)

    # With beta: one pass over V + K columns gives o and the state of the slice, and what the identity becomes.

    def erasing(self, output_final_state: bool) -> tuple[Tensor, CosineState | None]:
        place, state = self.place, self.state
        K, V = self.q.shape[3], self.v.shape[3]
        eye = torch.eye(K, dtype=self.dtype, device=self.q.device).expand(*self._zeros().shape[:2], K, K)
        starts = place.own_states(state, self._zeros())
        wide = CosineState(torch.cat([starts.kv, place.entered_first(eye)], -1), starts.seen)
        both, own = self._by_itself(pad(self.v, (0, K)), wide, True)
        assert own is not None
        last = place.last_of(own.kv)  # [N, H, K, V + K]
        if not self.q.shape[1]:  # of no tokens: zero, and on every rank the same graph
            last = last + pad(self._nothing(), (0, K))
        maps = _ErasingMaps(begin("gather", last, place.group).wait(), V)
        head = place.head
        P = maps.composed(*place.before, place.start(state))
        o, read = both[..., :V], both[:, head, :, V:].to(self.dtype)
        o = self._with(o, torch.einsum("bthk,bhkv->bthv", read, P), None)
        if not output_final_state:
            return o, None
        if not place.is_packed:
            return o, CosineState(maps.composed(0, place.size, place.start(state)), place.total(state))
        entered = own.kv[:1, ..., V:] @ P if len(own.kv) else P
        return o, place.final_states(state, CosineState(own.kv[..., :V], own.seen), entered, self._zeros())

    def _nothing(self) -> Tensor:
        """The state of no tokens, `[B, H, K, V]`, as a function of all that states come from."""
        value = divided(self.v, self.norm_const, self.place.counts, self.mask)
        strength = self.gates.beta
        assert strength is not None
        strength = strength if self.decay is None else strength * self.decay
        return torch.einsum("bth,bthk,bthv->bhkv", strength.to(self.dtype), unit(self.k, self.mask), value)

    # What both share.

    def _zeros(self) -> Tensor:
        """A state of nothing for each local text."""
        shape = (self.place.num_texts, self.q.shape[2], self.q.shape[3], self.v.shape[3])
        return self.q.new_zeros(shape, dtype=self.dtype)

    def _by_itself(self, v: Tensor, start: CosineState, output_final_state: bool) -> tuple[Tensor, CosineState | None]:
        """The slice as a sequence of its own, behind so many tokens."""
        if not self.q.shape[1]:  # no kernel need know of slices without a token
            return torch.cat([self.q[..., :0], v], -1), start
        return self.run(
            self.q,
            self.k,
            v,
            self.norm_const,
            causal=True,
            attention_mask=self.mask,
            cu_seqlens=self.place.own_boundaries,
            initial_state=start,
            output_final_state=output_final_state,
            **{name: gate for name, gate in self.gates._asdict().items() if gate is not None},
        )

    def _mask(self, part: slice) -> Tensor | None:
        return None if self.mask is None else self.mask[:, part]

    def _kept(self, part: slice) -> Tensor | None:
        """What is left at each token of the state before the slice, `[B, T, H, 1]`."""
        return None if self.decay is None else self.decay[:, part].cumsum(1).exp()[..., None]

    def _with(self, o: Tensor, entered: Tensor, kept: Tensor | None) -> Tensor:
        """o of the slice by itself, with what its first tokens read of the state before it."""
        entered = entered if kept is None else kept * entered
        if self.mask is not None:
            entered = entered.masked_fill(~self.mask[:, self.place.head, None, None], 0)
        entered = pad(entered, (0, 0, 0, 0, 0, o.shape[1] - entered.shape[1]))
        return (o.to(self.dtype) + entered).to(self.q.dtype)


def summed_behind(decay: Tensor) -> Tensor:
    """At each token the sum of log_decay over those behind it, `[B, T, H]`, of its own terms."""
    return pad(decay.flip(1).cumsum(1).flip(1)[:, 1:], (0, 0, 0, 1)) if decay.shape[1] else decay


def _read(q: Tensor, P: Tensor, mask: Tensor | None) -> Tensor:
    return torch.einsum("bthk,bhkv->bthv", unit(q, mask), P)


class AddingMaps:
    """Everyone's (L, B), gathered as `[R, N, H, 1 + K V]` (without decay `[R, N, H, K V]`)."""

    def __init__(self, gathered: Tensor, has_decay: bool, sizes: tuple[int, int]) -> None:
        self._L = gathered[..., 0] if has_decay else None  # [R, N, H]
        self._B = (gathered[..., 1:] if has_decay else gathered).unflatten(-1, sizes)

    def composed(self, first: int, stop: int, start: Tensor | None) -> Tensor:
        """The state behind the slices first .. stop - 1, from that before them (None: zero)."""
        B = self._B[first:stop]
        if self._L is None:
            P = B.sum(0)
            return P if start is None else P + start
        # What is left of each: exp of the sum of the L behind it, which are at most 0.
        L = self._L[first:stop]
        behind = pad(L.flip(0).cumsum(0).flip(0)[1:], (0, 0, 0, 0, 0, 1)) if len(L) else L
        P = torch.einsum("rnh,rnhkv->nhkv", behind.exp(), B)
        return P if start is None else P + L.sum(0).exp()[..., None, None] * start


class _ErasingMaps:
    """Everyone's (B, A), gathered as `[R, N, H, K, V + K]`."""

    def __init__(self, gathered: Tensor, V: int) -> None:
        self._B, self._A = gathered[..., :V], gathered[..., V:]

    def composed(self, first: int, stop: int, start: Tensor | None) -> Tensor:
        """See `AddingMaps`. A walk of R small products: products of A before a state would cost K / V times as much."""
        # of no slices it is zero, and still a function of what was gathered: its gradient is a collective too
        P = self._B[:0].sum(0) if start is None else start + self._B[:0].sum(0)
        for s in range(first, stop):
            P = self._A[s] @ P + self._B[s]
        return P
