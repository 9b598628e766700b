"""Other projects' tests and clients, in the environment of `make test-peers`.

A run that leaves the mark `peers` out does not even import these files: their libraries are not in its environment.
"""

from __future__ import annotations

import pytest


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Ignore the folder where `-m` says `not peers`; None leaves the choice to pytest."""
    return True if "not peers" in config.option.markexpr else None


def pytest_configure(config: pytest.Config) -> None:
    """Let transformers' own tests bring their marks."""
    for mark in ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test"):
        config.addinivalue_line("markers", f"{mark}: transformers' own")
    for mark in ("pipeline", "staging", "training", "tensor_parallel", "expert_parallel", "fsdp", "agent"):
        config.addinivalue_line("markers", f"is_{mark}_test: transformers' own")
