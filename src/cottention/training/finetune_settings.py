"""Settings of a fine-tuning run on GLUE; the defaults are the published ones. No torch here: `--help` is quick.

settings = FinetuneSettings(epochs=3, train_limit=2000)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from cottention.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """All choices but the model, the task, its data and the seeds."""

    batch_size: int = 32
    """Texts, or pairs, per optimizer step."""
    learning_rate: float = 5e-5
    """Rate of AdamW (after the warmup)."""
    schedule: Literal["constant", "linear"] = "constant"
    """Keep the rate, or let it fall in a straight line to 0."""
    warmup: float = 0.0
    """Fraction of the steps in which the rate rises from 0."""
    epochs: int = 4
    """Passes over the training rows; the best one's model is kept."""
    max_length: int = 128
    """Tokens of a text or pair at most; longer ones are cut and counted."""
    weight_decay: float = 0.01
    """Decoupled decay of every parameter."""
    max_grad_norm: float | None = None
    """Clip the gradient's 2-norm to this; null does not clip."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute type under autocast; auto is bf16 on a GPU that has it, else fp32. Weights stay fp32."""
    from_scratch: bool = False
    """Start from random weights of the same shape: what the task gives without pretraining."""
    train_limit: int | None = None
    """Train on this many rows, drawn once for all seeds; null: on all."""
    dev_limit: int | None = None
    """Measure on the first rows only; null: on all."""
    skip_malformed: bool = False
    """Leave out rows with too few or too many columns, and say how many."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "learning_rate", "max_grad_norm", "train_limit", "dev_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise SettingsError(f"{name} must be positive; got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise SettingsError(f"weight_decay must not be negative; got {self.weight_decay}")
        if not 0 <= self.warmup < 1:
            raise SettingsError(f"warmup must lie in [0, 1); got {self.warmup}")
        if self.max_length < 5:  # [CLS] a [SEP] b [SEP]
            raise SettingsError(f"max_length must be at least 5; got {self.max_length}")

    def batch_size_for(self, num_rows: int) -> int:
        """The batch, which is no larger than all rows: every epoch is a step at least."""
        return min(self.batch_size, num_rows)

    def num_steps(self, num_rows: int, epochs: int | None = None) -> int:
        """Optimizer steps of this many passes over `num_rows` (None: all of them); the last one may begin another."""
        return math.ceil((self.epochs if epochs is None else epochs) * num_rows / self.batch_size_for(num_rows))

    def learning_rate_factor(self, step: int, num_steps: int) -> float:
        """Factor of the rate at update `step` (from 0)."""
        num_warmup = round(self.warmup * num_steps)
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        if self.schedule == "constant":
            return 1.0
        return max(0.0, 1 - (step - num_warmup) / max(1, num_steps - num_warmup))

    def as_dict(self) -> dict[str, Any]:
        """The settings in plain types, for JSON."""
        return dataclasses.asdict(self)
