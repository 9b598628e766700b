"""The processes that all tests here share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks

_CHECKS = ("tests.distributed.operation_checks", "tests.distributed.model_checks", "tests.distributed.layer_checks")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with Ranks(4, _CHECKS) as started:
        yield started
