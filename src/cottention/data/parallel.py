"""Work in several processes, with results in the order of the tasks and no more of them in memory than are needed.

`multiprocessing.Pool.imap` would read all tasks at once; here a new one is taken only when the oldest is done.
Processes are spawned, not forked: forking one that runs threads, as tokenizers and torch do, may hang.

    for table, counts in ordered_map(work, tasks, num_proc=4): ...
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from cottention.errors import DataError, SettingsError
from cottention.files import one_line
from cottention.stopping import leave_to_parent

Task = TypeVar("Task")
Result = TypeVar("Result")

_IN_FLIGHT = 2  # tasks per process: one at work, one waiting


def ordered_map(
    work: Callable[[Task], Result], tasks: Iterable[Task], *, num_proc: int | None = None
) -> Iterator[Result]:
    """Yield `work(task)` for every task, in order.

    Args:
        work: a picklable callable; what it raises is raised here.
        tasks: read as results are taken.
        num_proc: processes; None or 1 works in this one.

    Raises:
        SettingsError: num_proc is below 1.
        DataError: a process was killed from outside.
    """
    if num_proc is not None and num_proc < 1:
        raise SettingsError(f"num_proc must be at least 1; got {num_proc}")
    if num_proc is None or num_proc == 1:
        yield from map(work, tasks)
        return
    pending: deque[Future[Result]] = deque()
    rest = iter(tasks)
    pool = _new_pool(num_proc, work)
    try:
        pending.extend(pool.submit(_work, task) for task in islice(rest, num_proc * _IN_FLIGHT))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(_work, task) for task in islice(rest, 1))
            yield result
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for want of memory; run again, with a smaller num_proc"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _new_pool(num_proc: int, work: Callable[[Any], Any]) -> ProcessPoolExecutor:
    try:
        return ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), _start_worker, (work,))
    except OSError as error:  # of the semaphores between the processes
        raise DataError(
            f"cannot start {num_proc} processes: {one_line(error)}; they need a writable /dev/shm, num_proc=1 does not"
        ) from error


_callable: Callable[[Any], Any]


def _start_worker(work: Callable[[Any], Any]) -> None:
    """Keep the callable, with all it holds, for the life of the process; end with the parent, and not before it."""
    global _callable
    _callable = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core already
    leave_to_parent()
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    # A killed parent closes no queue: its workers would wait for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: Any) -> Any:
    return _callable(task)
