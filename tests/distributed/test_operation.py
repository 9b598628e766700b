"""Attention over slices of a sequence, one on each of several processes, is attention over the whole sequence."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.distributed.operation_checks import Case, check_equal_to_one_process
from tests.distributed.ranks import Ranks

# Slices of different lengths, of no token, of one token.
LENGTHS = {2: [(9, 8), (0, 7), (5, 0)], 4: [(5, 4, 6, 5), (0, 3, 0, 7), (1, 0, 0, 4)]}
# Packed texts of which some end at a cut, some run over one or several, some are empty.
BOUNDS = {
    (9, 8): [(0, 17), (0, 9, 17), (0, 4, 4, 12, 17), (0, 0, 3, 9, 9, 10, 17)],
    (0, 7): [(0, 3, 7)],
    (5, 0): [(0, 5, 5)],
    (5, 4, 6, 5): [(0, 20), (0, 3, 16, 20), (0, 2, 5, 15, 15, 20), (0, 1, 2, 3, 4, 20)],
    (0, 3, 0, 7): [(0, 10), (0, 3, 10), (0, 1, 8, 10)],
    (1, 0, 0, 4): [(0, 5), (0, 1, 5), (0, 3, 3, 5, 5)],
}
GATES = [(), ("decay",), ("beta",), ("decay", "beta")]


def _causal_cases(size: int) -> list[Case]:
    cases: list[Case] = []
    for lengths, gates in itertools.product(LENGTHS[size], GATES):
        extras = [("final",), ("state", "final"), ("mask", "state", "final"), ("no_divisor", "mask")]
        cases += [Case(lengths, True, (*gates, *extra)) for extra in extras]
        for bounds in BOUNDS[lengths]:
            cases += [Case(lengths, True, gates, bounds), Case(lengths, True, (*gates, "state", "final"), bounds)]
    return cases


def _bidirectional_cases(size: int) -> list[Case]:
    cases = [Case(lengths, False, ("cross", "mask")) for lengths in LENGTHS[size]]
    for lengths, gates in itertools.product(LENGTHS[size], GATES[:2]):
        cases += [Case(lengths, False, (*gates, *extra)) for extra in [(), ("mask",), ("no_divisor", "mask")]]
        cases += [Case(lengths, False, gates, bounds) for bounds in BOUNDS[lengths]]
    return cases


def _some(cases: list[Case]) -> list[Case]:
    """One in seven, at a step that meets all options."""
    return cases[::7]


@pytest.mark.parametrize("size", [2, 4])
def test_slices_equal_one_process(ranks: Ranks, size: int) -> None:
    cases = _some(_causal_cases(size)) + _some(_bidirectional_cases(size))
    ranks.run(check_equal_to_one_process, cases, size=size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_all_cuts_and_options_equal_one_process(ranks: Ranks, size: int) -> None:
    ranks.run(check_equal_to_one_process, _causal_cases(size) + _bidirectional_cases(size), size=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_implementation(ranks: Ranks, dtype: torch.dtype) -> None:
    cases = [
        Case((9, 8), causal, options, bounds, dtype, implementation)
        for implementation in ("naive", "chunk", "auto")
        for causal, options, bounds in (
            (True, ("mask", "state", "final"), ()),
            (True, ("decay", "beta"), (0, 4, 4, 12, 17)),
            (False, ("decay", "mask"), ()),
            (False, (), (0, 4, 12, 17)),
        )
    ]
    ranks.run(check_equal_to_one_process, cases, size=2)
