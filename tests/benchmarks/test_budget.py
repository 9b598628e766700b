"""Predictions and refusals."""

from __future__ import annotations

import pytest

from cottention.benchmarks.budget import Budget, free_bytes, predict

BUDGET = Budget(time_limit_s=10, memory_limit_bytes=1 << 30)


def test_nothing_is_predicted_from_nothing():
    assert predict({}, 1024) == 0
    assert predict({4096: 1.0}, 1024) == 0


def test_one_length_predicts_the_square():
    assert predict({256: 3.0}, 1024) == pytest.approx(48.0)


def test_two_lengths_predict_their_own_growth_with_a_margin_up_to_the_square():
    linear = predict({256: 1.0, 1024: 4.0}, 4096)
    assert 16.0 < linear < 32.0
    assert predict({256: 1.0, 1024: 16.0}, 4096) == pytest.approx(256.0)
    assert predict({256: 1.0, 1024: 64.0}, 4096) == pytest.approx(1024.0)


def test_what_did_not_grow_yet_is_taken_to_grow_linearly():
    assert predict({256: 5.0, 1024: 5.0}, 4096) == pytest.approx(20.0)


def test_a_long_call_is_refused_with_its_time():
    reason = BUDGET.refusal(length=4096, seconds={1024: 1.0}, peak_bytes={1024: 1.0}, input_bytes=0)
    assert reason == "a call would take about 16 s, the limit is 10 s"


def test_a_large_call_is_refused_with_its_memory_inputs_included():
    reason = BUDGET.refusal(length=4096, seconds={1024: 0.1}, peak_bytes={1024: 1 << 25}, input_bytes=3 << 29)
    assert reason == "would need about 2 GiB, the limit is 1 GiB"


def test_a_call_that_fits_is_not_refused():
    assert BUDGET.refusal(length=4096, seconds={1024: 0.1}, peak_bytes={1024: 1 << 20}, input_bytes=1 << 20) is None


def test_free_memory_is_known():
    assert free_bytes("cpu") > 0
