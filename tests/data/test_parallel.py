"""Work in processes: results in order, tasks taken as needed, and mistakes that come back as they are."""

from __future__ import annotations

import itertools
import os
import signal

import pytest

from cottention.data import parallel
from cottention.data.parallel import ordered_map
from cottention.errors import CottentionError, DataError
from tests.data.helpers import refusal

MOST = 100


def work(number: int) -> int:
    if number == 13:
        raise DataError("thirteen cannot be read")
    if number == 66:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_results_come_in_order_and_tasks_are_taken_as_needed():
    taken = []
    tasks = (taken.append(number) or number for number in itertools.chain(range(10), range(20, 10**9)))
    results = ordered_map(work, tasks, num_proc=2)
    assert list(itertools.islice(results, 30)) == [n * n for n in [*range(10), *range(20, 40)]]
    assert len(taken) < 40  # of a thousand million
    results.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_mistakes_come_back_and_killed_processes_are_told():
    for num_proc in (None, 2):
        with pytest.raises(DataError, match="thirteen cannot be read"):
            list(ordered_map(work, range(20), num_proc=num_proc))
    with pytest.raises(CottentionError) as error:
        list(ordered_map(work, range(66, 80), num_proc=2))
    assert "a worker process was killed" in refusal(error)


def test_a_machine_without_shared_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(parallel, "ProcessPoolExecutor", fail)
    with pytest.raises(DataError, match="cannot start 2 processes: Function not implemented; they need a writable"):
        list(ordered_map(str, [1], num_proc=2))
    assert list(ordered_map(str, [1], num_proc=1)) == ["1"]
