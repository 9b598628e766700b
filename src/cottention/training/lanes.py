"""Reading a corpus in lanes: each lane goes on where it stopped when it had its last turn.

One pass cuts the windows of the corpus, joined to a ring and turned by a random number, into as many stretches of equal
length as there are lanes, and each lane reads one of them, window after window. So the state of a document can go from
a window to the next (`training/carried.py`). A step of G windows takes G lanes, and steps take turns between the lanes:
with more lanes than G, steps that follow each other read other documents, nearly as if windows were drawn at random.
A run may begin with windows in random order, each read for itself, and read in lanes later. What stands at a position
of the stream follows from seed, pass and position alone, and a lane always has the same place in its step: with it, the
same process.

    stream = LaneStream(windows, num_lanes=64, step_size=8, num_steps=1000, seed=0)
    batch = collate_lanes(stream.__getitems__([0, 1, 2, 3]))    # the first window of lanes 0 to 3, packed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cottention.errors import DataError
from cottention.files import IGNORE_INDEX
from cottention.training.stream import ExampleStream


class Place(NamedTuple):
    """What stands at a position of a stream of lanes."""

    row: int
    """Window of the corpus."""
    lane: int
    """Who reads it."""
    pass_number: int
    """Passes that were completed before."""
    continues: bool
    """Whether the lane read the window before it at its last turn."""


class LaneStream(Dataset[dict[str, Any]]):
    """`num_steps` steps of `step_size` windows; position = step * step_size + place in the step.

    Args:
        windows: rows of `pack_windows`.
        num_lanes: stretches that are read side by side, a multiple of `step_size`.
        step_size: windows per step.
        num_steps: length of the stream.
        seed: decides where each pass begins.
        afresh_steps: steps at the beginning that read windows in random order instead; nothing goes on there.

    Raises:
        DataError: there are fewer windows than lanes.
    """

    def __init__(
        self, windows: Any, *, num_lanes: int, step_size: int, num_steps: int, seed: int, afresh_steps: int = 0
    ) -> None:
        self.windows_per_lane = len(windows) // num_lanes
        if not self.windows_per_lane:
            raise DataError(
                f"the text fills {len(windows)} windows, too few for the {num_lanes} lanes of data.carry_state; "
                "lower data.carry_lanes, training.global_batch_size or data.sequence_length"
            )
        self.windows = windows
        self.num_lanes = num_lanes
        self.step_size = step_size
        self.num_steps = num_steps
        self.seed = seed
        self.afresh_steps = afresh_steps
        self._afresh = ExampleStream(windows, num_examples=afresh_steps * step_size, seed=seed)

    def __len__(self) -> int:
        return self.num_steps * self.step_size

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Windows of a micro batch, read together."""
        places = [self.place(position) for position in positions]
        examples = read_windows(self.windows, [place.row for place in places])
        about = [{"lane": p.lane, "continues": p.continues, "pass_number": p.pass_number} for p in places]
        return [{**example, **more} for example, more in zip(examples, about, strict=True)]

    def place(self, position: int) -> Place:
        """What stands at a position."""
        step, lane_in_step = divmod(position, self.step_size)
        if step < self.afresh_steps:
            row, number = self._afresh.index_at(position), position // len(self.windows)
            return Place(row, lane_in_step, number, continues=False)
        round_number, turn_of_step = divmod(step - self.afresh_steps, self.num_lanes // self.step_size)
        lane = turn_of_step * self.step_size + lane_in_step
        number, offset = divmod(round_number, self.windows_per_lane)
        number += -(-len(self._afresh) // len(self.windows))
        turn = int(np.random.default_rng([self.seed, number]).integers(len(self.windows)))
        row = (turn + lane * self.windows_per_lane + offset) % len(self.windows)
        return Place(row, lane, number, continues=offset > 0)


def own_lanes(num_lanes: int, micro_batch_size: int, process_index: int, num_processes: int) -> list[int]:
    """Lanes of a process: micro batches go round the processes, the same way in every step."""
    return [lane for lane in range(num_lanes) if lane // micro_batch_size % num_processes == process_index]


def read_windows(windows: Any, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Windows with the token that follows each one in the corpus, `next_id`; -100 behind the last.

    Args:
        windows: rows of `pack_windows`.
        rows: which.
    """
    following = [row + 1 for row in rows if row + 1 < len(windows)]
    wanted = np.unique([*rows, *following])
    columns = windows[wanted.tolist()]
    found = {int(row): {name: column[i] for name, column in columns.items()} for i, row in enumerate(wanted)}
    examples = []
    for row in rows:
        follows = found.get(row + 1)
        examples.append({**found[row], "next_id": IGNORE_INDEX if follows is None else int(follows["input_ids"][0])})
    return examples


def collate_lanes(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pack windows of several lanes end to end, without their padding, cut at the documents' starts.

    Returns:
        input_ids, shift_labels `[1, T]`; cu_seqlens, int32; lanes `[B]`; first_pieces `[B]`, the piece that each lane's
        window begins with; continues `[B]`, whether that piece goes on with the document before.
    """
    ids: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    continues = []
    length = 0
    for row in rows:
        tokens = np.asarray(row["input_ids"])[: int(row["num_tokens"])].astype(np.int64)
        is_whole = len(tokens) == len(row["input_ids"])
        begins = np.asarray(row["document_starts"], dtype=np.int64)
        ids.append(tokens)
        targets.append(np.append(tokens[1:], row["next_id"] if is_whole else IGNORE_INDEX))
        starts.append(np.unique(np.append(begins, 0)) + length)
        continues.append(bool(row["continues"]) and 0 not in begins)
        length += len(tokens)
    num_pieces = np.cumsum([len(each) for each in starts])
    return {
        "input_ids": torch.from_numpy(np.concatenate(ids)[None]),
        "shift_labels": torch.from_numpy(np.concatenate(targets)[None]),
        "cu_seqlens": torch.from_numpy(np.append(np.concatenate(starts), length).astype(np.int32)),
        "lanes": torch.tensor([int(row["lane"]) for row in rows]),
        "first_pieces": torch.from_numpy(np.append(0, num_pieces[:-1])),
        "continues": torch.tensor(continues),
    }
