"""Runs the kernels: from checked tensors to outputs, states and gradients. Under `passes`.

A causal call is the quadratic kernel alone (segment_tokens 0), or one linear pass (-1: the segments are the sequences),
or segment states, their prefix sum and a linear pass. Bidirectional calls sum the states of all segments first.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (to a type checker a launch is a call of the kernel in Python)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cottention.ops.triton.config import Config, Tiles, arithmetic, choose, compiler_options, pad, round_up
from cottention.ops.triton.linear import linear_kernel, scan_kernel, state_kernel, unit_gradient_kernel
from cottention.ops.triton.quadratic import quadratic_kernel

_O, _DQ, _DK = 0, 1, 2  # roles.O, DQ, DK
_SCAN_BLOCK = 1024
_PROJECTED_TOKENS = 16
_INTERPRETED = not isinstance(linear_kernel, triton.runtime.JITFunction)


@dataclass(frozen=True, kw_only=True)
class Segments:
    """One side's tokens (queries or keys) cut into pieces that never cross a sequence."""

    num_tokens: int
    length: int
    each: int  # segments of a row, without packing
    count: int
    table: Tensor | None = None  # [count, 5] int32: sequence, its first token and end, the segment's
    first: Tensor | None = None  # [N+1] int32: first segment of each packed sequence

    @property
    def is_single(self) -> bool:
        """Whether each sequence is one segment, so that states need no prefix sum."""
        return self.first is None and self.each == 1


def cut(B: int, T: int, cu_seqlens: Tensor | None, length: int, *, by_sequence: bool = True) -> Segments:
    """Segments of `length` tokens; `by_sequence` numbers them as sequences where none can be longer than that.

    Packed sequences are cut on the device: no value is read here.
    """
    if cu_seqlens is None:
        each = -(-T // length)
        return Segments(num_tokens=T, length=length, each=each, count=B * each)
    bounds = cu_seqlens.to(torch.int64).clamp(0, T)  # what is checked elsewhere, but never outside memory
    starts, ends = bounds[:-1], bounds[1:]
    if by_sequence and length >= T:
        sequence = torch.arange(len(starts), device=starts.device)
        table = torch.stack([sequence, starts, ends, starts, ends], 1).to(torch.int32)
        return Segments(num_tokens=T, length=length, each=1, count=len(starts), table=table)
    count = T // length + len(starts)
    own = (ends - starts).clamp(min=0).add(length - 1).div(length, rounding_mode="floor")  # segments of each sequence
    first = torch.nn.functional.pad(own.cumsum(0), (1, 0))  # [N+1]
    slot = torch.arange(count, device=starts.device)
    sequence = torch.searchsorted(first[1:], slot, right=True)
    used = sequence < len(starts)
    sequence = sequence.clamp(max=len(starts) - 1)
    start = starts[sequence] + (slot - first[sequence]) * length
    end = torch.minimum(start + length, ends[sequence])
    columns = [sequence, starts[sequence], ends[sequence], torch.where(used, start, 0), torch.where(used, end, 0)]
    table = torch.stack(columns, 1).to(torch.int32)
    return Segments(num_tokens=T, length=length, each=1, count=count, table=table, first=first.to(torch.int32))


class Call:
    """What forward and backward of one call both need."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        norm_const: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        seen: Tensor | None,
        chunk_size: int,
        segment_tokens: int,
        *,
        causal: bool,
        log_decay: Tensor | None = None,
    ) -> None:
        self.log_decay = log_decay
        self.q, self.k, self.v, self.norm_const, self.seen = q, k, v, norm_const, seen
        self.B, self.T, self.H, self.K = q.shape
        self.S, self.V = v.shape[1], v.shape[3]
        self.causal, self.chunk_size, self.cu_seqlens, self.segment_tokens = (
            causal,
            chunk_size,
            cu_seqlens,
            segment_tokens,
        )
        self.config: Config = choose(q.device, q.dtype, max(pad(self.K), pad(self.V)), forgets=log_decay is not None)
        self.num_sequences = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.real_k = None if mask is None else mask.contiguous().view(torch.uint8)
        self.real_q = self.real_k if self.T == self.S else None
        self.count = self.total = None
        if mask is not None and causal:
            self.count = mask.cumsum(-1, dtype=torch.int32)  # [B, S]
            if seen is not None:
                self.count = (self.count + seen[:, None]).to(torch.int32)
        elif mask is not None:
            self.total = mask.sum(-1)  # [B]

    def cut(self, T: int) -> Segments:
        """The segments of T tokens."""
        return cut(self.B, T, self.cu_seqlens, self.segment_tokens if self.segment_tokens > 0 else round_up(T))

    def new_states(self, count: int) -> Tensor:
        """Room for `count` states, in float32."""
        return self.q.new_empty((count, self.H, self.K, self.V), dtype=torch.float32)

    def reached_seen(self) -> Tensor:
        """Real tokens of each sequence at the end, `[N]` int64."""
        if self.count is not None and self.T:
            return self.count[:, -1].to(torch.int64)
        if self.cu_seqlens is not None:
            seen = self.cu_seqlens.diff().to(torch.int64)
        else:
            seen = torch.full((self.B,), self.T, dtype=torch.int64, device=self.q.device)
        return seen if self.seen is None else seen + self.seen

    def shapes(self, tiles: Tiles, *, backward: bool = False) -> dict[str, Any]:
        """Arguments that every tiled kernel takes."""
        precision = arithmetic(self.q.dtype)
        BK, BV = pad(self.K), pad(self.V)
        tile = min(BV, tiles.tile)
        if backward and tiles.tile >= BK:
            tile = max(tile, BK)  # gradients of q and k are projected where a program has all of K
        block = tiles.block_tokens
        if self.chunk_size:
            block = max(16, min(block, 1 << (self.chunk_size.bit_length() - 1)))
        return {
            "H": self.H,
            "K": self.K,
            "V": self.V,
            "BK": BK,
            "BZ": tile,
            "BT": block,
            "CAUSAL": self.causal,
            "DOT": tl.bfloat16 if precision == "bf16" and not _INTERPRETED else tl.float32,
            "PRECISION": "ieee" if precision == "bf16" else precision,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            **compiler_options(self.q.device),
        }

    def decay_strides(self) -> tuple[int | None, ...]:
        """Strides of log_decay."""
        return (None,) * 3 if self.log_decay is None else self.log_decay.stride()

    def sum_states(
        self,
        states: Tensor,
        segments: Segments,
        do: Tensor | None,
        *,
        decays: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """Write the state of each segment: of k_hat and v', or of q_hat and do.

        decays: `[segments, H]`, overwritten by what each segment leaves of a state; None without log_decay.
        reverse: the states as they are left at the start of their segments, not at the end.
        """
        shapes = self.shapes(self.config.forward)
        of_keys = do is None
        y, z = (self.k, self.v) if do is None else (self.q, do)
        grid = segments.count * self.H * -(-self.V // shapes["BZ"])
        state_kernel[(grid,)](
            y,
            z,
            states,
            self.norm_const,
            self.real_k if of_keys else self.real_q,
            self.count if of_keys else None,
            self.total if of_keys else None,
            self.seen if of_keys and self.count is None else None,
            segments.table,
            self.log_decay,
            decays,
            *y.stride(),
            *z.stride(),
            *self.decay_strides(),
            segments.num_tokens,
            segments.length,
            segments.each,
            OF_GRADIENT=not of_keys,
            REVERSE=reverse,
            **shapes,
        )

    def scan(
        self,
        states: Tensor,
        segments: Segments,
        initial: Tensor | None,
        total: Tensor | None,
        *,
        decays: Tensor | None = None,
        reverse: bool = False,
    ) -> None:
        """States of segments become the states before (reverse: after) each; `total` takes the whole sums."""
        size = self.K * self.V
        grid = self.num_sequences * self.H * -(-size // _SCAN_BLOCK)
        scan_kernel[(grid,)](
            states, decays, initial, total, segments.first, segments.each, self.H, size,
            BLOCK=_SCAN_BLOCK, REVERSE=reverse, EXCLUSIVE=self.causal or decays is not None,
        )  # fmt: skip

    def linear(
        self,
        roles: tuple[int, int],  # the first, and how many
        segments: Segments,
        *,
        do: Tensor | None = None,
        outputs: tuple[Tensor | None, ...],  # o, dq, dk, dv, dp
        states: Tensor | None = None,
        dstates: Tensor | None = None,
        reached: Tensor | None = None,
        norms: tuple[Tensor | None, Tensor | None] = (None, None),
        flow: Tensor | None = None,
        opposite: bool = False,
    ) -> None:
        """One pass over segments; `opposite` the second walk of a bidirectional one with log_decay."""
        first, count = roles
        shapes = self.shapes(self.config.forward if first == _O else self.config.backward, backward=first != _O)
        longest = self.V if first == _O else self.K if count == 1 else max(self.K, self.V)
        grid = segments.count * self.H * -(-longest // shapes["BZ"]) * count
        of_queries = first in (_O, _DQ)
        linear_kernel[(grid,)](
            self.q, self.k, self.v, do, *outputs, states, dstates, reached, self.norm_const,
            self.real_q if of_queries else self.real_k, self.count, self.total,
            self.seen if self.count is None else None, segments.table, *norms, self.log_decay, flow,
            *self.q.stride(), *self.k.stride(), *self.v.stride(), *(do.stride() if do is not None else (None,) * 4),
            *self.decay_strides(), None if flow is None else flow.stride(0),
            segments.num_tokens, segments.length, segments.each,
            BV=pad(self.V), OPPOSITE=opposite, FIRST_ROLE=first, NUM_ROLES=count, **shapes,
        )  # fmt: skip

    def quadratic(
        self,
        roles: tuple[int, int],
        *,
        do: Tensor | None = None,
        outputs: tuple[Tensor | None, ...],
        norms: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        """Blocks against all others."""
        first, count = roles
        shapes = self.shapes(
            self.config.short_forward if first == _O else self.config.short_backward, backward=first != _O
        )
        blocks = self.blocks(shapes["BT"], backward=first != _O)
        longest = self.V if first == _O else max(self.K, self.V)
        grid = blocks.count * self.H * -(-longest // shapes["BZ"]) * count
        quadratic_kernel[(grid,)](
            self.q, self.k, self.v, do, *outputs, self.norm_const, self.real_q, self.real_k, self.count, self.total,
            blocks.table, *norms,
            *self.q.stride(), *self.k.stride(), *self.v.stride(), *(do.stride() if do is not None else (None,) * 4),
            self.T, self.S, blocks.each, BV=pad(self.V), FIRST_ROLE=first, NUM_ROLES=count, **shapes,
        )  # fmt: skip

    def blocks(self, block_tokens: int, *, backward: bool) -> Segments:
        """The quadratic form's blocks: of the queries, or where gradients are asked for of the longer side."""
        longest = max(self.T, self.S) if backward else self.T
        return cut(self.B, longest, self.cu_seqlens, block_tokens, by_sequence=False)

    def project(self, x: Tensor, grad: Tensor, out: Tensor, real: Tensor | None) -> None:
        """The gradient of x from that of its unit vectors."""
        T = x.shape[1]
        grid = self.B * self.H * -(-T // _PROJECTED_TOKENS)
        unit_gradient_kernel[(grid,)](
            x, grad, out, real, *x.stride(), T, self.H, K=self.K, BK=pad(self.K), BT=_PROJECTED_TOKENS
        )

    def norm_const_gradient(self, dp: Tensor | None) -> Tensor:
        """dm `[H]` from its partial sums; empty without norm_const."""
        if dp is None or self.norm_const is None:
            return self.q.new_empty(0, dtype=torch.float32)
        p = torch.sigmoid(self.norm_const.to(torch.float32))
        return (dp.sum((0, 1)) * p * (1 - p)).to(self.norm_const.dtype)
