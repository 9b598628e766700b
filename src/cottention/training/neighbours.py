"""How many threads are worth having beside what else runs on the machine's cores.

Threads of one operation wait for each other, so the slowest sets the pace: beside a busy neighbour two threads on two
cores are no faster than one, beside several they are many times slower. `NeighbourWatch` looks at the cores every few
seconds and takes as many threads as are left. Sums over another number of threads are rounded in another order, so only
runs that no clock can repeat anyway have it.

    watch = NeighbourWatch(); trainer.add_callback(watch)
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cottention.logging import get_logger

_FIRST_LOOK_S = 0.3
_BETWEEN_LOOKS_S = 3.0  # ticks of the system's clocks are 10 ms: a hundredth of a look
_STAT = Path("/proc/stat")

logger = get_logger(__name__)


@dataclass(frozen=True)
class _Clocks:
    """What the cores have done up to a moment, in seconds."""

    wall: float
    own: float
    """Processor time of this process."""
    busy: float
    """Of all processes, on the cores that this one may use."""


class NeighbourWatch(TrainerCallback):
    """Fits the number of threads to the cores that neighbours leave; on Linux, elsewhere it does nothing."""

    def __init__(self) -> None:
        self._most = torch.get_num_threads()
        self._before: _Clocks | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Look for a moment before the first step."""
        self._before = _read_clocks() if args.device.type == "cpu" and self._most > 1 else None
        if self._before is not None:
            time.sleep(_FIRST_LOOK_S)
            self._fit()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Look again after a while."""
        if self._before is not None and time.perf_counter() - self._before.wall >= _BETWEEN_LOOKS_S:
            self._fit()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_others: Any
    ) -> None:
        """Leave the process as it was."""
        torch.set_num_threads(self._most)

    def _fit(self) -> None:
        now = _read_clocks()
        if now is None or self._before is None:
            return
        elapsed_s = max(now.wall - self._before.wall, 1e-3)
        others = (now.busy - self._before.busy - (now.own - self._before.own)) / elapsed_s
        self._before = now
        num_threads = threads_beside(others, cores=_num_cores(), most=self._most)
        if num_threads != torch.get_num_threads():
            logger.debug("%.1f cores are busy with other work: %d threads", others, num_threads)
            torch.set_num_threads(num_threads)


def threads_beside(others: float, *, cores: int, most: int) -> int:
    """Threads that have a core each beside other work.

    Args:
        others: cores that are busy with it, a fraction among them.
        cores: of the machine that this process may use.
        most: threads at most.
    """
    return min(most, max(1, round(cores - others)))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _read_clocks() -> _Clocks | None:
    """None where the system does not say."""
    if not _STAT.is_file() or not hasattr(os, "sched_getaffinity"):
        return None
    own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    wall, used = time.perf_counter(), time.process_time()
    rows = [line.split() for line in _STAT.read_text(encoding="ascii").splitlines() if line.startswith("cpu")]
    # user, nice, system, idle, iowait, irq, softirq, steal: all but the fourth and the fifth are work of somebody.
    ticks = [[int(field) for field in row[1:9]] for row in rows if row[0] in own]
    busy = sum(sum(fields) - fields[3] - fields[4] for fields in ticks)
    return _Clocks(wall=wall, own=used, busy=busy / os.sysconf("SC_CLK_TCK"))
