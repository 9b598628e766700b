"""Cosine attention that forgets (log_decay) and erases (beta), in chunks: linear time and memory, on any device.

With a_t = exp(log_decay_t), v' = v / divisor and b_t = beta_t (without beta nothing is erased, and b_t is 1 before v'):

    S_t = a_t (I - b_t k_hat_t k_hat_t^T) S_{t-1} + b_t k_hat_t v'_t^T          o_t = S_t^T q_hat_t

In a chunk, with S the state before it, G the running sum of log_decay, and W_ij = exp(G_i - G_j) for j <= i, else 0:

    (I + tril(b_i W_ij k_hat_i . k_hat_j, -1)) U = b (V' - exp(G) K_hat S)      U = V' without beta
    O = exp(G) Q_hat S + (Q_hat K_hat^T * W) U
    S <- exp(G_C) S + sum_j exp(G_C - G_j) k_hat_j u_j^T

G_i - G_j is summed from its own terms: as a difference it would lose all digits behind a strong decay, and exp(-G_j)
alone would overflow. Bidirectional attention has the weight exp(-|G_i - G_j|): a walk forward, one backward, and the
diagonal, which both have, taken off. Backward is written by hand and keeps a state a chunk; `plain_gated`, the same
forward, has all other derivatives by autograd.

    o, kv, seen = plain_gated(q, k, v, m, mask, cu_seqlens, kv0, seen0, log_decay, beta, causal=True, chunk_size=64)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from cottention.ops.autocast import without_autocast
from cottention.ops.layouts import CHUNK_SIZE, Packed, Padded, divided, finished, layout_of, unit
from cottention.ops.state import MIN_NORM, accumulation_dtype

# exp of less than this is zero in float64 too; with it -inf is taken as any other strong decay.
_LEAST_LOG_DECAY = -1000.0
# Weights are C x C for each head: beyond this they outgrow what they are weights of.
_MAX_CHUNK = 256


class Tokens(NamedTuple):
    """What a walk reads at each token, or the gradients of that; in the accumulation dtype, zero at padding."""

    q: Tensor  # [B, T, H, K] unit vectors
    k: Tensor
    v: Tensor  # [B, T, H, V] divided
    log_decay: Tensor  # [B, T, H, 1]
    beta: Tensor | None  # [B, T, H, 1]

    def each(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """What a function makes of each part."""
        q, k, v, log_decay, beta = self
        return Tokens(
            function(q), function(k), function(v), function(log_decay), None if beta is None else function(beta)
        )


class Call:
    """A call's tokens and their layout in chunks."""

    def __init__(
        self,
        q: Tensor,  # [B, T, H, K]
        k: Tensor,
        v: Tensor,  # [B, T, H, V]
        norm_const: Tensor | None,  # [H]
        mask: Tensor | None,  # [B, T] bool
        cu_seqlens: Tensor | None,  # [N+1]
        kv: Tensor | None,  # [N, H, K, V]
        seen: Tensor | None,  # [N]
        log_decay: Tensor | None,  # [B, T, H]
        beta: Tensor | None,  # [B, T, H]
        *,
        causal: bool,
        chunk_size: int,  # 0: choose
    ) -> None:
        self._chunk_size = min(chunk_size or CHUNK_SIZE, _MAX_CHUNK)
        self.layout = layout_of(q, cu_seqlens, self._chunk_size)
        count, self.total = self.layout.counts(mask, seen)
        if not causal:
            in_all = self.total[:, None] if isinstance(self.layout, Padded) else self.total[self.layout.sequence][None]
            count = in_all.expand(q.shape[:2])
        self.count = count  # [B, T]
        dtype = accumulation_dtype(q.dtype)
        if log_decay is None:
            decays = q.new_zeros((*q.shape[:3], 1), dtype=dtype)
        else:
            decays = _at_real(log_decay.to(dtype).clamp(min=_LEAST_LOG_DECAY), mask)
        value = divided(v, norm_const, count, mask)
        betas = None if beta is None else _at_real(beta.to(dtype), mask)
        self.tokens = Tokens(unit(q, mask), unit(k, mask), value, decays, betas)
        N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        shape = (N, q.shape[2], q.shape[3], v.shape[3])
        self.kv = q.new_zeros(shape, dtype=dtype) if kv is None else kv
        self._cu_seqlens = cu_seqlens

    def backwards(self) -> tuple[Padded | Packed, Tokens]:
        """The tokens in reverse. A token forgets there what the one after it forgot here; the last one has nothing."""
        q, k, v, log_decay, beta = self.tokens
        cu_seqlens = None if self._cu_seqlens is None else q.shape[1] - self._cu_seqlens.flip(0)
        turned = Tokens(q, k, v, log_decay.roll(-1, 1), beta).each(lambda x: x.flip(1))
        return layout_of(turned.q, cu_seqlens, self._chunk_size), turned


def _at_real(x: Tensor, mask: Tensor | None) -> Tensor:
    """`[B, T, H]` as `[B, T, H, 1]`, zero at padding."""
    return (x if mask is None else x.masked_fill(~mask[..., None], 0))[..., None]


class _Chunk:
    """One chunk of each row: its tokens `[R, H, C, K, V or 1]`, and what all its products share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None) -> None:
        self.q, self.k, self.v, self.beta = q, k, v, beta
        C = q.shape[2]
        self.later = torch.ones(C, C, dtype=torch.bool, device=q.device).tril(-1)
        steps = log_decay.expand(*log_decay.shape[:3], C).masked_fill(~self.later, 0)
        between = steps.cumsum(2)  # [R, H, C, C] G_i - G_j
        self.weight = between.masked_fill(self.later.mT, -torch.inf).exp()  # masked before exp: no overflow, no NaN
        self.since_start = log_decay.cumsum(2).exp()  # [R, H, C, 1]
        self.to_end = self.weight[:, :, -1, :, None]  # [R, H, C, 1]
        self.whole = self.since_start[:, :, -1:]  # [R, H, 1, 1]
        self.qk = q @ k.mT
        if beta is not None:
            self.kk = k @ k.mT
            self.system = (beta * self.kk * self.weight).tril(-1)  # and a diagonal of ones

    def written(self, state: Tensor) -> Tensor:
        """U `[R, H, C, V]`."""
        if self.beta is None:
            return self.v
        told = self.v - self.since_start * (self.k @ state)
        return solve_triangular(self.system, self.beta * told, upper=False, unitriangular=True)

    def read(self, state: Tensor, u: Tensor) -> Tensor:
        """O `[R, H, C, V]`."""
        return self.since_start * (self.q @ state) + (self.qk * self.weight) @ u

    def state_after(self, state: Tensor, u: Tensor) -> Tensor:
        return self.whole * state + (self.to_end * self.k).mT @ u

    def gradients(self, state: Tensor, grad: Tensor, grad_after: Tensor) -> tuple[Tokens, Tensor]:
        """Those of the chunk's tokens, and of the state before it, from those of O and of the state after it."""
        q, k, v, beta, weight, since_start = self.q, self.k, self.v, self.beta, self.weight, self.since_start
        u = self.written(state)
        du = (self.qk * weight).mT @ grad + (self.to_end * k) @ grad_after
        dscores = grad @ u.mT
        dqk, dweight = dscores * weight, dscores * self.qk
        dto_end = u @ grad_after.mT  # of to_end * k
        dq = since_start * (grad @ state.mT) + dqk @ k
        dk = dqk.mT @ q + self.to_end * dto_end
        dweight[:, :, -1] += (k * dto_end).sum(-1)
        dsince_start = ((q @ state) * grad).sum(-1, keepdim=True)
        dsince_start[:, :, -1] += (grad_after * state).sum((2, 3))[..., None]
        dstate = self.whole * grad_after + (since_start * q).mT @ grad
        dv, dbeta = du, None
        if beta is not None:
            y = solve_triangular(self.system.mT, du, upper=True, unitriangular=True)
            dv, read = beta * y, k @ state
            dbeta = (y * (v - since_start * read)).sum(-1, keepdim=True)
            dsince_start -= (dv * read).sum(-1, keepdim=True)
            dk -= since_start * (dv @ state.mT)
            dstate -= (since_start * k).mT @ dv
            dsystem = -(y @ u.mT).tril(-1)
            dbeta += (dsystem * self.kk * weight).sum(-1, keepdim=True)
            dweight += beta * dsystem * self.kk
            dkk = beta * dsystem * weight
            dk += (dkk + dkk.mT) @ k
        dsteps = _sum_from(dweight * weight).masked_fill(~self.later, 0)
        ddecay = dsteps.sum(-1, keepdim=True) + _sum_from(dsince_start * since_start)
        return Tokens(dq, dk, dv, ddecay, dbeta), dstate


def _sum_from(x: Tensor) -> Tensor:
    """Sums over dimension 2 from each place to the end."""
    return x.flip(2).cumsum(2).flip(2)


class _Walk:
    """The chunks of some tokens one after the other: one lives at a time, and in backward the states between them."""

    def __init__(self, layout: Padded | Packed, tokens: Tokens, kv: Tensor) -> None:
        self._layout, self._tokens, self._kv = layout, tokens, kv
        self._chunks = tokens.each(lambda x: layout.chunks(x).transpose(2, 3))  # [R, M, H, C, .]
        self._num_chunks = self._chunks.q.shape[1]

    def _chunk(self, m: int) -> _Chunk:
        return _Chunk(*self._chunks.each(lambda x: x[:, m]))

    def _start(self, own: Tensor) -> Tensor:
        return own if isinstance(self._layout, Padded) else own.new_zeros(1, *own.shape[1:])

    def _whole(self, chunks: list[Tensor]) -> Tensor:
        """`[R, H, C, D]` of each chunk as `[B, T, H, D]`."""
        return self._layout.tokens(torch.stack(chunks, 1).transpose(2, 3))

    def forward(self, *, reaches: bool = True) -> tuple[Tensor, Tensor]:
        """o `[B, T, H, V]` and the states that are reached `[N, H, K, V]`, or without `reaches` those at the start."""
        state = self._start(self._kv)
        outputs, after = [], []
        for m in range(self._num_chunks):
            chunk = self._chunk(m)
            state = self._layout.enter(m, state, self._kv)
            u = chunk.written(state)
            outputs.append(chunk.read(state, u))
            state = chunk.state_after(state, u)
            if not reaches or isinstance(self._layout, Padded):
                after.clear()  # of packed sequences all are needed, of rows the last alone
            after.append(state)
        if not outputs:
            return torch.zeros_like(self._tokens.v), self._kv
        return self._whole(outputs), self._layout.reached(after, self._kv) if reaches else self._kv

    def backward(self, grad: Tensor, grad_reached: Tensor) -> tuple[Tokens, Tensor]:
        """The gradients of the tokens and of kv, from those of o and of the states that are reached."""
        if not self._num_chunks:
            return self._tokens.each(torch.zeros_like), grad_reached.clone()
        state, before = self._start(self._kv), []
        for m in range(self._num_chunks):
            chunk = self._chunk(m)
            before.append(self._layout.enter(m, state, self._kv))
            state = chunk.state_after(before[-1], chunk.written(before[-1]))
        grads = self._layout.chunks(grad).transpose(2, 3)
        dstate, dstates, found = self._start(grad_reached), [], []
        for m in reversed(range(self._num_chunks)):
            dafter = self._layout.enter(m, dstate, grad_reached, backward=True)
            tokens, dstate = self._chunk(m).gradients(before[m], grads[:, m], dafter)
            found.append(tokens)
            dstates.append(dstate)
        found.reverse()
        gradients = Tokens(
            self._whole([each.q for each in found]),
            self._whole([each.k for each in found]),
            self._whole([each.v for each in found]),
            self._whole([each.log_decay for each in found]),
            None if self._tokens.beta is None else self._whole([each.beta for each in found if each.beta is not None]),
        )
        return gradients, self._layout.reached(dstates, grad_reached, backward=True)


@without_autocast
def plain_gated(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,
    v: Tensor,  # [B, T, H, V]
    norm_const: Tensor | None,  # [H]
    mask: Tensor | None,  # [B, T] bool
    cu_seqlens: Tensor | None,  # [N+1]
    kv: Tensor | None,  # [N, H, K, V]
    seen: Tensor | None,  # [N]
    log_decay: Tensor | None,  # [B, T, H]
    beta: Tensor | None,  # [B, T, H]
    *,
    causal: bool,
    chunk_size: int,
    reaches: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """o `[B, T, H, V]`, and the kv and seen that are reached.

    kv says nothing where it is not causal, or where that is not asked for (`reaches`).
    """
    given = (q, k, v, norm_const, mask, cu_seqlens, kv, seen, log_decay, beta)
    call = Call(*given, causal=causal, chunk_size=chunk_size)
    o, reached = _Walk(call.layout, call.tokens, call.kv).forward(reaches=reaches and causal)
    if not causal:
        back, _ = _Walk(*call.backwards(), call.kv).forward(reaches=False)
        o = o + back.flip(1) - diagonal(call.tokens) * call.tokens.v
    return finished(o, q, mask), reached, call.total


def diagonal(tokens: Tokens) -> Tensor:
    """q_hat_t . k_hat_t, which both walks of bidirectional attention have."""
    return (tokens.q * tokens.k).sum(-1, keepdim=True)  # [B, T, H, 1]


# What `dispatch` runs.


def gated(
    q,
    k,
    v,
    norm_const,
    mask,
    cu_seqlens,
    kv,
    seen,
    log_decay,
    beta,
    causal,
    chunk_size,
    segment_tokens,
    output_final_state=True,
) -> tuple[Tensor, ...]:
    """o, and the final kv and seen (empty unless asked for); all of their own, and contiguous, as tracing takes them.

    Nothing is kept for backward.
    """
    given = (q, k, v, norm_const, mask, cu_seqlens, kv, seen, log_decay, beta)
    o, reached, total = plain_gated(*given, causal=causal, chunk_size=chunk_size, reaches=output_final_state)
    if not output_final_state:
        return o.contiguous(), reached.new_empty(0), total.new_empty(0), reached.new_empty(0)
    kv, seen = (x.clone() if x is own else x.contiguous() for x, own in ((reached, kv), (total, seen)))
    return o.contiguous(), kv, seen, reached.new_empty(0)


@without_autocast
def gated_backward(
    grad, grad_kv, q, k, v, norm_const, mask, cu_seqlens, kv, seen, log_decay, beta, _, causal, chunk_size, __
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, norm_const, kv, log_decay and beta; empty where there is no such input."""
    given = (q, k, v, norm_const, mask, cu_seqlens, kv, seen, log_decay, beta)
    call = Call(*given, causal=causal, chunk_size=chunk_size)
    tokens = call.tokens
    grad = _masked(grad.to(tokens.v.dtype), mask)
    dreached = torch.zeros_like(call.kv) if grad_kv is None else grad_kv
    found, dkv = _Walk(call.layout, tokens, call.kv).backward(grad, dreached)
    if not causal:
        layout, turned = call.backwards()
        back, _ = _Walk(layout, turned, call.kv).backward(grad.flip(1), dreached)
        dq, dk, dv, ddecay, _ = back.each(lambda x: x.flip(1))
        inner = (grad * tokens.v).sum(-1, keepdim=True)
        dq, dk = dq - inner * tokens.k, dk - inner * tokens.q
        dv = dv - diagonal(tokens) * grad
        found = Tokens(found.q + dq, found.k + dk, found.v + dv, found.log_decay + ddecay.roll(1, 1), None)
    nothing = q.new_empty(0, dtype=tokens.v.dtype)
    dv, dm = found.v, nothing
    if norm_const is not None:
        p = torch.sigmoid(norm_const.to(dv.dtype))
        count = call.count.clamp(min=1).to(dv.dtype)[..., None, None]  # [B, T, 1, 1]
        dp = -(count.log() * tokens.v * dv).sum((0, 1, 3))
        dm = (dp * p * (1 - p)).to(norm_const.dtype)
        dv = dv * count ** -p[:, None]
    gradients = (
        _unit_gradient(q, tokens.q, found.q, mask),
        _unit_gradient(k, tokens.k, found.k, mask),
        _masked(dv, mask).to(v.dtype),
        dm,
        nothing if kv is None else dkv,
        nothing if log_decay is None else _masked(found.log_decay, mask)[..., 0].to(log_decay.dtype),
        nothing if beta is None or found.beta is None else _masked(found.beta, mask)[..., 0].to(beta.dtype),
    )
    return tuple(x.contiguous() for x in gradients)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask[..., None, None], 0)


def _unit_gradient(x: Tensor, x_hat: Tensor, grad: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of x: (g - x_hat (x_hat . g)) / ||x||, or g / 1e-12 where the norm was clamped."""
    norm = torch.linalg.vector_norm(x.to(grad.dtype), dim=-1, keepdim=True)
    radial = (x_hat * grad).sum(-1, keepdim=True).masked_fill(norm < MIN_NORM, 0)
    return _masked((grad - x_hat * radial) / norm.clamp(min=MIN_NORM), mask).to(x.dtype)
