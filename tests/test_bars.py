"""Long work shows a bar on a terminal and lines in a log."""

from __future__ import annotations

import io
import sys

import pytest

from cottention import bars


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_half_minute_and_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = [0.0], []
    monkeypatch.setattr(bars.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    monkeypatch.setattr(bars.logger, "info", lambda *words: lines.append(words[0] % words[1:]))
    with (
        bars.progress("Packing", "row", total=4000, delay=3) as rows,
        bars.progress("Reading text", "B") as text,
        bars.progress("Whole model", "update") as updates,
        bars.progress("Scoring", "token", on=False) as silent,
    ):
        for clock[0] in (10.0, 20.0, 31.0, 40.0, 62.0):
            rows.update(600)
        text.update(25_000_000)
        updates.set_postfix(loss="1.5", refresh=False)
        updates.update()
        silent.update()
    assert stderr.getvalue() == ""
    assert lines == [
        "Packing: 1,800 of 4,000 rows (45%)",
        "Packing: 3,000 of 4,000 rows (75%)",
        "Reading text: 25 MB",
        "Whole model: 1 updates, loss 1.5",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr := _Terminal())
    with bars.progress("Packing", "row", total=2) as bar:
        bar.update(2)
    assert "Packing: 100%" in stderr.getvalue()
    assert "2/2" in stderr.getvalue()
