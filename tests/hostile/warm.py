"""Runs command lines in forks of one process that has imported everything, inside limits, and says how each ended.

A command that imports torch takes seconds; a fork of a warm process takes a hundredth of one. Each fork has its own
folder, no network, a limit on memory and one on time.

    outcome = run(["generate", "--model", "gpt", "--prompt", "x"], folder)
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from cottention.cli.main import COMMANDS, main

CANARY = "canary"
"""A file that hostile content tries to make; nothing else does."""
MEMORY_BYTES = 1 << 30
TIME_S = 60.0

_HEAVY = (
    "cottention.convert",
    "cottention.data.building",
    "cottention.evaluation",
    "cottention.generation",
    "cottention.models",
    "cottention.training.finetuning",
    "cottention.training.pretraining",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended."""

    code: int | None
    """Its exit code, negative for a signal; None when its time was over."""
    out: str
    err: str
    seconds: float
    canary: bool
    """Whether code of the input ran, or the network was asked."""

    def problem(self) -> str | None:
        """What is wrong with it; None where it did its work, or said in one line why not."""
        errors = [line for line in self.err.splitlines() if ": error: " in line]
        found = {
            "code of the input ran": self.canary,
            "no end": self.code is None,
            f"exit code {self.code}": self.code not in (0, 2),
            "traceback": "Traceback (most recent call last)" in self.err,
            "panic": "panicked at" in self.err,
            "memory": "not enough memory" in self.err,
            f"{len(errors)} error lines": self.code == 2 and len(errors) != 1,
            "an error line that is not the last": bool(errors) and not self.err.endswith(f"{errors[-1]}\n"),
            "an error line without end": any(len(line) > 2000 for line in errors),
        }
        return next((name for name, is_so in found.items() if is_so), None)


def warm_up() -> None:
    """Import what the commands import."""
    for module in (*(module for module, _ in COMMANDS.values()), *_HEAVY):
        import_module(module)


def run(words: list[str], folder: Path, *, memory_bytes: int = MEMORY_BYTES, time_s: float = TIME_S) -> Outcome:
    """Run one command line in a fork.

    Args:
        words: behind the program's name.
        folder: working directory; what the command writes on its streams is kept beside it.
        memory_bytes: of address space, beyond what the process has.
        time_s: after which it is killed.
    """
    streams = [folder.with_name(f"{folder.name}.{name}") for name in ("out", "err")]
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(words, folder, streams, memory_bytes)
    status = _wait(child, started + time_s)
    out, err = (path.read_text(encoding="utf-8", errors="backslashreplace") for path in streams)
    return Outcome(
        code=None if status is None else os.waitstatus_to_exitcode(status),
        out=out,
        err=err,
        seconds=time.monotonic() - started,
        canary=(folder / CANARY).exists(),
    )


def _wait(child: int, until: float) -> int | None:
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _become(words: list[str], folder: Path, streams: list[Path], memory_bytes: int) -> None:
    """Be the command, in the child; never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(streams, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            for number, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        warnings.resetwarnings()  # pytest makes errors of them
        warnings.simplefilter("ignore")
        os.chdir(folder)
        _forbid_network(folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = main(words)
    except BaseException:  # noqa: BLE001  # whatever it was is what the test asks about
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forbid_network(folder: Path) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        (folder / CANARY).touch()
        raise OSError(101, "Network is unreachable")

    socket.socket.connect = refuse  # type: ignore[method-assign]
    socket.getaddrinfo = refuse  # type: ignore[assignment]
