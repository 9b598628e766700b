"""Runs cells: those that have no line yet, in order, each trained, scored, measured and written.

run_cells(cells_like(["mqar/*"]), Lines(Path("docs/quality")), files)
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from cottention.benchmarks.environment import describe_environment
from cottention.benchmarks.quality.cells import Cell, options_of, sweep_of
from cottention.benchmarks.quality.lines import Lines
from cottention.benchmarks.quality.models import num_parameters, state_bytes
from cottention.benchmarks.quality.tasks import TaskFiles, make_task
from cottention.benchmarks.quality.training import train
from cottention.errors import CottentionError, SettingsError
from cottention.logging import get_logger
from cottention.training.checkpointing_trainer import NonFiniteLossError

CLOSE = 1e-9
"""Relative: what the same cell may differ by on the same machine, which is nothing but the last digit of a mean."""

logger = get_logger(__name__)


def run_cells(
    cells: Iterable[Cell], lines: Lines, files: TaskFiles, *, device: str = "cpu", seconds: float = math.inf
) -> Generator[dict[str, Any], None, None]:
    """Yield the line of each cell that is finished here; those that have one already are left out.

    A cell whose learning rate is not chosen yet is put off until others have run, and left where that is of no help.

    Args:
        cells: in the order in which they are to run.
        lines: of finished cells.
        files: for the tasks.
        device: cpu or cuda.
        seconds: after which no further cell begins.
    """
    end = time.monotonic() + seconds
    cells = list(cells)
    # Looked at anew each time: others may have finished one, or a sweep may have chosen another rate.
    while waiting := [cell for cell in cells if lines.of(cell) is None]:
        ready = next((cell for cell in waiting if lines.chosen_rate(cell) is not None), None)
        if ready is None:
            logger.warning("%d cells wait for a sweep, as %s for %s", len(waiting), waiting[0].name, _sweep(waiting[0]))
            return
        if time.monotonic() >= end:
            logger.info("%d cells are left", len(waiting))
            return
        try:
            found = run_cell(ready, lines, files, device=device)
        except NonFiniteLossError as error:
            logger.warning("%s has no line: %s", ready.name, error)
            cells.remove(ready)  # the same would come of it again
            continue
        line = lines.add(ready, found)
        _checkpoint(ready, files, found["learning_rate"], found["data"]).unlink(missing_ok=True)
        yield line


def run_cell(cell: Cell, lines: Lines, files: TaskFiles, *, device: str = "cpu") -> dict[str, Any]:
    """Train, score and measure one cell; what its line says beside its name and settings.

    Raises:
        CottentionError: its learning rate is not chosen yet.
        NonFiniteLossError: training broke down, at a rate that a sweep did not ask for.
        SettingsError: the finished cells beside it are of other text.
    """
    rate = lines.chosen_rate(cell)
    if rate is None:
        raise CottentionError(f"{cell.name} needs the learning rate of a sweep: run {_sweep(cell)!r} first")
    environment = describe_environment(device)
    task = make_task(cell, files)
    data = task.data()
    if lines.data_of(cell.experiment) not in (None, data):
        raise SettingsError(f"the lines of {cell.experiment} are of other text than this: give another --lines folder")
    try:
        trained = train(cell, task, rate=rate, checkpoint=_checkpoint(cell, files, rate, data), device=device)
    except NonFiniteLossError:
        if not cell.chooses:
            raise
        return {"learning_rate": rate, "scores": {"loss": math.inf}, "data": data, "environment": environment}
    scores = task.scores(trained.model, "choose" if cell.chooses else "score")
    num_tokens = cell.steps * cell.plan.batch_size * cell.plan.length
    return {
        "learning_rate": rate,
        "scores": scores,
        "parameters": num_parameters(trained.model.config),
        "n_inner": trained.model.config.n_inner,
        "state_bytes": state_bytes(trained.model, cell.plan.length),
        "step_bytes": trained.step_bytes,
        "tokens": num_tokens,
        "tokens_per_second": num_tokens / trained.seconds,
        "tokens_per_cpu_second": num_tokens / trained.cpu_seconds,
        "curve": trained.curve,
        "data": data,
        "environment": environment,
    }


def differences(found: dict[str, Any], line: dict[str, Any]) -> list[str]:
    """The scores in which a cell that ran again is not what its line says, one text each."""
    pairs = zip(_numbers(found["scores"]), _numbers(line["scores"]), strict=True)
    return [
        f"{name}: {now!r}, and {then!r} in the line"
        for (name, now), (_, then) in pairs
        if not math.isclose(now, then, rel_tol=CLOSE)
    ]


def _numbers(scores: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name in sorted(scores):
        value = scores[name]
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", float(value)


def _sweep(cell: Cell) -> str:
    swept = sweep_of(cell)
    return f"{swept[0].experiment}/{cell.variant}/rate-*" if swept else f"one of {cell.variant}, of which there is none"


def _checkpoint(cell: Cell, files: TaskFiles, rate: float, data: str) -> Path:
    """Where an interrupted cell goes on from: nothing that its numbers follow from may differ."""
    decides = json.dumps([cell.settings(), options_of(cell.variant), data])
    digest = hashlib.sha256(decides.encode()).hexdigest()[:12]
    return files.work / "unfinished" / f"{cell.name.replace('/', '--')}--{rate:g}-{digest}.pt"
