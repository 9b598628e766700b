"""The memory meters against allocations whose size is known."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from cottention.benchmarks.memory import MALLOC_ENVIRONMENT, measure_call
from tests.subprocesses import run_python

MIB = 1 << 20
# What the process itself does meanwhile: the profiler's notes, stacks, pages of libraries.
RESIDENT_NOISE = 3 * MIB


def ones(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB, dtype=torch.uint8)


def test_allocated_is_exact_to_the_byte():
    reading = measure_call(lambda: (torch.ones(1001), torch.ones(7, dtype=torch.float64)), "cpu")
    assert reading.allocated_bytes == 1001 * 4 + 7 * 8
    assert reading.result_bytes == 1001 * 4 + 7 * 8
    assert reading.call_s > 0


def test_the_peak_counts_what_was_alive_at_once_and_not_what_came_after():
    def call():
        first = ones(8)
        second = ones(4)
        del first
        third = ones(2)
        return second, third

    reading = measure_call(call, "cpu")
    assert reading.allocated_bytes == 12 * MIB
    assert reading.result_bytes == 6 * MIB


def test_inputs_are_not_counted_and_a_released_input_does_not_hide_anything():
    inputs = [ones(16)]

    def call():
        first = ones(3)
        inputs.clear()
        return (first, ones(5))

    assert measure_call(call, "cpu").allocated_bytes == 8 * MIB


def test_garbage_of_an_earlier_reading_is_not_counted_against_the_next():
    gc.disable()
    try:
        measure_call(lambda: (_garbage_of(ones(4)),), "cpu")
        assert measure_call(lambda: (ones(8),), "cpu").allocated_bytes == 8 * MIB
    finally:
        gc.enable()


def _garbage_of(x: torch.Tensor) -> torch.Tensor:
    cycle: list = [x]
    cycle.append(cycle)
    return ones(1)


def test_backward_is_counted():
    x = torch.ones(MIB, requires_grad=True)  # 4 MiB

    def call():
        y = x.exp()  # kept for backward
        return torch.autograd.grad(y, x, torch.ones_like(y))

    assert measure_call(call, "cpu").allocated_bytes == 3 * 4 * MIB


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_resident_agrees_with_known_allocations_and_sees_native_ones(monkeypatch):
    for name, value in MALLOC_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    ran = run_python(
        """
        import ctypes, dataclasses, json, torch
        from cottention.benchmarks.memory import measure_call

        MIB = 1 << 20
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p

        def of_torch():
            first = torch.ones(48 * MIB, dtype=torch.uint8)
            del first
            return (torch.ones(32 * MIB, dtype=torch.uint8),)

        def of_native_code():
            block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(40 * MIB)))
            ctypes.memset(block, 1, 40 * MIB)
            libc.free(block)
            return ()

        measure_call(of_torch, "cpu")  # whatever is set up once
        readings = [measure_call(call, "cpu") for call in (of_torch, of_native_code, of_torch)]
        print(json.dumps([dataclasses.asdict(each) for each in readings]))
        """
    )
    of_torch, of_native_code, again = json.loads(ran.stdout.splitlines()[-1])
    for reading in (of_torch, again):  # memory used before and freed must not hide the second time
        assert reading["allocated_bytes"] == 48 * MIB
        assert abs(reading["resident_bytes"] - 48 * MIB) < RESIDENT_NOISE
    assert of_native_code["allocated_bytes"] == 0
    assert abs(of_native_code["resident_bytes"] - 40 * MIB) < RESIDENT_NOISE
