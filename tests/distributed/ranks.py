"""Four real processes with gloo, started once, that run one check after another on all of them or on two.

The processes are forked from one that has imported everything, so that starting them costs one import.

    with Ranks(4) as ranks: ranks.run(check, cases, size=2)        # check(group, cases), at the top of a module

The group is all that torch.distributed knows of, as if no more processes than these had been started.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

_TIME_OUT_S = 120
_ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # as torchrun says it; nobody listens there


class Ranks:
    """The processes of a world; as a context, they end with it."""

    def __init__(self, size: int, modules: tuple[str, ...] = ()) -> None:
        self._size = size
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.ranks", *modules])
        self._folder = tempfile.TemporaryDirectory()
        self._runs = 0
        self._ends, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, check: Callable[..., Any], *args: Any, size: int | None = None) -> list[Any]:
        """What check(group, *args) returns on each of the first `size` ranks; every rank's failure is shown."""
        size = size or self._size
        self._runs += 1
        for end in self._ends[:size]:
            end.send((check, args, size, f"{self._folder.name}/store-{self._runs}"))
        answers: dict[int, Any] = {}
        waiting, end_at = dict(enumerate(self._ends[:size])), time.monotonic() + _TIME_OUT_S
        while waiting:
            ready = connection.wait(list(waiting.values()), max(end_at - time.monotonic(), 0))
            for rank, end in list(waiting.items()):
                if end in ready:
                    answers[rank] = end.recv()
                    del waiting[rank]
            failures = [f"rank {rank}:\n{text}" for rank, (failed, text) in answers.items() if failed]
            if failures:  # the others wait for this rank: a second for those that fail likewise
                end_at = min(end_at, time.monotonic() + 1)
            if waiting and time.monotonic() >= end_at:
                raise AssertionError("\n".join([*failures, f"no answer from {list(waiting)}"]))
        assert not failures, "\n".join(failures)
        return [answers[rank][1] for rank in range(size)]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: Any) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.kill()
        self._folder.cleanup()


def _serve(rank: int, end: Any) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    while True:
        try:
            check, args, size, store = end.recv()
        except EOFError:
            break
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), **_ADDRESS}
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
            answer = (False, check(dist.group.WORLD, *args))
            dist.destroy_process_group()
        except BaseException:  # noqa: BLE001 - told to the test, whatever it is
            answer = (True, traceback.format_exc())
        end.send(answer)
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # groups that a cycle of objects holds keep their sockets and threads
