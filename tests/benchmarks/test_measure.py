"""Interleaved timing, on a clock that only the calls move: nothing here depends on the machine."""

from __future__ import annotations

import pytest

from cottention.benchmarks import measure
from cottention.benchmarks.measure import Timing, time_interleaved


class Clock:
    """Calls that take exactly what they are told to, and remember their order."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def call(self, name: str, *durations: float):
        """A call that takes these durations in turn, then the last one for ever."""
        left = list(durations)

        def run():
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_every_call_is_sampled_as_often_as_asked_in_turns(clock):
    calls = {"a": clock.call("a", 0.1), "b": clock.call("b", 0.2)}
    timings = time_interleaved(calls, "cpu", repeats=4, time_limit_s=100)
    assert timings["a"].samples_s == pytest.approx([0.1] * 4)
    assert timings["b"].median_s == pytest.approx(0.2)
    assert clock.order[4:] == list("abbaabba")


def test_warm_up_is_not_a_sample(clock):
    timings = time_interleaved({"a": clock.call("a", 5.0, 0.1)}, "cpu", repeats=3, time_limit_s=100)
    assert timings["a"].samples_s == pytest.approx([0.1] * 3)


def test_short_calls_are_repeated_within_a_sample(clock):
    timings = time_interleaved({"a": clock.call("a", 1e-5)}, "cpu", repeats=3, time_limit_s=100)
    assert timings["a"].median_s == pytest.approx(1e-5)
    assert len(clock.order) == 2 + 3 * 200


def test_the_time_limit_takes_samples_away_but_one(clock):
    assert len(time_interleaved({"a": clock.call("a", 1.0)}, "cpu", repeats=9, time_limit_s=6)["a"].samples_s) == 4
    assert len(time_interleaved({"a": clock.call("a", 2.0)}, "cpu", repeats=9, time_limit_s=5)["a"].samples_s) == 1


def test_a_call_that_fills_half_of_the_limit_runs_once(clock):
    timings = time_interleaved(
        {"slow": clock.call("slow", 6.0), "quick": clock.call("quick", 1.0)}, "cpu", repeats=3, time_limit_s=10
    )
    assert timings["slow"].samples_s == (6.0,)
    assert timings["slow"].spread is None
    assert clock.order.count("slow") == 1
    assert len(timings["quick"].samples_s) == 3


def test_spread_is_half_the_middle_half_over_the_median():
    assert Timing(samples_s=(1.0, 1.0, 1.0, 1.0)).spread == 0
    assert Timing(samples_s=(1.0, 2.0, 3.0)).spread == pytest.approx(0.5)
    assert Timing(samples_s=(1.0, 2.0)).spread is None


def test_what_else_has_its_turn_comes_before_every_round(clock):
    limit = clock.call("limit", 0.5)
    time_interleaved({"a": clock.call("a", 0.1)}, "cpu", repeats=3, time_limit_s=100, before_each_round=limit)
    assert clock.order[2:] == ["limit", "a"] * 3


def test_processor_time_does_not_count_what_the_machine_did_otherwise(monkeypatch):
    wall, processor = [0.0], [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: wall[0])
    monkeypatch.setattr(measure.time, "process_time", lambda: processor[0])

    def run():
        wall[0] += 1.0
        processor[0] += 0.25

    taken = time_interleaved({"a": run}, "cpu", repeats=3, time_limit_s=100, processor_time=True)["a"]
    assert taken.samples_s == pytest.approx([0.25] * 3)
    assert time_interleaved({"a": run}, "cpu", repeats=3, time_limit_s=100)["a"].samples_s == pytest.approx([1.0] * 3)
