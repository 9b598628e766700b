"""How much of its state a head keeps at each token: fixed, learned, or read off the token.

    log_decay_t = -rate                                     fixed, learned: one rate per head
    log_decay_t = -exp(log_rate) softplus(W x_t + b)        data: one per head and token

The half-lives start spread over the heads, from 8 tokens to the longest that was asked for, in equal ratios. All of it
is computed in float32 (float64 for float64 tokens), because sums over thousands of tokens become exponents.

    log_decay = Decay("data", hidden_size=512, num_heads=8, longest_half_life=1024)(x)      # [B, T, H]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from cottention.ops.autocast import without_autocast
from cottention.ops.state import accumulation_dtype

DECAYS = ("none", "fixed", "learned", "data")
SHORTEST_HALF_LIFE = 8


class Decay(nn.Module):
    """The logarithm of what each head keeps.

    Args:
        kind: one of `DECAYS` but "none".
        hidden_size: D, width of the tokens.
        num_heads: H.
        longest_half_life: tokens after which the head that forgets least has kept one half, at the start.
    """

    without_weight_decay: ClassVar[tuple[str, ...]] = ("log_rate", "weight", "bias")
    log_rate: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, kind: str, hidden_size: int, num_heads: int, longest_half_life: int) -> None:
        super().__init__()
        self.kind = kind
        self.longest_half_life = longest_half_life
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        log_rate = torch.empty(num_heads, dtype=dtype)
        if kind == "fixed":
            self.register_buffer("log_rate", log_rate)  # saved, so that another window does not change the model
        else:
            self.log_rate = nn.Parameter(log_rate)
        reads = kind == "data"
        self.weight = nn.Parameter(torch.empty(num_heads, hidden_size, dtype=dtype)) if reads else None
        self.bias = nn.Parameter(torch.empty(num_heads, dtype=dtype)) if reads else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, copy: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        """Start at the spread half-lives, with little weight on what the token says."""
        start = self._spread_log_rates()
        with torch.no_grad():
            if self.weight is None or self.bias is None:
                copy(self.log_rate, start)
                return
            nn.init.zeros_(self.log_rate)
            nn.init.normal_(self.weight, std=std)
            copy(self.bias, start.exp().expm1().log())  # softplus of it is the rate

    def _spread_log_rates(self) -> Tensor:
        num_heads, device = len(self.log_rate), self.log_rate.device
        longest = math.log(max(self.longest_half_life, SHORTEST_HALF_LIFE))
        log_half_life = torch.linspace(math.log(SHORTEST_HALF_LIFE), longest, num_heads, dtype=torch.float64)
        return (math.log(math.log(2)) - log_half_life).to(device)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        """log_decay of these tokens, below 0."""
        return _log_decay(x, self.log_rate, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Kind and size."""
        return f"kind={self.kind!r}, num_heads={len(self.log_rate)}"


@without_autocast
def _log_decay(x: Tensor, log_rate: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    rate = log_rate.to(dtype).exp()
    if weight is None or bias is None:
        return -rate.expand(*x.shape[:2], -1)
    return -rate * softplus(linear(x.to(dtype), weight.to(dtype), bias.to(dtype)))
