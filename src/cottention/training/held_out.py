"""Loss on text that is not trained on, exact however the windows fall into batches.

held_out = HeldOut(windows, collator=collator, arch="gpt", batch_size=16, targets_per_byte=0.31)
held_out.measure(model, autocast={"device_type": "cpu", "enabled": False})  # {"val_loss": 3.2, ...}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_NOT_A_TARGET = -100


class HeldOut:
    """A fixed set of windows and how to measure a model on it."""

    def __init__(
        self, windows: Any, *, collator: Any, arch: str, batch_size: int, targets_per_byte: float | None
    ) -> None:
        """Describe the set.

        Args:
            windows: dataset of windows.
            collator: as for training, but for BERT with a masking that is the same at every measurement.
            arch: "gpt" or "bert".
            batch_size: windows per pass.
            targets_per_byte: tokens that the held-out text has per byte, to report nats per byte; None leaves it out.
        """
        self._windows = windows
        self._collator = collator
        self._arch = arch
        self._batch_size = batch_size
        self._targets_per_byte = targets_per_byte

    def measure(self, model: PreTrainedModel, autocast: Mapping[str, Any], accelerator: Any = None) -> dict[str, float]:
        """Measure loss and perplexity per token, for GPT nats per byte, for BERT the share of right guesses.

        Args:
            model: left in the mode it came in.
            autocast: arguments of torch.autocast.
            accelerator: where several processes share the work.
        """
        training = model.training
        model.eval()
        rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        sums = torch.zeros(3, dtype=torch.float64)
        starts = range(0, len(self._windows), self._batch_size)
        with torch.inference_mode(), torch.autocast(**autocast):
            for start in starts[rank::world_size]:
                sums += self._measure_batch(model, start)
        model.train(training)
        if world_size > 1:
            sums = accelerator.reduce(sums.to(accelerator.device)).cpu()
        nats, right, num_targets = sums.tolist()
        loss = nats / max(1, num_targets)
        measured = {"val_loss": loss, "val_ppl": math.exp(min(loss, 700.0))}
        if self._targets_per_byte is not None:
            measured["val_nats_per_byte"] = loss * self._targets_per_byte
        if self._arch == "bert":
            measured["val_accuracy"] = right / max(1, num_targets)
        return measured

    def _measure_batch(self, model: PreTrainedModel, start: int) -> Tensor:
        stop = min(start + self._batch_size, len(self._windows))
        batch = self._collator([self._windows[index] for index in range(start, stop)])
        batch = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        num_targets = count_targets(batch, self._arch)
        outputs = model(**batch)
        right = torch.zeros(())
        if self._arch == "bert":
            hidden = batch["labels"] != _NOT_A_TARGET
            logits = outputs.prediction_logits if "prediction_logits" in outputs else outputs.logits
            right = (logits[hidden].argmax(-1) == batch["labels"][hidden]).sum()
        return torch.stack([outputs.loss.double() * num_targets, right.double(), num_targets.double()]).cpu()


def count_targets(batch: Mapping[str, Any], arch: str) -> Tensor:
    """Number of tokens that a batch asks the model to predict, as a 0-d tensor."""
    if "shift_labels" in batch:
        return (batch["shift_labels"] != _NOT_A_TARGET).sum()
    # A GPT's labels are shifted inside: what stands first in a row is nobody's target.
    labels = batch["labels"][..., 1:] if arch == "gpt" else batch["labels"]
    return (labels != _NOT_A_TARGET).sum()
