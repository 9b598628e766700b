"""Slices of a sequence, one on each of several processes, give what one process gives of the whole sequence.

The operation, models, and layers. One file, so that tests in parallel start the processes once.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import layer_checks
from tests.distributed.model_checks import MODELS, check_loss_and_gradients, check_training
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


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_models_equal_one_process(ranks: Ranks, size: int) -> None:
    ranks.run(check_loss_and_gradients, list(MODELS), torch.float64, 1e-10, size=size)


def test_models_equal_one_process_in_float32(ranks: Ranks) -> None:
    ranks.run(check_loss_and_gradients, ["gpt_plus", "bert"], torch.float32, 1e-5, size=2)


@pytest.mark.slow
def test_training_on_slices_has_the_curve_of_one_process(ranks: Ranks) -> None:
    ranks.run(check_training, "gpt_plus", size=4)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_state_goes_from_window_to_window(ranks: Ranks, size: int) -> None:
    ranks.run(layer_checks.check_states_go_through, size=size)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_second_derivatives_are_those_of_one_process(ranks: Ranks, size: int) -> None:
    ranks.run(layer_checks.check_second_derivatives, size=size)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_are_those_of_the_formula_at_any_length(ranks: Ranks, size: int) -> None:
    ranks.run(layer_checks.check_bytes, size=size)


def test_what_a_slice_cannot_do_is_refused(ranks: Ranks) -> None:
    ranks.run(layer_checks.check_refusals, size=2)


@pytest.mark.slow
def test_sequence_beside_fsdp_has_the_curve_of_one_process(ranks: Ranks) -> None:
    ranks.run(layer_checks.check_beside_fsdp, 2, size=4)


@pytest.mark.slow
def test_the_example_has_the_losses_of_whole_texts() -> None:
    example = Path(__file__).parents[2] / "examples" / "sequence_parallel.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(example)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    losses = [tuple(map(float, re.findall(r"\d+\.\d+", line))) for line in ran.stdout.splitlines()]
    assert losses[-1][0] < losses[0][0] / 2
    for shared, whole in losses:
        assert shared == pytest.approx(whole, rel=2e-3)
