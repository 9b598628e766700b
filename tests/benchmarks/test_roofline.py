"""The limits of the machine are those of the arithmetic that they are named after, and a peak is above torch.mm."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from cottention.benchmarks import roofline
from cottention.benchmarks.measure import Timing
from cottention.benchmarks.results import AttentionReport, Point
from cottention.benchmarks.roofline import RooflineFigure, find_meters
from cottention.benchmarks.settings import AttentionSettings
from cottention.benchmarks.table import as_text
from cottention.ops.native import is_available

_TASKS = Path("/proc/self/task")  # the threads of this process


def test_the_peak_of_float32_is_not_read_with_bfloat16_products() -> None:
    meters = find_meters("cpu")
    if "fma_float32" not in meters:
        pytest.skip("the native library was not built")
    assert "bf16" not in meters["fma_float32"].description
    assert meters["fma_float32"].read() > 0


@pytest.mark.skipif(not is_available(), reason="needs the native library")
@pytest.mark.skipif(not _TASKS.exists(), reason="needs /proc, to see threads")
def test_the_peak_is_read_by_the_threads_of_torch_and_not_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_MATRIX", 512)
    monkeypatch.setattr(roofline, "_COPIED_BYTES", 1 << 12)
    threads, seen, done = torch.get_num_threads(), set(), threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            seen.update(_TASKS.iterdir())

    torch.set_num_threads(2)
    try:
        meters = find_meters("cpu")
        meters["mm_float32"].read()
        watcher = threading.Thread(target=look)
        watcher.start()
        time.sleep(0.01)
        before = set(_TASKS.iterdir())
        rate = meters["fma_float32"].read()
        done.set()
        watcher.join()
    finally:
        torch.set_num_threads(threads)
    assert rate > 0
    assert len(seen) >= 3
    assert seen <= before


SETTINGS = AttentionSettings(lengths=(128, 512), passes=("forward",))


def _report(*limits: dict[str, list[float]], peak: float) -> AttentionReport:
    """A point for each length, at 50 GFLOP/s of useful operations, beside what the machine did in its rounds."""
    (workloads,) = SETTINGS.groups()
    group = [
        Point(
            name="native",
            is_peer=False,
            workload=workload,
            timing=Timing(samples_s=(workload.useful_flops / 50e9,) * 3),
            limits=taken,
        )
        for workload, taken in zip(workloads, limits, strict=True)
    ]
    roofline = {
        name: RooflineFigure(description=f"{name} read", unit="GFLOP/s", value=value)
        for name, value in (("mm_float32", 100.0), ("fma_float32", peak))
    }
    environment: dict[str, object] = {
        "processor": "a processor",
        "instruction_set": "AVX2",
        "threads": 2,
        "packages": {"torch": "2.13.0"},
        "load_at_start": 0.1,
    }
    return AttentionReport(
        settings=SETTINGS, environment=environment, unavailable={}, checks=[], groups=[group], roofline=roofline
    )


def test_a_peak_below_matmul_is_refused_in_one_line_and_no_share_of_it_is_given() -> None:
    report = _report({"mm": [99, 100, 101], "fma": [80, 90, 300]}, {"mm": [100], "fma": [200]}, peak=200.0)
    short, long = report.groups[0]
    assert (short.share_of("mm"), short.share_of("fma")) == (pytest.approx(0.5), None)
    assert (long.share_of("mm"), long.share_of("fma")) == (pytest.approx(0.5), pytest.approx(0.25))
    lines = as_text(report).splitlines()
    assert (
        "left out: shares of the FMA peak in the rounds of 1 workloads, where it was read below torch.mm "
        "(down to 90 beside 100 GFLOP/s)" in lines
    )
    assert "fma_float32 read: 200 GFLOP/s" in lines
    row = next(line for line in lines if line.startswith("native") and " 128 " in line)
    assert row.split()[-2:] == ["50.0%", "-"]


def test_a_column_of_refused_peaks_alone_is_left_out() -> None:
    report = _report(*2 * [{"mm": [100.0], "fma": [90.0]}], peak=90.0)
    heading = next(line for line in as_text(report).splitlines() if "GFLOP/s" in line and "of mm" in line)
    assert "of FMA" not in heading
    assert "fma_float32 read: 90 GFLOP/s, below torch.mm: no peak" in as_text(report)
    results = report.to_dict()["results"]
    assert isinstance(results, list)
    assert [each["time"]["share_of_fma_peak"] for each in results] == [None, None]
    assert results[0]["time"]["limits_gflops"]["fma"] == [90.0]


def test_peaks_above_matmul_are_not_spoken_of() -> None:
    report = _report(*2 * [{"mm": [100.0], "fma": [100.0]}], peak=100.0)
    assert "below torch.mm:" not in as_text(report)
    assert "left out:" not in as_text(report)


def test_a_matmul_without_hardware_for_it_is_read_at_a_size_that_takes_no_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roofline, "_LONGEST_MM_S", 0.0)
    monkeypatch.setattr(roofline, "_COPIED_BYTES", 1 << 12)
    meters = find_meters("cpu")
    assert meters["mm_float32"].description == f"torch.mm {roofline._SMALLEST_MATRIX}^3 float32"
    assert meters["mm_float32"].read() > 0
