"""The limits of the machine are those of the arithmetic that they are named after."""

from __future__ import annotations

import pytest

from cottention.benchmarks.roofline import find_meters


def test_the_peak_of_float32_is_not_read_with_bfloat16_products() -> None:
    meters = find_meters("cpu")
    if "fma_float32" not in meters:
        pytest.skip("the native library was not built")
    assert "bf16" not in meters["fma_float32"].description
    assert meters["fma_float32"].read() > 0
