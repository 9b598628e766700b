"""Signals that ask a command to end: which they are, and how a command that is not training answers them.

A terminal that closes sends SIGHUP, Ctrl-C SIGINT, Ctrl-Backslash SIGQUIT, SLURM's --signal=USR1@120 and submitit
SIGUSR1 or SIGUSR2, everybody else SIGTERM. A signal that whoever started the process had it ignore (nohup) stays
ignored.

    with ending_cleanly():          # Stopped is raised where the process is, so that it tidies up behind itself
        ...
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
# Shells make background processes deaf to it, and people send it to them all the same.
_EVEN_IF_IGNORED = ("SIGTERM", "SIGINT")


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def handlers() -> dict[signal.Signals, Any]:
    """The signals to listen to, and what they do now."""
    named = {name: signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__}
    found = {number: signal.getsignal(number) for number in named.values()}
    return {
        number: handler
        for number, handler in found.items()
        # None is a handler that was not set from Python, and could not be set again.
        if handler is not None and (handler != signal.SIG_IGN or number.name in _EVEN_IF_IGNORED)
    }


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Raise `Stopped` at a signal that would end the process on the spot.

    Not in one of several processes that train together: it may wait for the others where no exception reaches it.
    """
    if threading.current_thread() is not threading.main_thread() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    owner = os.getpid()
    before = {number: handler for number, handler in handlers().items() if handler == signal.SIG_DFL}

    def stop(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked process, which ends as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise Stopped(signal.Signals(number))

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_to_parent() -> None:
    """In a worker process: such signals reach the whole group, and the parent decides."""
    for number in handlers():
        if number != signal.SIGTERM:  # by which the parent ends it
            signal.signal(number, signal.SIG_IGN)
