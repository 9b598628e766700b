"""Other projects' tests and clients, in the environment of `make test-peers`.

A run that leaves the mark `peers` out does not even import these files: their libraries are not in its environment.
"""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Ignore the folder where `-m` says `not peers`; None leaves the choice to pytest."""
    return True if "not peers" in config.option.markexpr else None
