"""Runs tests marked `interpreted` in a process whose Triton interprets kernels, and reports each as an item of its own.

Triton patches itself when it interprets a kernel, and decides when it is imported whether it does: the other tests of
a worker must see neither. So at the first marked test of a file, those selected of that file start to run in one more
pytest with TRITON_INTERPRET=1; there this module, as a plugin, writes how each ended to a pipe.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

_PIPE = "COTTENTION_INTERPRETED_RESULTS"  # the file descriptor, where this is the plugin


class Interpreter:
    """The results of some tests, in the order in which another process runs them."""

    def __init__(self, items: list[pytest.Item]) -> None:
        reading, writing = os.pipe()
        self._results = os.fdopen(reading)
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 (until stop)
        self._found: dict[str, dict[str, str]] = {}
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "tests.ops.interpreter"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *(item.nodeid for item in items)],
            cwd=items[0].config.rootpath,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", _PIPE: str(writing)},
            stdout=self._printed,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
        )
        os.close(writing)

    def check(self, nodeid: str) -> None:
        """Wait for a test's end, and end as it did."""
        while nodeid not in self._found:
            line = self._results.readline()
            if not line:
                self._printed.seek(0)
                pytest.fail(f"the interpreting process ended before this test:\n{self._printed.read()}", pytrace=False)
            result = json.loads(line)
            self._found.setdefault(result["nodeid"], result)  # the first one says what went wrong
        result = self._found[nodeid]
        if result["outcome"] == "skipped":
            pytest.skip(result["text"])
        if result["outcome"] != "passed":
            pytest.fail(result["text"], pytrace=False)

    def stop(self) -> None:
        """End the process and forget what it printed."""
        self._process.kill()
        self._process.wait()
        self._results.close()
        self._printed.close()


_interpreters: dict[Path, Interpreter] = {}


def is_interpreting() -> bool:
    """Whether this is the process that runs the tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_in_interpreter(item: pytest.Item) -> None:
    """Let a test pass, fail or be skipped as it does in the interpreting process."""
    if item.path not in _interpreters:
        of_file = [each for each in item.session.items if each.path == item.path]
        _interpreters[item.path] = Interpreter([each for each in of_file if each.get_closest_marker("interpreted")])
    _interpreters[item.path].check(item.nodeid)


def stop_interpreters() -> None:
    """End what still runs, as after a first failure under -x."""
    while _interpreters:
        _interpreters.popitem()[1].stop()


def pytest_configure() -> None:
    """In the interpreting process: let Triton look through its language once.

    It does so whenever one function of a kernel calls another, for the built-in functions that it has replaced by then:
    a third of the time.
    """
    from triton.language import core
    from triton.runtime import interpreter

    @cache
    def builtins(of: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(of) if core.is_builtin(member)]

    def getmembers(of: Any) -> list[tuple[str, Any]]:
        return [(name, getattr(of, name)) for name in builtins(of)]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})  # pyright: ignore


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the interpreting process: a line for each test, at its end or where it did not pass."""
    if _PIPE in os.environ and (report.outcome != "passed" or report.when == "teardown"):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        line = json.dumps({"nodeid": report.nodeid, "outcome": report.outcome, "text": text}) + "\n"
        os.write(int(os.environ[_PIPE]), line.encode())
