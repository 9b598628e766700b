"""What the tests of benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.benchmarks.memory_forks import measure_in_forks


@pytest.fixture(autouse=True, scope="module")
def _memory_is_measured_in_forks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        measure_in_forks(patch)
        yield
