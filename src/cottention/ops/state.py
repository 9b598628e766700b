"""The recurrent state of causal cosine attention and the one-token step.

Without decay the whole past of a sequence is one K x V matrix per head and a count of real tokens, so decoding costs
the same at every position, and carrying the state across any split gives the result of one pass.

    state = CosineState.zeros(num_sequences=2, num_heads=8, key_dim=64, value_dim=64)
    o, state = cosine_attention_step(q, k, v, norm_const, state)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cottention.ops.autocast import as_autocast_would, without_autocast
from cottention.ops.native import library as library
from cottention.ops.native.binding import suits_native
from cottention.ops.validation import check_step_arguments

# Below this norm a query or key counts as zero: what the published weights were trained with.
MIN_NORM = 1e-12


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for inputs of `dtype`: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class CosineState(NamedTuple):
    """What causal cosine attention remembers of each sequence: constant in the number of tokens.

    Attributes:
        kv: `[N, H, K, V]`, the sum over past real tokens of k_hat_j (v_j / max(c_j ** p, 1))^T; float32 (float64 for
            float64 inputs).
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


def cosine_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    state: CosineState | None,
    *,
    attention_mask: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, CosineState]:
    """One token of causal cosine attention in O(K V) time, whatever came before.

    S_t = S_{t-1} + k_hat_t (v_t / max(c_t ** sigmoid(m), 1))^T;  o_t = S_t^T q_hat_t

    Args:
        q: `[B, H, K]`, or `[B, 1, H, K]` as `cosine_attention` takes it; float64, float32, bfloat16 or float16.
        k: like q.
        v: `[B, H, V]` or `[B, 1, H, V]`.
        norm_const: `[H]` or `[1, H, 1, 1]`, the exponent before the sigmoid; None divides by nothing.
        state: of the B sequences so far; None before the first token. It is left as it was unless `in_place`.
        attention_mask: `[B]` or `[B, 1]`, 1 = real; a padded row gives 0 and keeps its state. None: all real.
        in_place: write the new state over `state`, which is returned; for decoding loops that own it. Not where a
            gradient is wanted.
    Returns:
        Output in q's dtype and shape (V for K), and the new state.
    Raises:
        ValueError: shapes disagree, or in_place without a state, or with one whose gradient is wanted.
        TypeError: dtypes are mixed or not floating point.
    Source: arXiv 2409.18747, section 3 (recurrent form). Differs: the count is kept per sequence and skips padding.
    """
    q, k, v = as_autocast_would(q, k, v)
    norm_const = check_step_arguments(q, k, v, norm_const, state, attention_mask)
    wants_gradient = _wants_gradient(q, k, v, norm_const, *(state or ()))
    if in_place and (state is None or wants_gradient):
        found = "state=None" if state is None else "inputs that require a gradient"
        raise ValueError(f"in_place needs a state to write over and no gradient; got {found}")
    fused = None if wants_gradient else _fused_step(q, k, v, norm_const, state, attention_mask, in_place)
    o, new = fused or plain_step(q, k, v, norm_const, state, attention_mask)
    if in_place and state is not None and new is not state:
        state.kv.copy_(new.kv)
        state.seen.copy_(new.seen)
        new = state
    return o, new


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _fused_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    state: CosineState | None,
    attention_mask: Tensor | None,
    in_place: bool,
) -> tuple[Tensor, CosineState] | None:
    """The step as one kernel, by Triton or by the native library; None where neither serves."""
    real = None if attention_mask is None else attention_mask.reshape(-1).to(torch.bool)
    if q.is_cuda:
        return _triton_step(q, k, v, norm_const, state, real, in_place)
    if not suits_native(q) or torch.compiler.is_compiling():
        return None
    if state is None:
        o, *new = torch.ops.cottention.native_step(q, k, v, norm_const, real, None, None)
    elif in_place and state.kv.is_contiguous() and state.seen.is_contiguous():
        return torch.ops.cottention.native_step_(q, k, v, norm_const, real, *state), state
    else:
        o, *new = torch.ops.cottention.native_step(q, k, v, norm_const, real, *state)
    return o, CosineState(*new)


def _triton_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    state: CosineState | None,
    real: Tensor | None,
    in_place: bool,
) -> tuple[Tensor, CosineState] | None:
    from cottention.ops.triton import why_not  # these take CosineState from here
    from cottention.ops.triton.step import step, step_in_place

    if why_not(q.device, q.dtype, q.shape[-1], v.shape[-1]) is not None:
        return None
    q1, k1, v1 = (x.squeeze(1) if x.dim() == 4 else x for x in (q, k, v))  # [B, H, K or V]
    if in_place and state is not None:
        o, new = step_in_place(q1, k1, v1, norm_const, state, real), state
    else:
        o, new = step(q1, k1, v1, norm_const, state, real)
    return o.reshape(*q.shape[:-1], v.shape[-1]), new


@without_autocast
def plain_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm_const: Tensor | None,
    state: CosineState | None,
    attention_mask: Tensor | None,
) -> tuple[Tensor, CosineState]:
    """The step in plain torch operators, for checked arguments: differentiable, on any device and in any dtype."""
    q1, k1, v1 = (x.squeeze(1) if x.dim() == 4 else x for x in (q, k, v))  # [B, H, K or V]
    B, H, K = q1.shape
    dtype = accumulation_dtype(q.dtype)
    if state is None:
        state = CosineState.zeros(B, H, K, v1.shape[-1], dtype=dtype, device=q.device)
    real = None
    if attention_mask is not None:
        real = attention_mask.reshape(B).to(torch.bool)
        q1, k1, v1 = (x.masked_fill(~real[:, None, None], 0) for x in (q1, k1, v1))
    q_hat, k_hat = (torch.nn.functional.normalize(x.to(dtype), dim=-1, eps=MIN_NORM) for x in (q1, k1))
    seen = state.seen + (1 if real is None else real.to(torch.int64))  # [B]
    value = v1.to(dtype)
    if norm_const is not None:
        p = torch.sigmoid(norm_const.to(dtype))  # [H]
        value = value / (seen.clamp(min=1).to(dtype)[:, None] ** p)[..., None]
    kv = state.kv + k_hat[..., None] * value[..., None, :]  # [B, H, K, V]
    o = torch.einsum("bhk,bhkv->bhv", q_hat, kv)
    return o.to(q.dtype).reshape(*q.shape[:-1], v.shape[-1]), CosineState(kv, seen)
