"""The simulator of large runs: its table is the page's, and its figures follow from its formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cottention.benchmarks import scale

_TABLE = Path(__file__).parents[2] / "docs/benchmarks/scale/table.md"


def test_the_page_has_the_table_of_the_simulator(capsys: pytest.CaptureFixture[str]) -> None:
    scale.main([])
    assert capsys.readouterr().out == _TABLE.read_text()


def test_sizes_are_those_of_the_models() -> None:
    found = {model.name: model.parameters for model in scale.MODELS}
    assert found["300M"] == pytest.approx(313_110_048, rel=0.01)
    assert found["1.2B"] == pytest.approx(1_213_412_896, rel=0.01)
    assert found["7B"] == pytest.approx(7e9, rel=0.05)


def test_states_are_those_of_the_formula_of_traffic() -> None:
    from cottention.distributed import traffic_of_layer

    model = scale.MODELS[0]
    sizes: dict[str, Any] = {"heads": model.heads, "key_dim": model.head_dim, "value_dim": model.head_dim}
    assert scale.exchanged_bytes(model, 8) == traffic_of_layer(ranks=8, rows=1, **sizes).gathered


def test_a_longer_row_needs_more_memory_and_more_gpus_less_time() -> None:
    machine, model = scale.Machine(), scale.MODELS[1]
    assert scale.memory_of(model, 1 << 20, 64, 1) > scale.memory_of(model, 1 << 17, 64, 1)
    few, many = (scale.cost_of(model, 1 << 17, gpus, machine) for gpus in (8, 64))
    assert few is not None
    assert many is not None
    assert many.step_s < few.step_s
    assert few.softmax_step_s > few.step_s
    assert scale.cost_of(model, 1 << 20, 8, scale.Machine(memory_gb=4)) is None
