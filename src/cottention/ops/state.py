"""The recurrent state of causal cosine attention.

The whole past of a sequence is one K x V matrix per head and a count of real tokens, so decoding costs
the same at every position, and carrying the state across any split gives the result of one pass.

    state = CosineState.zeros(num_sequences=2, num_heads=8, key_dim=64, value_dim=64)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Below this norm a query or key counts as zero: what the published weights were trained with.
MIN_NORM = 1e-12


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for inputs of `dtype`: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_of(x: Tensor) -> Tensor:
    """max(||x||, MIN_NORM) over the last dim, kept; every derivative of it is finite, at zero too.

    The norm itself has no second derivative at zero, where the maximum does not depend on x.
    """
    is_zero = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) < MIN_NORM
    return torch.linalg.vector_norm(x.masked_fill(is_zero, 1), dim=-1, keepdim=True).masked_fill(is_zero, MIN_NORM)


class CosineState(NamedTuple):
    """What causal cosine attention remembers of each sequence: constant in the number of tokens.

    Attributes:
        kv: `[N, H, K, V]`, the sum over past real tokens of k_hat_j (v_j / max(c_j ** p, 1))^T; of what log_decay
            and beta have left; float32 (float64 for float64 inputs).
        seen: `[N]` int64, number of real tokens so far (the count c that the next token continues from).
    """

    kv: Float[Tensor, "N H K V"]
    seen: Int[Tensor, " N"]

    @classmethod
    def zeros(
        cls,
        num_sequences: int,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> CosineState:
        """The state before the first token."""
        kv = torch.zeros(num_sequences, num_heads, key_dim, value_dim, dtype=dtype, device=device)
        return cls(kv, torch.zeros(num_sequences, dtype=torch.int64, device=device))

    def detach(self) -> CosineState:
        """The same state cut off from the graph, as truncated back-propagation needs between windows."""
        return CosineState(self.kv.detach(), self.seen)

    def index_select(self, index: Int[Tensor, " M"]) -> CosineState:
        """The states of the sequences in `index`, in that order, repeats allowed (beam search)."""
        return CosineState(self.kv.index_select(0, index), self.seen.index_select(0, index))

    @property
    def nbytes(self) -> int:
        """Bytes held by both tensors."""
        return self.kv.nbytes + self.seen.nbytes
