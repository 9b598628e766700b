"""Processes of Python that begin with the libraries imported, in a fiftieth of the time; cottention is not among them.

To import torch and transformers takes seconds of a test about what a process of ours does: how it ends at a signal,
what it writes, what it leaves behind when it is killed. So one server a test worker imports them, and forks whenever a
process is asked for. A question about imports, about Python's own options or its hashes needs a fresh interpreter:
`tests.subprocesses`.

    ran = run_fork("-m", "cottention", "generate", "--model", folder)
    with start_fork("-c", code, cwd=tmp_path) as process:
        process.send_signal(signal.SIGINT)
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NoReturn

_LIBRARIES = (
    "torch.distributed",
    "torch.profiler",
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.pipelines",
    "transformers.trainer",
    "datasets",
    "jsonargparse",
    "matplotlib.pyplot",
    "scipy.stats",
    "sklearn.metrics",
)
# Which number of mallopt(3) a variable sets that glibc reads when a process begins.
_MALLOC = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}


class Fork:
    """A running process; what tests use of subprocess.Popen."""

    def __init__(self, request: dict[str, Any], stderr: IO[Any] | None) -> None:
        stdin, out, err = os.pipe(), os.pipe(), None if stderr else os.pipe()
        status, told = os.pipe()
        theirs = [stdin[0], out[1], err[1] if err else stderr.fileno(), told]  # pyright: ignore[reportOptionalMemberAccess]
        content = json.dumps(request).encode()
        socket.send_fds(_server(), [len(content).to_bytes(4, "little")], theirs)
        _server().sendall(content)
        for number in (stdin[0], out[1], told, *(err[1:] if err else ())):
            os.close(number)
        self.stdin = os.fdopen(stdin[1], "w", encoding="utf-8")
        self.stdout = os.fdopen(out[0], encoding="utf-8", errors="backslashreplace")
        self.stderr = os.fdopen(err[0], encoding="utf-8", errors="backslashreplace") if err else None
        self._status = os.fdopen(status)
        self.pid = int(self._status.readline())
        self.returncode: int | None = None

    def __enter__(self) -> Fork:
        return self

    def __exit__(self, kind: type | None, *_others: object) -> None:
        if kind is not None:
            self.kill()
        self.communicate()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            TimeoutError: it runs on.
        """
        code = self._ended(timeout)
        if code is None:
            raise TimeoutError(f"process {self.pid} runs on after {timeout} s")
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Close its stdin, read what it prints, wait for its end; kill it after `timeout` seconds."""
        if not self.stdin.closed:
            self.stdin.close()
        streams = [self.stdout, self.stderr]
        read = ["", ""]

        def drain(number: int) -> None:
            stream = streams[number]
            if stream is not None and not stream.closed:
                read[number] = stream.read()
                stream.close()

        readers = [threading.Thread(target=drain, args=(number,)) for number in (0, 1)]
        for reader in readers:
            reader.start()
        if self._ended(timeout) is None:
            self.kill()
            self.wait()
        for reader in readers:
            reader.join()
        return read[0], read[1]


def start_fork(
    *words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, stderr: IO[Any] | None = None
) -> Fork:
    """Start `python WORDS`, with pipes.

    Args:
        words: -c CODE or -m MODULE, then its arguments.
        cwd: working directory; None: this process's.
        env: environment; None: this process's.
        stderr: a file to write to instead of a pipe.
    """
    environment = dict(os.environ) if env is None else env
    return Fork({"words": [*map(str, words)], "cwd": str(cwd or Path.cwd()), "env": environment}, stderr)


def run_fork(
    *words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """The same to its end; it is killed after `timeout` seconds."""
    process = start_fork(*words, cwd=cwd, env=env)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(list(words), process.wait(), out, err)


@functools.cache
def _server() -> socket.socket:
    """The way to the server, which ends when this process does."""
    here, there = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.forks", str(there.fileno())],
        cwd=Path(__file__).resolve().parents[1],
        pass_fds=[there.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    there.close()

    def stop() -> None:
        here.close()
        process.wait()

    atexit.register(stop)
    return here


def _serve(requests: socket.socket) -> None:
    """In the server: fork for every request, until there is nobody left to ask."""
    for name in _LIBRARIES:
        import_module(name)
    gc.freeze()
    while True:
        size, theirs, _, _ = socket.recv_fds(requests, 4, 4)
        if not size:
            break
        content = b""
        while len(content) < int.from_bytes(size, "little"):
            content += requests.recv(1 << 16)
        if os.fork() == 0:
            requests.close()
            _mind(json.loads(content), theirs)
        for number in theirs:
            os.close(number)
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _mind(request: dict[str, Any], theirs: list[int]) -> NoReturn:
    """Be the parent of the process: tell its number and how it ended."""
    *streams, told = theirs
    child = os.fork()
    if child == 0:
        os.close(told)
        _become(request, streams)
    for number in streams:
        os.close(number)
    os.write(told, f"{child}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(told, f"{code}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any], streams: list[int]) -> NoReturn:
    """Be the process, as Python itself begins and ends one."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    _open_streams()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    _read_environment()
    random.seed()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    flag, what, *arguments = request["words"]
    sys.argv = [flag if flag == "-c" else what, *arguments]
    code = 0
    try:
        try:
            if flag == "-c":
                main = sys.modules["__main__"] = ModuleType("__main__")
                exec(compile(what, "<string>", "exec"), vars(main))  # noqa: S102
            else:
                runpy.run_module(what, run_name="__main__", alter_sys=True)
        finally:
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]  # waits for the threads
            atexit._run_exitfuncs()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if code == 1 and end.code != 1:
            print(end.code, file=sys.stderr)
    except BaseException as error:  # noqa: BLE001  # Python prints it and ends
        traceback.print_exc()
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = 120
    os._exit(code)


def _open_streams() -> None:
    """As Python opens them; those of the server know what its own descriptors were."""
    for number, (name, mode, errors) in enumerate(
        [("stdin", "r", "strict"), ("stdout", "w", "strict"), ("stderr", "w", "backslashreplace")]
    ):
        lines = 1 if name == "stderr" else -1
        stream = open(number, mode, lines, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _read_environment() -> None:
    """What is read once, when a process begins or a library is imported."""
    sys.path[0] = str(Path.cwd())
    for folder in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(1, folder)
    if "HF_DATASETS_CACHE" in os.environ:
        sys.modules["datasets"].config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])
    if "HF_MODULES_CACHE" in os.environ:
        vars(sys.modules["transformers.dynamic_module_utils"])["HF_MODULES_CACHE"] = os.environ["HF_MODULES_CACHE"]
    for name, number in _MALLOC.items():
        if name in os.environ:
            ctypes.CDLL(None).mallopt(number, int(os.environ[name]))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
