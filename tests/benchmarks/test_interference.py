"""The native library's threads leave the cores to torch, and the other way round."""

from __future__ import annotations

import os

import pytest
import torch

from cottention.benchmarks.interference import measure_interference
from cottention.ops.native import is_available


def test_both_users_are_timed_alone_and_in_turns():
    found = measure_interference("chunk", rounds=2)
    assert found.matmul_ratio == found.matmul_in_turns_s / found.matmul_alone_s > 0
    assert found.attention_ratio == found.attention_in_turns_s / found.attention_alone_s > 0


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="needs the native library")
def test_torch_and_the_native_library_do_not_disturb_each_other():
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        found = measure_interference()
    finally:
        torch.set_num_threads(threads)
    # Threads of one that spin while the other works cost a factor of two and more; caches that the other has emptied
    # cost some per cent.
    assert found.matmul_ratio < 1.5
    assert found.attention_ratio < 1.5
