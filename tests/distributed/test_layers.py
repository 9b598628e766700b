"""Layers over slices: states, second derivatives, bytes, refusals, and weights sharded beside."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import layer_checks
from tests.distributed.ranks import Ranks


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
