"""Files of results: what is finished is known again, what is damaged or meant something else is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from cottention.benchmarks.quality.cells import Cell, cells_like
from cottention.benchmarks.quality.lines import Lines

_CELL = Cell(experiment="small", variant="cosine", seed=0)


def _line(loss: float, rate: float = 1e-3) -> dict:
    return {"scores": {"loss": loss}, "learning_rate": rate}


def test_a_line_is_found_by_another_process(tmp_path: Path) -> None:
    Lines(tmp_path).add(_CELL, _line(1.5))
    line = Lines(tmp_path).of(_CELL)
    assert line is not None
    assert line["scores"] == {"loss": 1.5}
    assert Lines(tmp_path).of(Cell(experiment="small", variant="cosine", seed=1)) is None


def test_what_others_add_is_seen(tmp_path: Path) -> None:
    here = Lines(tmp_path)
    assert here.of(_CELL) is None
    Lines(tmp_path).add(_CELL, _line(1.5))
    assert here.of(_CELL) is not None


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path: Path) -> None:
    lines = Lines(tmp_path)
    lines.add(_CELL, _line(1.5))
    path = tmp_path / "small.jsonl"
    path.write_text(path.read_text() + '{"cell": "small/softmax/se')
    lines.add(Cell(experiment="small", variant="softmax", seed=1), _line(2.5))
    fresh = Lines(tmp_path)
    assert fresh.of(_CELL) is not None
    assert fresh.of(Cell(experiment="small", variant="softmax", seed=1)) is not None
    assert fresh.of(Cell(experiment="small", variant="softmax", seed=0)) is None


def test_other_settings_are_another_cell(tmp_path: Path) -> None:
    Lines(tmp_path).add(_CELL, _line(1.5))
    path = tmp_path / "small.jsonl"
    path.write_text(path.read_text().replace('"steps": 400', '"steps": 401'))
    assert Lines(tmp_path).of(_CELL) is None


def test_the_best_rate_of_a_finished_sweep_is_chosen(tmp_path: Path) -> None:
    lines = Lines(tmp_path)
    sweep = cells_like(["small/cosine/rate-*"])
    for cell, loss in zip(sweep, (2.0, 1.0, 3.0), strict=True):
        assert lines.chosen_rate(_CELL) is None
        lines.add(cell, _line(loss, cell.rate or 0.0))
    assert lines.chosen_rate(_CELL) == sweep[1].rate
    assert lines.chosen_rate(sweep[2]) == sweep[2].rate


def test_a_rate_goes_with_the_width(tmp_path: Path) -> None:
    lines = Lines(tmp_path)
    for cell in cells_like(["lm-1m/cosine/rate-*"]):
        lines.add(cell, _line(1.0, cell.rate or 0.0))
    assert lines.chosen_rate(Cell(experiment="lm-1m", variant="cosine", seed=0)) == pytest.approx(2e-3)
    assert lines.chosen_rate(Cell(experiment="lm-3m", variant="cosine", seed=0)) == pytest.approx(2e-3 * 128 / 192)


def test_a_line_of_a_rate_that_is_no_longer_the_best_is_run_again(tmp_path: Path) -> None:
    lines = Lines(tmp_path)
    sweep = cells_like(["small/cosine/rate-*"])
    for cell in sweep:
        lines.add(cell, _line(2.0, cell.rate or 0.0))
    best = lines.chosen_rate(_CELL)
    assert best is not None
    lines.add(_CELL, _line(1.0, best))
    assert lines.of(_CELL) is not None
    lines.add(sweep[2], _line(1.0, sweep[2].rate or 0.0))
    assert lines.of(_CELL) is None
