"""What is shown while a run works: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import pty
import signal
import struct
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cottention.training import progress
from cottention.training.pretraining import pretrain
from cottention.training.progress import RunControl, duration
from cottention.training.stopwatch import Stopwatch
from tests.training.helpers import tiny_recipe


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-3, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (250, "4 min 10 s"),
        (12000, "3 h 20 min"),
        (439200, "5 d 2 h"),
    ],
)
def test_durations_are_said_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_terminal_lines_come_now_and_then(
    corpus: Path, tmp_path: Path, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0.0, 8.0)  # the clock is asked once a log line: one in 30 s is one in four
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    pretrain(tiny_recipe("gpt", corpus), output_dir=tmp_path / "run")
    steps = [line for line in log_lines if line.startswith("step ")]
    assert 2 <= len(steps) <= 4
    for line in steps:
        assert "loss " in line
        assert "tokens/s " in line
        assert line.endswith(" left")
    assert "held-out " in steps[-1]
    assert "training:" not in stderr.getvalue(), "no bar in a log file"


def test_one_slow_moment_is_no_forecast(monkeypatch: pytest.MonkeyPatch, log_lines: list[str]) -> None:
    """What is left follows from the speed of the last laps together; a held-out loss says of which step it is."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    recipe = tiny_recipe("gpt", Path("text.txt"))
    shown = progress.ProgressBar(recipe)
    state: Any = SimpleNamespace(global_step=100, max_steps=1100, is_world_process_zero=True)
    nothing: Any = None
    shown.on_log(nothing, state, nothing, {"val_loss": 5.5421})
    left = recipe.tokens_after(1100) - recipe.tokens_after(100)
    for speed in [left / 100] * 9 + [left / 2000]:
        shown.on_log(nothing, state, nothing, {"loss": 5.0, "tokens_per_s": speed})
    assert [line.rpartition(", ")[2] for line in log_lines] == ["1 min 40 s left"] * 9 + ["4 min 50 s left"]
    assert all("held-out 5.542 at step 100, " in line for line in log_lines)


def test_on_a_terminal_a_bar_shows_loss_speed_and_remaining_time(
    corpus: Path, tmp_path: Path, log_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(leader, 4096)
            except OSError:
                return
            if not data:
                return
            shown.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        pretrain(tiny_recipe("gpt", corpus), output_dir=tmp_path / "run")
        monkeypatch.undo()
    reader.join(10)
    os.close(leader)
    text = b"".join(shown).decode()
    last = next(part for part in reversed(text.split("\r")) if "training" in part)
    assert "20/20" in last
    assert all(name in last for name in ("loss=", "tokens/s=", "held-out="))
    assert not [line for line in log_lines if line.startswith("step ")]


def test_the_first_signal_asks_and_the_second_acts() -> None:
    control, seen = RunControl(), []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("as before"))
    try:
        with control.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            assert (control.stopped_by, seen) == (signal.SIGTERM, [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == ["as before"]
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["as before"] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_ctrl_c_interrupts() -> None:
    control = RunControl()
    # What a shell starts in the background is born deaf to Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), control.listening():
            _interrupt_twice(control)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_twice(control: RunControl) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    while control.stopped_by is None:  # two signals that arrive together count as one
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)


def test_a_thread_trains_without_handlers() -> None:
    problems: list[BaseException] = []

    def listen() -> None:
        try:
            with RunControl().listening():
                pass
        except BaseException as error:  # noqa: BLE001
            problems.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert problems == []


def test_the_stopwatch_counts_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch(elapsed_s=50.0, step=10)
    now[0] += 4
    with watch.paused():
        now[0] += 1000
    assert watch.elapsed_s == 54
    assert watch.lap_step == 10
    assert watch.lap(12) == 4
    assert watch.lap_step == 12
    now[0] += 3
    assert watch.lap(13) == 3
    assert watch.elapsed_s == 57
