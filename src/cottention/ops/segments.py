"""The pieces of the chunked form: unit vectors, divisors and state prefix sums, a segment of chunks at a time.

segments = Segments(grid, dtype, num_chunks=16, real=mask)
for a, b in segments.ranges():
    q_hat, norm = segments.unit(q, a, b)         # [R, H, G, C, K], [R, H, G, C, 1] with G = b - a
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cottention.ops.grid import ChunkGrid
from cottention.ops.state import MIN_NORM, accumulation_dtype

# A segment's working set, of the order of a CPU's shared cache; measured best between 2 and 16 MiB.
_SEGMENT_BYTES = 4 << 20
# The prefix sum of G chunk states costs G K V each: beyond this many chunks it would outgrow the rest.
_MAX_SEGMENT_CHUNKS = 16


def chunks_per_segment(chunk_bytes: int) -> int:
    """Chunks of a segment, from the bytes that one row's chunk holds: from shapes alone, for tracing."""
    return max(1, min(_MAX_SEGMENT_CHUNKS, _SEGMENT_BYTES // max(1, chunk_bytes)))


def rows_per_segment(segment_bytes: int) -> int:
    """Rows whose segments, of so many bytes each, are worked together."""
    return max(1, _SEGMENT_BYTES // max(1, segment_bytes))


@dataclass(frozen=True)
class Segments:
    """One tensor's tokens cut into segments of chunks."""

    grid: ChunkGrid
    dtype: torch.dtype
    num_chunks: int  # of a segment
    real: Tensor | None  # [B, T] bool; None: all

    def ranges(self) -> list[tuple[int, int]]:
        """The segments in order, as chunk ranges (a, b)."""
        total, step = self.grid.num_chunks, self.num_chunks
        return [(a, min(a + step, total)) for a in range(0, total, step)]

    def load(self, x: Tensor, a: int, b: int) -> Tensor:
        """Chunks of x as a fresh `[R, H, G, C, D]`, zero at padding."""
        return self.grid.load(x, a, b, self.dtype, self.real)

    def unit(self, x: Tensor, a: int, b: int) -> tuple[Tensor, Tensor]:
        """x_hat `[R, H, G, C, K]` and the norms `[R, H, G, C, 1]`."""
        chunks = self.load(x, a, b)
        norm = torch.linalg.vector_norm(chunks, dim=-1, keepdim=True)
        return chunks.mul_(norm.clamp(min=MIN_NORM).reciprocal_()), norm

    def store_unit_gradient(self, out: Tensor, grad: Tensor, x_hat: Tensor, norm: Tensor, a: int, b: int) -> None:
        """Write the gradient of x: (g - x_hat (x_hat . g)) / ||x||, or g / 1e-12 where the norm was clamped."""
        radial = (x_hat * grad).sum(-1, keepdim=True).masked_fill_(norm < MIN_NORM, 0)
        grad = grad.addcmul_(x_hat, radial, value=-1).mul_(norm.clamp(min=MIN_NORM).reciprocal_())
        self.store(out, grad, a, b)

    def store(self, out: Tensor, chunks: Tensor, a: int, b: int) -> None:
        """Write chunks to their tokens of out, exactly zero at padding."""
        if self.real is not None:
            chunks = chunks.masked_fill_(~self.grid.load_tokens(self.real, a, b)[:, None, :, :, None], 0)
        self.grid.store(out, chunks, a, b)


class Divisor:
    """max(c ** p, 1) under every value, p = sigmoid(m).

    Attributes:
        dp: `[H]`, the gradient of p that `store_value_gradient` collects; None divides by nothing.
    """

    def __init__(self, norm_const: Tensor | None, count: Tensor, segments: Segments) -> None:
        self._count, self._segments = count, segments  # [B, T]
        self._p = None if norm_const is None else torch.sigmoid(norm_const.to(segments.dtype))
        self.dp = None if self._p is None else torch.zeros_like(self._p)

    def _clamped_count(self, a: int, b: int) -> Tensor:
        """max(c, 1) as `[R, 1, G, C, 1]`: a count of 0 divides by 1 and has no gradient, as log(1) says."""
        count = self._segments.grid.load_tokens(self._count, a, b).clamp_(min=1)
        return count.to(self._segments.dtype)[:, None, :, :, None]

    def weight(self, a: int, b: int) -> Tensor | None:
        """c ** -p, `[R, H, G, C, 1]`; None divides by nothing."""
        return None if self._p is None else self._clamped_count(a, b) ** -self._p[:, None, None, None]

    def values(self, v: Tensor, a: int, b: int) -> tuple[Tensor, Tensor | None]:
        """v' = v / max(c ** p, 1) `[R, H, G, C, V]`, and the weight that made it."""
        chunks, weight = self._segments.load(v, a, b), self.weight(a, b)
        return (chunks if weight is None else chunks.mul_(weight)), weight

    def store_value_gradient(
        self, out: Tensor, grad: Tensor, value: Tensor, weight: Tensor | None, a: int, b: int
    ) -> None:
        """Write the gradient of v from that of v', and collect dp_h = - sum_j log(c_j) (v'_j . dv'_j)."""
        if weight is not None and self.dp is not None:
            inner = (value * grad).sum(-1, keepdim=True)
            self.dp -= (self._clamped_count(a, b).log_() * inner).sum((0, 2, 3, 4))
            grad = grad.mul_(weight)
        self._segments.store(out, grad, a, b)


def norm_const_gradient(norm_const: Tensor | None, dps: list[Tensor | None], like: Tensor) -> Tensor:
    """dm `[H]` in m's dtype from the gradients of p in all groups of rows; empty without norm_const."""
    if norm_const is None:
        return like.new_empty(0, dtype=accumulation_dtype(like.dtype))
    p = torch.sigmoid(norm_const.to(accumulation_dtype(like.dtype)))
    dp = torch.zeros_like(p)
    for each in dps:
        assert each is not None
        dp += each
    return (dp * p * (1 - p)).to(norm_const.dtype)


class StateScan:
    """The state before each chunk: an exclusive prefix sum of chunk states, a segment at a time.

    Run backwards it is the suffix sum that carries gradients: the same code, with "before" and "after" exchanged.

    Attributes:
        carry: `[R, H, K, V]`, the sum at the rim of the segment worked last, for the sequence cut there.
        reached: `[N, H, K, V]`, the whole sum of each sequence, complete after the last segment.
    """

    def __init__(self, grid: ChunkGrid, boundary: Tensor | None, reached: Tensor, *, backward: bool) -> None:
        """Sequences start from `boundary` `[N, H, K, V]` (None: zeros); `reached`, as large, is overwritten."""
        self._grid, self._backward, self._boundary = grid, backward, boundary
        self.reached = reached.zero_() if boundary is None else reached.copy_(boundary)
        self.carry = reached if not grid.is_packed else reached.new_zeros(1, *reached.shape[1:])
        self._lost = torch.zeros_like(self.carry)

    def __call__(self, chunk_states: Tensor, a: int, b: int) -> Tensor:
        """Sums before (backward: after) each of the chunks a to b, `[R, H, G, K, V]`, from their own states."""
        grid, G = self._grid, b - a
        if G == 1:
            sums = torch.zeros_like(chunk_states)
        else:
            triangle = grid.same_sequence(a, b, chunk_states.dtype)
            triangle = triangle.triu_(1) if self._backward else triangle.tril_(-1)
            sums = (triangle @ chunk_states.flatten(3)).view_as(chunk_states)
        rim = 0 if self._backward else G - 1
        own = sums[:, :, rim] + chunk_states[:, :, rim]
        cut = grid.run_length(a, b, backward=self._backward)  # chunks that continue the sequence cut at the rim
        continuing = slice(G - cut, G) if self._backward else slice(0, cut)
        sums[:, :, continuing] += self.carry[:, :, None]
        if self._boundary is not None and cut < G:
            fresh = slice(0, G - cut) if self._backward else slice(cut, G)
            sums[:, :, fresh] += grid.spread(self._boundary, a, b)[:, :, fresh]
        if cut == G and own.dtype == torch.float32:
            self._add_to_carry(own)
        else:
            self.carry, self._lost = sums[:, :, rim] + chunk_states[:, :, rim], torch.zeros_like(own)
        if grid.is_packed:
            chunks, sequences = grid.ends(a, b, backward=self._backward)
            self.reached[sequences] = (sums[0][:, chunks] + chunk_states[0][:, chunks]).transpose(0, 1)
        else:
            self.reached = self.carry
        return sums

    def _add_to_carry(self, own: Tensor) -> None:
        """With what rounding took from the sum so far (Kahan): thousands of segments would lose digits of float32."""
        own = own + self._lost
        before, self.carry = self.carry, self.carry + own
        self._lost = own - (self.carry - before)
