"""The order of the data: every pass is a permutation, and any part of the stream is known without the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader

from cottention.training.stream import ExampleStream, InOrder

SIZE = 7


def stream(num_examples: int = 40, seed: int = 0) -> ExampleStream:
    """A stream over 7 rows that know their numbers."""
    rows = Dataset.from_dict({"row": list(range(SIZE)), "text": [f"text {n}" for n in range(SIZE)]})
    return ExampleStream(rows.with_format("numpy"), num_examples=num_examples, seed=seed)


def numbers(batch: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(row, pass) of each example; collates by doing nothing else."""
    return [(int(example["row"]), example["pass_number"]) for example in batch]


def loaded(order: ExampleStream, **options: Any) -> list[list[tuple[int, int]]]:
    """Micro batches of three, as the Trainer loads them."""
    return list(DataLoader(order, batch_size=3, sampler=InOrder(len(order)), collate_fn=numbers, **options))


def test_every_pass_reads_every_row_once_in_a_new_order() -> None:
    order = stream()
    passes = [[order.index_at(n * SIZE + i) for i in range(SIZE)] for n in range(5)]
    assert all(sorted(one) == list(range(SIZE)) for one in passes)
    assert len({tuple(one) for one in passes}) == 5
    examples = [order[position] for position in range(len(order))]
    assert [example["pass_number"] for example in examples] == [position // SIZE for position in range(40)]
    assert [int(example["row"]) for example in examples] == [order.index_at(position) for position in range(40)]


def test_the_seed_decides_the_order() -> None:
    orders = [[stream(seed=seed).index_at(position) for position in range(40)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_position_does_not_depend_on_what_was_read_before() -> None:
    in_order = [stream().index_at(position) for position in range(40)]
    one = stream()
    positions = np.random.default_rng(0).permutation(40)
    jumping = {position: one.index_at(position) for position in positions}
    assert [jumping[position] for position in range(40)] == in_order


def test_examples_read_together_are_those_read_one_by_one() -> None:
    order = stream()
    together = order.__getitems__(list(range(5, 16)))  # across the end of a pass
    alone = [order[position] for position in range(5, 16)]
    assert [sorted(example) for example in together] == [["pass_number", "row", "text"]] * 11
    assert numbers(together) == numbers(alone)
    assert [example["text"] for example in together] == [example["text"] for example in alone]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # what a DataLoader does by default
def test_workers_do_not_change_the_order() -> None:
    assert loaded(stream(), num_workers=2, multiprocessing_context="fork", timeout=60) == loaded(stream())


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_any_number_of_processes_shares_one_order(num_processes: int) -> None:
    """Of 4 micro batches a step, each process gets its share; together they are the same examples, step by step."""
    order = stream(num_examples=3 * 4 * 5)
    batches = loaded(order)
    steps = [batches[start : start + 4] for start in range(0, len(batches), 4)]
    shares = []
    for index in range(num_processes):
        loader = DataLoader(order, batch_size=3, sampler=InOrder(len(order)), collate_fn=numbers)
        shares.append(
            list(prepare_data_loader(loader, num_processes=num_processes, process_index=index, put_on_device=False))
        )
    per_step = 4 // num_processes
    for number, expected in enumerate(steps):
        own = [batch for share in shares for batch in share[number * per_step : (number + 1) * per_step]]
        assert sorted(own) == sorted(expected)
