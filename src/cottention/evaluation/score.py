"""What a model's likelihood of a text comes to, in the units in which models are compared.

Nats per token and perplexity compare models of one tokenizer; nats per byte (of the text as UTF-8) compares any two.

    score = TextScore(nats=812.5, num_tokens=250, num_bytes=1000)
    score.perplexity, score.nats_per_byte      # 25.8, 0.8125
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TokenScore:
    """Negative log-likelihood of some tokens."""

    nats: float
    """Sum over them."""
    num_tokens: int
    """How many there are; of a text all its tokens, and one end-of-text per document."""

    @property
    def nats_per_token(self) -> float:
        """Mean over tokens, also called cross-entropy or loss."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """Exponential of nats per token."""
        return exp_of(self.nats_per_token)


@dataclass(frozen=True, kw_only=True)
class TextScore(TokenScore):
    """Negative log-likelihood of a text."""

    num_bytes: int
    """UTF-8 bytes of the text; end-of-text adds none."""

    @property
    def nats_per_byte(self) -> float:
        """All nats, those of end-of-text included, over the bytes of the text."""
        return self.nats / self.num_bytes

    def to_dict(self) -> dict[str, float | int]:
        """Plain numbers, for JSON."""
        return {
            "nats_per_token": self.nats_per_token,
            "perplexity": self.perplexity,
            "nats_per_byte": self.nats_per_byte,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
        }


def exp_of(nats: float) -> float:
    """Exponential; infinite beyond what a float holds."""
    # An untrained or broken model can be beyond what a float holds; that is a result, not an error.
    return math.exp(nats) if nats < 700 else math.inf
