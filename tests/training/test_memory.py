"""Freed memory stays with the process, so that the next step does not wait for the system to clear pages."""

from __future__ import annotations

import ctypes

import pytest

from cottention.training.memory import keep_freed_memory
from tests.subprocesses import run_python


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_buffers_that_are_freed_and_asked_for_again_cost_no_new_pages() -> None:
    ran = run_python("""
        import resource
        import numpy as np
        from cottention.training.memory import keep_freed_memory

        def pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5):
                buffers = [np.ones(2 << 20, dtype=np.float64) for _ in range(6)]
                del buffers
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        pages()
        given_back = pages()
        keep_freed_memory()
        pages()
        print(given_back, pages())
    """)
    given_back, kept = map(int, ran.stdout.split())
    assert given_back > 100
    assert kept < given_back / 10


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: object())
    keep_freed_memory()
