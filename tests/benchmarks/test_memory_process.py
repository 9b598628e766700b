"""Memory in a process of its own: outcomes in order, refusals, and what a child's death costs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from cottention.benchmarks import memory_process
from cottention.benchmarks.budget import Budget
from cottention.benchmarks.memory_process import MemoryOutcome, measure_memory
from cottention.benchmarks.settings import AttentionSettings, Workload

AMPLE = Budget(time_limit_s=60, memory_limit_bytes=8 << 30)
REAL_START = memory_process._start_child  # elsewhere a fork takes its place, see `memory_forks`
GROUPS = list(AttentionSettings(lengths=(128, 256), batch_heads=((1, 2),), head_dims=(16,)).groups())


def outcomes(name: str, budget: Budget = AMPLE, groups: list[list[Workload]] = GROUPS) -> list[MemoryOutcome]:
    return list(measure_memory(name, groups, "cpu", budget))


def child_that(program: str):
    """In place of the real child: one that prints nothing but what `program` prints."""

    def start(job, stderr):
        return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=stderr, text=True)

    return start


def test_readings_come_in_order_and_grow_with_length_and_with_backward(monkeypatch):
    monkeypatch.setattr(memory_process, "_start_child", REAL_START)
    found = outcomes("chunk")
    assert [outcome.workload for outcome in found] == [workload for group in GROUPS for workload in group]
    readings = [outcome.reading for outcome in found]
    short, long, short_backward, long_backward = (reading for reading in readings if reading is not None)
    assert short.allocated_bytes < long.allocated_bytes < long_backward.allocated_bytes
    assert short.allocated_bytes < short_backward.allocated_bytes
    o, m = 2 * 128 * 16 * 4, 2 * 4
    assert short.result_bytes == o
    assert short_backward.result_bytes == 4 * o + m


def test_the_process_leaves_no_trace_in_ours(capfd):
    outcomes("sdpa", groups=GROUPS[:1])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"time_limit_s": 1e-9}, "a call would take about"),
        pytest.param({"memory_limit_bytes": 1}, "would need about", marks=pytest.mark.slow),
    ],
)
def test_what_is_over_the_limit_is_not_called(limit, reason):
    found = outcomes("chunk", replace(AMPLE, **limit), GROUPS[:1])
    assert len(found) == 2
    for outcome in found:
        assert outcome.reading is None
        assert reason in (outcome.skipped or "")


def test_what_the_candidate_refuses_is_skipped_with_its_reason():
    workloads = [replace(GROUPS[0][0], dtype="float32", length=64)]
    refuse = "import cottention.benchmarks.peers as p; p.PEERS['x'] = 0"
    assert refuse  # the reason travels as any other: see the child's own decision below
    candidate = replace(memory_process.load_candidate("sdpa", "cpu"), refuses=lambda workload: "not today")
    (outcome,) = memory_process._measure_group(candidate, workloads, "cpu", AMPLE)
    assert outcome.skipped == "not today"
    assert outcome.reading is None


def test_a_child_that_fails_gives_its_last_words_as_the_reason(monkeypatch):
    monkeypatch.setattr(memory_process, "_start_child", child_that("raise MemoryError('no more')"))
    found = outcomes("chunk")
    assert [outcome.workload for outcome in found] == [workload for group in GROUPS for workload in group]
    assert {outcome.skipped for outcome in found} == {
        "the process that measures memory ended with MemoryError: no more"
    }


def test_a_killed_child_costs_its_group_and_the_next_group_gets_a_new_one(monkeypatch):
    real_start, starts = memory_process._start_child, []

    def start(job, stderr):
        starts.append(job)
        kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
        return child_that(kill)(job, stderr) if len(starts) == 1 else real_start(job, stderr)

    monkeypatch.setattr(memory_process, "_start_child", start)
    first, second, third, fourth = outcomes("chunk")
    assert first.skipped == second.skipped
    assert "killed by signal 9 (out of memory?)" in (first.skipped or "")
    assert third.reading is not None
    assert fourth.reading is not None
    assert starts[1]["groups"] == [[asdict(workload) for workload in GROUPS[1]]]


def test_a_child_that_hangs_is_ended_by_its_alarm(monkeypatch):
    hang = "import time; from cottention.benchmarks import memory_process as m; m._set_alarm(0.05); time.sleep(60)"
    monkeypatch.setattr(memory_process, "_start_child", child_that(hang))
    found = outcomes("chunk", groups=GROUPS[:1])
    assert {outcome.skipped for outcome in found} == {"a call took far longer than predicted and was ended"}
