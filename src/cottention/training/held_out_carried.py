"""Held-out loss with states carried from window to window, beside that of the same windows each read for itself.

The held-out windows are cut into some stretches of consecutive ones, read side by side. Both figures count the same
targets: every token but the first of the text, for a window's last token has the next window's first as its target.

    held_out = CarriedHeldOut(windows, num_lanes=8, max_windows=400, targets_per_byte=0.27)
    held_out.measure(model, autocast)   # {"val_loss": 3.31, "val_ppl": ..., "val_reset_loss": 3.38}
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cottention.files import IGNORE_INDEX
from cottention.training.carried import CarriedStates
from cottention.training.lanes import collate_lanes, read_windows
from cottention.training.processes import Processes


class CarriedHeldOut:
    """A fixed set of stretches and how to measure a model on it.

    Args:
        windows: rows of `pack_windows`, the last one padded.
        num_lanes: stretches, all in one pass of the model.
        max_windows: windows to read, at most, but one of each stretch; those of a longer text are spread over it.
        targets_per_byte: tokens that the held-out text has per byte, to report nats per byte; None leaves it out.
        limit: see `CarriedStates`.
    """

    def __init__(
        self,
        windows: Any,
        *,
        num_lanes: int,
        max_windows: int,
        targets_per_byte: float | None = None,
        limit: int | None = None,
    ) -> None:
        self._windows = windows
        num_lanes = min(num_lanes, len(windows))
        bounds = np.linspace(0, len(windows), num_lanes + 1).round().astype(int)
        longest = max(1, max_windows // num_lanes)
        self._stretches = [range(start, min(stop, start + longest)) for start, stop in itertools.pairwise(bounds)]
        self._targets_per_byte = targets_per_byte
        self._limit = limit

    def measure(
        self, model: PreTrainedModel, autocast: Mapping[str, Any], processes: Processes | None = None
    ) -> dict[str, float]:
        """Measure loss and perplexity per token, nats per byte, and as val_reset_loss the loss without carried states.

        Args:
            model: a cosine GPT, left in the mode it came in.
            autocast: arguments of torch.autocast.
            processes: several that share the work.
        """
        training = model.training
        model.eval()
        rank, world_size = (processes.process_index, processes.num_processes) if processes else (0, 1)
        own = range(len(self._stretches))[rank::world_size]
        sums = torch.zeros(3, dtype=torch.float64, device=model.device)
        with torch.inference_mode(), torch.autocast(**autocast):
            states = CarriedStates(
                model.config,  # pyright: ignore[reportArgumentType]
                lanes=own,
                limit=self._limit,
                device=model.device,
                dtype=torch.float64 if model.dtype == torch.float64 else torch.float32,
            )
            for batch in self._batches(own):
                sums += _sums(model, states, {name: value.to(model.device) for name, value in batch.items()})
        model.train(training)
        if processes is not None:
            sums = processes.reduce(sums)
        carried, reset, num_targets = sums.tolist()
        loss = carried / max(1.0, num_targets)
        measured = {"val_loss": loss, "val_ppl": math.exp(min(loss, 700.0))}
        if self._targets_per_byte is not None:
            measured["val_nats_per_byte"] = loss * self._targets_per_byte
        return {**measured, "val_reset_loss": reset / max(1.0, num_targets)}

    def _batches(self, lanes: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """The next window of every lane that has one."""
        for offset in range(max((len(self._stretches[lane]) for lane in lanes), default=0)):
            rows = {lane: self._stretches[lane][offset] for lane in lanes if offset < len(self._stretches[lane])}
            examples = read_windows(self._windows, list(rows.values()))
            yield collate_lanes(
                [
                    {**example, "lane": lane, "continues": offset > 0}
                    for lane, example in zip(rows, examples, strict=True)
                ]
            )


def _sums(model: PreTrainedModel, states: CarriedStates, batch: Mapping[str, Tensor]) -> Tensor:
    """Nats with carried states and without, and the number of targets."""
    num_targets = (batch["shift_labels"] != IGNORE_INDEX).sum()
    inputs, cache = states.open(batch)
    carried = model(**inputs, past_key_values=cache, use_cache=True).loss
    states.close(batch, cache)
    reset = model(**inputs).loss
    return torch.stack([carried.double() * num_targets, reset.double() * num_targets, num_targets.double()])
