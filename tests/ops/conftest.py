"""Tests marked `interpreted` run in a process of their own, see `interpreter`."""

from __future__ import annotations

import pytest

from tests.ops.interpreter import check_in_interpreter, is_interpreting, stop_interpreters


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Instead of calling a marked test, report how it ended over there."""
    if is_interpreting() or pyfuncitem.get_closest_marker("interpreted") is None:
        return None
    check_in_interpreter(pyfuncitem)
    return True


def pytest_sessionfinish() -> None:
    """Leave no process behind."""
    stop_interpreters()
