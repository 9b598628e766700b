"""The page of the study says what the committed lines say."""

from __future__ import annotations

from pathlib import Path

import pytest

from cottention.benchmarks.quality.cells import PLUS, SOFTMAX_PLUS, all_cells
from cottention.benchmarks.quality.lines import Lines
from cottention.benchmarks.quality.tables import as_markdown, replace_tables
from cottention.errors import SettingsError

_DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_tables_of_the_page_are_those_of_the_lines() -> None:
    page = (_DOCS / "quality.md").read_text(encoding="utf-8")
    assert page == replace_tables(page, as_markdown(Lines(_DOCS / "quality")))


def test_every_committed_line_is_a_cell_of_today() -> None:
    lines = Lines(_DOCS / "quality")
    for path in (_DOCS / "quality").glob("*.jsonl"):
        known = {cell.name for cell in all_cells(path.stem) if lines.of(cell) is not None}
        assert known, path
        assert len(path.read_text(encoding="utf-8").splitlines()) == len(known), path


def test_the_readme_has_figures_of_the_tables() -> None:
    readme = (_DOCS.parent / "README.md").read_text(encoding="utf-8").splitlines()
    table = as_markdown(Lines(_DOCS / "quality"), ["lm-1m"]).splitlines()
    columns = [cell.strip() for cell in next(line for line in table if line.startswith("| block |")).split("|")]
    for label, variant in (
        ("recommended:", PLUS),
        ("softmax with the same", SOFTMAX_PLUS),
        ("softmax |", "softmax"),
        ("cosine as published", "cosine"),
    ):
        row = next(line for line in table if line.startswith(f"| {variant} |")).split("|")
        found = dict(zip(columns, map(str.strip, row), strict=True))
        told = next(line for line in readme if line.startswith(f"| {label}")).split("|")[2:-1]
        names = ("perplexity", "against softmax, %", "state, bytes", "seeds")
        assert [each.strip() for each in told] == [found[name] for name in names]


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(SettingsError, match="the page must have the marks <!-- tables"):
        replace_tables("# Quality\n", "| a |")
