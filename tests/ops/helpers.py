"""Random inputs for the operation and the comparison of two implementations in values and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cottention.ops import CosineState, cosine_attention

# Against float64 truth, relative to the largest entry: rounding of the dtype times a few sums of a hundred terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Case:
    """Arguments of one call, with what flows back into it."""

    q: Tensor
    k: Tensor
    v: Tensor
    norm_const: Tensor | None
    causal: bool
    attention_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    initial_state: CosineState | None = None
    output_final_state: bool = False
    log_decay: Tensor | None = None
    beta: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another dtype (states in the dtype that goes with it)."""
        state = self.initial_state
        if state is not None:
            state = CosineState(state.kv.to(torch.float64 if dtype == torch.float64 else torch.float32), state.seen)
        norm_const = None if self.norm_const is None else self.norm_const.to(dtype)
        return replace(
            self,
            q=self.q.to(dtype),
            k=self.k.to(dtype),
            v=self.v.to(dtype),
            norm_const=norm_const,
            initial_state=state,
            log_decay=None if self.log_decay is None else self.log_decay.to(_wide(dtype)),
            beta=None if self.beta is None else self.beta.to(dtype),
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_case(
    *,
    B: int = 2,
    T: int = 65,
    S: int | None = None,
    H: int = 2,
    K: int = 8,
    V: int = 12,
    causal: bool = True,
    mask: str | None = None,
    lengths: Sequence[int] | None = None,
    with_state: bool = False,
    output_final_state: bool = False,
    norm_const: bool = True,
    log_decay: float | None = None,
    beta: bool = False,
    seed: int = 0,
) -> Case:
    """A random call. `mask`: right, left, holes, empty_row; `lengths` packs sequences of these lengths into one row.

    `log_decay` is the strongest one; a third of the tokens forget nothing. Of beta some are 0 and some 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        # values that float16 and bfloat16 hold exactly, so that every dtype is given the same numbers
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).clamp(-4, 4).to(torch.float64)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(torch.bfloat16).to(torch.float64)

    cu_seqlens = None
    if lengths is not None:
        B, T = 1, sum(lengths)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    S = T if S is None else S
    num_sequences = B if lengths is None else len(lengths)
    state = None
    if with_state:
        seen = torch.randint(0, 5, (num_sequences,), generator=generator)
        state = CosineState(randn(num_sequences, H, K, V), seen)
    return Case(
        randn(B, T, H, K),
        randn(B, S, H, K),
        randn(B, S, H, V),
        randn(H) if norm_const else None,
        causal,
        None if mask is None else make_mask(mask, B, S, generator),
        cu_seqlens,
        state,
        output_final_state,
        None if log_decay is None else log_decay * (1.5 * rand(B, T, H) - 0.5).clamp(min=0),
        (1.4 * rand(B, T, H) - 0.2).clamp(0, 1).to(torch.bfloat16).to(torch.float64) if beta else None,
    )


def make_mask(kind: str, B: int, S: int, generator: torch.Generator) -> Tensor:
    """`[B, S]` bool with padding at the right, the left, anywhere, or over a whole row."""
    length = torch.randint(0, S + 1, (B, 1), generator=generator)
    position = torch.arange(S)[None]
    if kind == "right":
        return position < length
    if kind == "left":
        return position >= S - length
    mask = torch.rand(B, S, generator=generator) < 0.6
    if kind == "empty_row":
        mask[0] = False
    return mask


def run(case: Case, implementation: str, **options: Any) -> dict[str, Tensor]:
    """Output, final state and every gradient under fixed random upstream gradients, in the case's dtype."""
    leaves: dict[str, Tensor] = {"dq": case.q, "dk": case.k, "dv": case.v}
    if case.norm_const is not None:
        leaves["dnorm_const"] = case.norm_const
    if case.initial_state is not None:
        leaves["dkv"] = case.initial_state.kv
    if case.log_decay is not None:
        leaves["dlog_decay"] = case.log_decay
    if case.beta is not None:
        leaves["dbeta"] = case.beta
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    state = case.initial_state
    o, final = cosine_attention(
        leaves["dq"],
        leaves["dk"],
        leaves["dv"],
        leaves.get("dnorm_const"),
        causal=case.causal,
        attention_mask=case.attention_mask,
        cu_seqlens=case.cu_seqlens,
        initial_state=None if state is None else CosineState(leaves["dkv"], state.seen),
        output_final_state=case.output_final_state,
        log_decay=leaves.get("dlog_decay"),
        beta=leaves.get("dbeta"),
        implementation=implementation,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    results = {"o": o}
    loss = (o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum()
    if final is not None:
        results |= {"final_kv": final.kv, "final_seen": final.seen}
        loss = loss + (final.kv.double() * torch.randn(final.kv.shape, generator=generator, dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        results[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: x.detach() for name, x in results.items()}


def assert_same(got: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every result agrees, relative to its largest entry or to 1, the size of inputs and upstream gradients.

    The 1 is for gradients that are zero but for rounding: with K = 1 a unit vector is a sign.
    """
    assert got.keys() == truth.keys()
    for name, expected in truth.items():
        actual = got[name]
        assert actual.shape == expected.shape, name
        assert torch.isfinite(actual).all(), name
        scale = expected.abs().max().item() if expected.numel() else 0.0
        error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        assert error <= TOLERANCE[dtype] * max(scale, 1.0), f"{name}: off by {error} where the largest is {scale}"
