"""Results on disk: one JSON line for each finished cell, a file for each experiment, only ever appended to.

lines = Lines(Path("docs/quality"))
lines.of(cell)                          # None while it is not finished
lines.add(cell, {...})
lines.chosen_rate(cell)                 # what the sweep of its experiment says
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cottention.benchmarks.quality.cells import SIZES, Cell, sweep_of
from cottention.errors import CottentionError
from cottention.files import one_line
from cottention.logging import get_logger

logger = get_logger(__name__)


class Lines:
    """Finished cells of a directory.

    Args:
        directory: with a file for each experiment; need not exist yet.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {}

    def of(self, cell: Cell) -> dict[str, Any] | None:
        """The line of a cell; None where there is none, or only one of other settings or of a rate chosen before."""
        line = self._lines(cell.experiment).get(cell.name)
        if line is None or line.get("settings") != cell.settings():
            return None
        rate = self.chosen_rate(cell)
        return line if rate is None or rate == line["learning_rate"] else None

    def add(self, cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
        """Append a cell's line; it is on disk when this returns."""
        line = {"cell": cell.name, "settings": cell.settings(), **found}
        path = self._path(cell.experiment)
        text = json.dumps(line)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.read_bytes().endswith(b"\n"):
                text = f"\n{text}"  # behind a line that was cut off
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CottentionError(f"cannot write {path}: {one_line(error)}") from error
        return line

    def chosen_rate(self, cell: Cell) -> float | None:
        """The learning rate of a cell: its own, or the best of the sweep times the ratio of the widths.

        None where the sweep is not finished, or has no such variant.
        """
        if cell.rate is not None:
            return cell.rate
        swept = sweep_of(cell)
        lines = [self.of(each) for each in swept]
        if not swept or any(line is None for line in lines):
            return None
        losses = [(line["scores"]["loss"], each.rate) for each, line in zip(swept, lines, strict=True) if line]
        _, rate = min(losses)
        assert rate is not None
        return scaled(rate, cell)

    def data_of(self, experiment: str) -> str | None:
        """What the finished cells of an experiment were read from; None before the first."""
        return next((line["data"] for line in self._lines(experiment).values() if "data" in line), None)

    def _path(self, experiment: str) -> Path:
        return self.directory / f"{experiment}.jsonl"

    def _lines(self, experiment: str) -> dict[str, dict[str, Any]]:
        """By name, the last line of each; read anew when the file has grown, for others may write too."""
        path = self._path(experiment)
        size = path.stat().st_size if path.exists() else 0
        if self._read.get(experiment, (-1,))[0] != size:
            found = {}
            for number, text in enumerate(path.read_text(encoding="utf-8").split("\n") if size else [], start=1):
                line = _parsed(text)
                if line is not None:
                    found[line["cell"]] = line
                elif text:
                    logger.warning("%s: line %d is damaged and left out", path, number)
            self._read[experiment] = (size, found)
        return self._read[experiment][1]


def scaled(rate: float, cell: Cell) -> float:
    """A rate of the sweep as the cell takes it: times the ratio of the widths, as hidden matrices want it."""
    swept = sweep_of(cell)[0]
    return rate * SIZES[swept.plan.size].n_embd / SIZES[cell.plan.size].n_embd


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("cell"), str):
        return None
    scores = line.get("scores")
    is_whole = isinstance(scores, dict) and isinstance(scores.get("loss"), float) and "learning_rate" in line
    return line if is_whole else None
