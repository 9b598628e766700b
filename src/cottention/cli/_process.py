"""The process that a command runs in: its streams, Ctrl-C while it still imports, its threads, the others beside it.

torchrun starts a command several times. What a user did wrong is then said once, and handed to the launcher, which ends
its own report with it.

    open_streams(); interrupt_imports(); spare_neighbours()
    if speaks_for_all(): print(...)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from types import FrameType

from cottention.errors import SettingsError

_GRACE_S = 5.0
_SPINS = "3000"  # some tens of microseconds: what lies between two operations of a step


def open_streams() -> None:
    """Make the standard streams usable, however the process was started.

    Raises:
        SettingsError: stdout is closed, so results have nowhere to go.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if name in closed:
            # The next file that is opened would take its number, and be written to by libraries that print.
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    # Where a terminal cannot show a character it shows its code: text that a model writes must not end the run.
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    if "stdout" in closed:
        raise SettingsError("stdout is closed, so results have nowhere to go; > /dev/null drops them")


def drop_stdout() -> None:
    """Send what is still to be written to nowhere: Python flushes stdout once more at exit, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def interrupt_imports() -> None:
    """Have Ctrl-C end the process at once while it imports: torch's libraries abort at an exception just then."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        own = os.getpid()

        def interrupt(number: int, frame: FrameType | None) -> None:
            if os.getpid() == own and _is_importing(frame):
                os.write(2, b"cottention: error: interrupted\n")
                os._exit(128 + number)
            signal.default_int_handler(number, frame)

        signal.signal(signal.SIGINT, interrupt)


def spare_neighbours() -> None:
    """Have OpenMP's threads sleep soon where they wait for each other; takes effect before torch is loaded.

    GNU's library else spins for milliseconds. On cores of one's own that is the fastest way to wait; beside a busy
    neighbour the thread that is waited for often stands still meanwhile, and what spins keeps it from its core.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def rank() -> int:
    """The number of this process among those that torchrun and its kind started; 0 of one alone."""
    given = os.environ.get("RANK", "0")
    return int(given) if given.isdecimal() else 0


def wait_for_first() -> None:
    """Leave it to process 0 to say what is wrong with all of them.

    The launcher ends the others as soon as one has ended; who is still there afterwards has a trouble of its own.
    """
    if rank() != 0:
        time.sleep(_GRACE_S)


def tell_launcher(message: str) -> None:
    """Give torchrun the line that its report ends with, in place of a hint how to see a traceback."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123  # named by the launcher
            json.dump(content, file)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
