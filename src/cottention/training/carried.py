"""States that go from window to window: truncated back-propagation through documents of any length.

Each lane of a step (`training/lanes.py`) keeps one recurrent state per layer. A window that goes on with a document
starts from its lane's states, cut off from the graph, and from the position where they stand; a document that begins
starts from zero. Softmax attention has nothing of constant size that it could carry, and the layers of a hybrid that
have it make it impossible for all.

    states = CarriedStates(model.config, lanes=range(8))
    inputs, cache = states.open(batch)                  # batch: of `collate_lanes`
    loss = model(**inputs, past_key_values=cache, use_cache=True).loss
    states.close(batch, cache)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from cottention.errors import CheckpointError
from cottention.layers import AttentionState
from cottention.models import CosineCache, CottentionGPTConfig
from cottention.models.layer_types import check_carries
from cottention.ops import CosineState
from cottention.training.processes import Processes


class CarriedStates:
    """The states of some lanes after the windows read so far; zero before the first.

    Args:
        config: of the model.
        lanes: numbers of the lanes that are kept here, on this process.
        limit: tokens of a document after which its state starts anew, at the next window; None: never.
        device: where the model is.
        dtype: of the states: float32, for a model in float64 the same.

    Raises:
        SettingsError: a layer is not one of cosine attention.
    """

    def __init__(
        self,
        config: CottentionGPTConfig,
        *,
        lanes: Sequence[int],
        limit: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_carries(config.layer_types)
        head_dim = config.n_embd // config.n_head
        self.limit = limit
        self._lanes = torch.tensor(list(lanes), dtype=torch.int64, device=device)
        shape = (len(lanes), config.n_head, head_dim, head_dim)
        # Each layer's matrices, and what its short convolution reads, if it has one.
        self._kept: list[dict[str, Tensor]] = []
        for _ in range(config.n_layer):
            kept = {"kv": torch.zeros(shape, dtype=dtype, device=device)}
            if config.short_conv:
                wide = (len(lanes), config.short_conv - 1, 3 * config.n_embd)
                kept["inputs"] = torch.zeros(wide, dtype=dtype, device=device)
            self._kept.append(kept)
        # Nothing is padded, so the tokens that a state has seen are also the position of the next one.
        self._seen = torch.zeros(len(lanes), dtype=torch.int64, device=device)
        self._index = torch.zeros(max(lanes, default=0) + 1, dtype=torch.int64, device=device)
        self._index[self._lanes] = torch.arange(len(lanes), device=device)

    @property
    def nbytes(self) -> int:
        """Bytes held, whatever the length of the documents."""
        return sum(part.nbytes for kept in self._kept for part in kept.values()) + self._seen.nbytes

    def open(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], CosineCache]:
        """What the model takes for a batch, and a cache with a row for each of its pieces, at the start of the batch.

        Args:
            batch: of `collate_lanes`, of lanes that are kept here.
        """
        own, first = self._index[batch["lanes"]], batch["first_pieces"]
        num_pieces = len(batch["cu_seqlens"]) - 1
        goes_on = batch["continues"]
        if self.limit is not None:
            goes_on = goes_on & (self._seen[own] < self.limit)
        seen = self._seen.new_zeros(num_pieces)
        seen[first] = self._seen[own].masked_fill(~goes_on, 0)
        cache = CosineCache(len(self._kept))
        for layer, kept in zip(cache.layers, self._kept, strict=True):
            parts = {}
            for name, part in kept.items():
                parts[name] = part.new_zeros(num_pieces, *part.shape[1:])
                stays = goes_on.view(-1, *[1] * (part.dim() - 1))
                parts[name][first] = part[own].masked_fill(~stays, 0)
            kind = AttentionState if "inputs" in parts else CosineState
            layer.advance(kind(seen=seen, **parts), 0)
        cache.next_position = seen
        return {name: batch[name] for name in ("input_ids", "shift_labels", "cu_seqlens")}, cache

    def close(self, batch: Mapping[str, Tensor], cache: CosineCache) -> None:
        """Take up each lane's state at the end of a batch that has gone through the model."""
        own = self._index[batch["lanes"]]
        num_pieces = batch["first_pieces"].new_tensor([len(batch["cu_seqlens"]) - 1])
        last = torch.cat([batch["first_pieces"][1:], num_pieces]) - 1
        for kept, state in zip(self._kept, cache.states, strict=True):
            assert state is not None
            for name, part in kept.items():
                part[own] = getattr(state, name)[last].to(part.dtype)
        assert cache.next_position is not None
        self._seen[own] = cache.next_position[last]

    def to_tensors(self, processes: Processes | None = None) -> dict[str, Tensor]:
        """The states of all processes' lanes, in the lanes' order and on the CPU, to save with safetensors.

        Args:
            processes: where several each keep their own lanes; all of them must call this.
        """
        gather = processes.gather if processes is not None else lambda x: x
        order = gather(self._lanes).argsort()
        tensors = {name: gather(part)[order].cpu() for name, part in self._named().items()}
        return {**tensors, "seen": gather(self._seen)[order].cpu()}

    def load(self, path: Path) -> None:
        """Take up the states that `to_tensors` gave, of the lanes that are kept here.

        Raises:
            CheckpointError: they are not there, or those of another model.
        """
        if not path.is_file():
            raise CheckpointError(f"{path.parent} has no {path.name}: it cannot go on with carried states")
        tensors = load_file(path)
        wanted = self._named() | {"seen": self._seen}
        lanes = self._lanes.cpu()
        for name, kept in wanted.items():
            found = tensors.get(name)
            if found is None or found.shape[1:] != kept.shape[1:] or len(found) <= int(lanes.max()):
                raise CheckpointError(f"{path} holds the states of another model; {name} does not fit")
            kept.copy_(found[lanes])

    def _named(self) -> dict[str, Tensor]:
        return {f"layers.{i}.{name}": part for i, kept in enumerate(self._kept) for name, part in kept.items()}
