"""metrics.jsonl through crashes, and the picture of the loss."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from cottention.training.metrics import MetricsLog, draw_loss_curve, read_metrics, short_number

LINES = [{"step": step, "tokens": step * 100, "loss": 5.0 - step} for step in (1, 2, 3)]


def written(path: Path) -> list[dict]:
    """All lines, strictly."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_step=0)
    for number, line in enumerate(LINES, start=1):
        log.write(line)
        assert written(log.path) == LINES[:number]
    assert read_metrics(log.path) == LINES


@pytest.mark.parametrize("step", [0, 1, 2, 3, 7])
def test_a_resumed_run_drops_what_it_writes_again(step: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    log = MetricsLog(path, resume_step=step)
    assert written(path) == LINES[:step]
    log.write({"step": step + 1, "loss": 1.0})
    assert written(path) == [*LINES[:step], {"step": step + 1, "loss": 1.0}]


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', '{"step": 4', "\0\0\0\0", "[4]", '{"loss": 1.0}', '{"step": "4"}'])
def test_a_line_that_a_crash_cut_short_is_left_out(tail: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + tail)
    assert read_metrics(path) == LINES
    MetricsLog(path, resume_step=10).write({"step": 4, "loss": 1.0})
    assert written(path) == [*LINES, {"step": 4, "loss": 1.0}]


def test_no_file_is_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    ("value", "short"),
    [(0, "0"), (7, "7"), (999, "999"), (1234, "1.23k"), (1234567, "1.23M"), (-5e6, "-5M"), (3e9, "3B")],
)
def test_numbers_are_said_in_three_digits(value: float, short: str) -> None:
    assert short_number(value) == short


HELD_OUT = [{"step": 2, "tokens": 200, "val_loss": 3.5}, {"step": 3, "tokens": 300, "val_loss": 2.5}]


@pytest.mark.parametrize(
    ("lines", "colours"),
    [
        ([*LINES, *HELD_OUT], {"training", "held out"}),
        (LINES, {"training"}),
        (HELD_OUT, {"held out"}),
        ([], set()),
        (LINES[:1], set()),  # one point makes no line
    ],
)
def test_the_picture_shows_both_curves(lines: list[dict], colours: set[str], tmp_path: Path) -> None:
    path = tmp_path / "loss_curve.png"
    draw_loss_curve(lines, path, title="a run")
    picture = matplotlib.image.imread(path)[..., :3]
    assert picture.shape == (480, 840, 3)
    rgb = {"training": (0x9D, 0xB7, 0xD5), "held out": (0xC0, 0x39, 0x2B)}
    shown = {
        name for name, colour in rgb.items() if (np.abs(picture - np.array(colour) / 255) < 0.02).all(-1).sum() > 30
    }
    assert shown == colours


def test_a_run_draws_its_curve(finished_gpt) -> None:
    picture = matplotlib.image.imread(finished_gpt.directory / "loss_curve.png")
    assert picture.shape[:2] == (480, 840)
