"""The buffers that backward passes write, and what is left to do with them afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from cottention.ops.triton.config import Tiles, pad
from cottention.ops.triton.launch import Call


class Gradients:
    """What a backward pass writes, and what is left to do after it.

    Where K is wider than a tile, the gradients of the unit vectors come first, in float32, and norms are needed for
    parts of a vector. Of several walks the later ones add to the sums of the first, which are float32, too.
    """

    def __init__(self, call: Call, num_partial: int, tiles: Tiles, *, num_walks: int = 1) -> None:
        self._call = call
        q, k, v = call.q, call.k, call.v
        self._is_split = pad(call.K) > tiles.tile
        self._is_sum = num_walks > 1
        wide = torch.float32
        self._dq, self._dk = (
            torch.empty(x.shape, dtype=wide if self._is_split or self._is_sum else x.dtype, device=x.device)
            for x in (q, k)
        )
        self._dv = torch.empty(v.shape, dtype=wide if self._is_sum else v.dtype, device=v.device)
        num_tiles = -(-call.V // call.shapes(tiles, backward=True)["BZ"])
        self._dp = None
        if call.norm_const is not None:
            self._dp = q.new_empty((num_walks, num_partial, num_tiles, call.H), dtype=wide)
        self.norms: tuple[Tensor | None, Tensor | None] = (_norms(q), _norms(k)) if self._is_split else (None, None)

    def outputs(self, walk: int = 0) -> tuple[Tensor | None, ...]:
        """o (none), dq, dk, dv and parts of dp, as kernels take them."""
        return None, self._dq, self._dk, self._dv, None if self._dp is None else self._dp[walk]

    def finished(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dq, dk, dv and dm (empty without norm_const)."""
        call = self._call
        dq, dk = self._dq, self._dk
        if self._is_split:
            dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (call.q, call.k))
            call.project(call.q, self._dq, dq, call.real_q)
            call.project(call.k, self._dk, dk, call.real_k)
        dm = call.norm_const_gradient(None if self._dp is None else self._dp.flatten(0, 1))
        dtype = call.q.dtype
        return dq.to(dtype), dk.to(dtype), self._dv.to(dtype), dm


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)  # [B, T, H]
