"""Predict the next token with states that go from window to window: truncated back-propagation through time (TBPTT).

The corpus is read in lanes (`training/lanes.py`), and each process keeps the states of its own (`training/carried.py`).

    objective = Carried(recipe)
    objective.begin(model, device, rank=0, num_ranks=1)
    objective.loss(model, collate_lanes(rows), num_targets)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from cottention.logging import get_logger
from cottention.training.carried import CarriedStates
from cottention.training.held_out_carried import CarriedHeldOut
from cottention.training.lanes import LaneStream, collate_lanes, own_lanes
from cottention.training.objectives.base import OpenedText, PreparedText
from cottention.training.objectives.causal import Causal
from cottention.training.processes import Processes

_FILE = "carried_states.safetensors"

logger = get_logger(__name__)


class Carried(Causal):
    """A cosine GPT's objective on long documents."""

    laid_out_by_steps = ("carry_state",)
    _states: CarriedStates

    def examples(self, opened: OpenedText) -> PreparedText:
        """Packed windows, measured with and without carried states."""
        windows, held_out, targets_per_byte = self.packed(opened)
        measure = CarriedHeldOut(
            held_out,
            num_lanes=self.recipe.training.micro_batch_size,
            max_windows=self.most_held_out,
            targets_per_byte=targets_per_byte,
            limit=self.recipe.data.carry_tokens,
        )
        return self._prepared(opened, windows, collate_lanes, measure)

    def stream(self, text: PreparedText) -> LaneStream:
        """Lanes that go on where they stopped."""
        training = self.recipe.training
        return LaneStream(
            text.train,
            num_lanes=self.recipe.num_lanes,
            step_size=training.global_batch_size,
            num_steps=training.max_steps,
            seed=training.seed,
            afresh_steps=self.recipe.num_afresh_steps,
        )

    def begin(self, model: PreTrainedModel, device: Any, rank: int, num_ranks: int) -> None:
        """Zero states of the lanes that this process reads."""
        lanes = own_lanes(self.recipe.num_lanes, self.recipe.training.micro_batch_size, rank, num_ranks)
        config: Any = model.config
        self._states = CarriedStates(config, lanes=lanes, limit=self.recipe.data.carry_tokens, device=device)
        if rank == 0:
            logger.info(
                "carrying the states of %d lanes on each device: %.1f MB", len(lanes), self._states.nbytes / 1e6
            )

    def loss(self, model: Any, batch: Mapping[str, Tensor], num_targets: Tensor | None) -> dict[str, Tensor]:
        """What the model makes of a pass from the states of its lanes on."""
        own, cache = self._states.open(batch)
        outputs = model(**own, past_key_values=cache, use_cache=True, num_items_in_batch=num_targets)
        self._states.close(batch, cache)
        return self._named(outputs)

    def state_to_save(self, processes: Processes) -> tuple[str, dict[str, Tensor]]:
        """The states of all lanes."""
        return _FILE, self._states.to_tensors(processes)

    def take_up(self, checkpoint: Path) -> None:
        """Take up the states of the lanes that are read here."""
        self._states.load(checkpoint / _FILE)
