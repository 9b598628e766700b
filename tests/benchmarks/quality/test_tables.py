"""Tables of lines that come from more than one kind of machine."""

from __future__ import annotations

import json
from pathlib import Path

from cottention.benchmarks.quality.cells import Cell
from cottention.benchmarks.quality.lines import Lines
from cottention.benchmarks.quality.tables import as_markdown

_LINES = Path(__file__).resolve().parents[3] / "docs" / "quality"


def test_speeds_are_of_one_kind_of_machine(tmp_path: Path) -> None:
    cells = [Cell(experiment="lm-1m", variant="softmax", seed=seed) for seed in (0, 1)]
    lines = Lines(tmp_path)
    for cell, instructions, speed in zip(cells, ("AVX512", "AVX2"), (8000.0, 3000.0), strict=True):
        line = json.loads(json.dumps(Lines(_LINES).of(cell)))
        line["environment"] |= {"processor": "Sample", "instruction_set": instructions}
        lines.add(cell, {**line, "tokens_per_cpu_second": speed})
    table = as_markdown(lines, ["lm-1m"])
    assert "Sample with AVX512 (speeds), Sample with AVX2; torch" in table
    assert "| 8,000 |" in table
    assert "| 2 |" in table  # both seeds count for the scores
