"""The benchmark from settings to files, at the smallest sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cottention.benchmarks import attention, roofline, table
from cottention.benchmarks.attention import benchmark_attention, write_report
from cottention.benchmarks.check import WrongResultError
from cottention.benchmarks.measure import Timing
from cottention.benchmarks.memory_process import MemoryOutcome
from cottention.benchmarks.results import FORMAT
from cottention.benchmarks.settings import AttentionSettings
from cottention.benchmarks.table import as_text
from cottention.errors import SettingsError
from cottention.ops import IMPLEMENTATIONS
from cottention.ops.native import binding

TINY = AttentionSettings(
    lengths=(64, 128), head_dims=(16,), batch_heads=((1, 2),), implementations=("chunk",), peers=("sdpa",), repeats=3
)


@pytest.fixture(autouse=True)
def _small_roofline(monkeypatch):
    """Rooflines of the real kind, on matrices that take no time."""
    monkeypatch.setattr(roofline, "_MATRIX", 32)
    monkeypatch.setattr(roofline, "_COPIED_BYTES", 1 << 12)
    monkeypatch.setattr(roofline, "_SAMPLE_S", 0.0)


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "_MATRIX", 32)
        patch.setattr(roofline, "_COPIED_BYTES", 1 << 12)
        patch.setattr(roofline, "_SAMPLE_S", 0.0)
        return benchmark_attention(TINY)


def test_every_point_has_time_and_memory(report):
    points = [point for group in report.groups for point in group]
    assert len(points) == 2 * 2 * 2
    for point in points:
        assert point.time_skipped is None
        assert point.memory_skipped is None
        assert point.timing is not None
        assert 1 <= len(point.timing.samples_s) <= TINY.repeats
        assert point.memory is not None
        assert point.memory.allocated_bytes >= point.memory.result_bytes > 0


def test_the_files_hold_what_was_measured_and_on_what(report, tmp_path):
    paths = write_report(report, tmp_path / "made" / "here")
    assert sorted(path.name for path in paths) == [
        "attention-causal-forward-backward-float32-b1-h2-k16.png",
        "attention-causal-forward-float32-b1-h2-k16.png",
        "attention.json",
        "attention.txt",
    ]
    assert sorted(path.name for path in paths) == sorted(each.name for each in (tmp_path / "made" / "here").iterdir())
    written = json.loads(paths[0].read_text())
    assert written["benchmark"] == "attention"
    assert written["format"] == FORMAT
    assert written["interrupted"] is False
    assert {"device", "processor", "threads", "python", "packages", "load_at_start"} <= set(written["environment"])
    assert "torch" in written["environment"]["packages"]
    assert written["settings"]["lengths"] == [64, 128]
    assert {"mm_float32", "mm_bfloat16", "copy"} <= set(written["roofline"])
    assert ("fma_float32" in written["roofline"]) == binding.is_available()
    assert all(figure["value"] > 0 for figure in written["roofline"].values())
    assert {check["name"] for check in written["checks"]} == {"chunk", "sdpa"}
    assert all(check["error"] <= check["tolerance"] for check in written["checks"])


def test_each_result_in_the_json_says_all_about_its_point(report):
    results = json.loads(json.dumps(report.to_dict(), allow_nan=False))["results"]
    assert len(results) == 8
    shape = {"direction", "passes", "dtype", "batch_size", "num_heads", "head_dim", "length"}
    expected = {"name", "is_peer", "time", "time_skipped", "memory", "memory_skipped"} | shape
    for result in results:
        assert set(result) == expected
        time, memory = result["time"], result["memory"]
        assert set(time) == {
            "median_s",
            "spread",
            "samples_s",
            "useful_gflops",
            "share_of_matmul",
            "share_of_fma_peak",
            "limits_gflops",
            "times_as_fast_as_sdpa",
            "times_as_fast_as_float32",
        }
        assert sorted(time["samples_s"])[0] <= time["median_s"] <= sorted(time["samples_s"])[-1]
        assert time["limits_gflops"]["mm"]
        assert time["share_of_matmul"] > 0
        assert memory["extra_bytes"] == max(0, memory["peak_bytes"] - memory["result_bytes"])
        assert memory["peak_bytes"] == max(memory["allocated_bytes"], memory["resident_bytes"] or 0)
        assert memory["bytes_per_token"] == memory["peak_bytes"] / result["length"]
        assert (memory["growth"] is None) == (result["length"] == 64)
    assert {result["time"]["times_as_fast_as_sdpa"] for result in results if result["name"] == "sdpa"} == {1.0}


def test_the_table_names_everything(report):
    text = as_text(report)
    assert "causal forward, float32, B = 1, H = 2, K = V = 16" in text
    assert "causal forward+backward, float32, B = 1, H = 2, K = V = 16" in text
    assert "torch.mm 32^3 float32: " in text
    assert "values and gradients checked against float64: chunk, sdpa" in text
    assert "skipped" not in text


@pytest.mark.slow
def test_dtypes_take_turns_in_the_same_rounds(monkeypatch):
    order = []
    real = attention.prepare

    def prepare(function, workload, inputs):
        call = real(function, workload, inputs)
        return lambda: (order.append((workload.length, workload.dtype)), call())

    monkeypatch.setattr(attention, "prepare", prepare)
    monkeypatch.setattr(attention, "time_interleaved", lambda calls, device, **options: _rounds(calls, order, options))
    settings = replace(TINY, passes=("forward",), peers=(), dtypes=("bfloat16", "float32"))
    report = benchmark_attention(settings)
    assert order == [(T, dtype) for T in (64, 128) for _ in range(2) for dtype in ("bfloat16", "float32")]
    ratios = {
        (result["dtype"], result["length"]): result["time"]["times_as_fast_as_float32"]
        for result in report.to_dict()["results"]  # pyright: ignore
    }
    # the later call of a round takes longer here
    assert ratios == {("bfloat16", T): 2.0 for T in (64, 128)} | {("float32", T): None for T in (64, 128)}
    text = as_text(report)
    assert text.count("vs float32") == 2  # a heading and the legend
    assert text.count("vs sdpa") == 1  # the legend


def _rounds(calls, order, options):
    """Two rounds in which the first call takes one second, the second two."""
    for _ in range(2):
        options["before_each_round"]()
        for call in calls.values():
            call()
    return {key: Timing(samples_s=(float(i), float(i))) for i, key in enumerate(calls, 1)}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (9.994e-4, "999 us"),
        (9.996e-4, "1 ms"),
        (9.994e-2, "99.9 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (999.6, "1000 s"),
        (12345.0, "12345 s"),
    ],
)
def test_a_duration_has_no_exponent(seconds: float, shown: str) -> None:
    assert table._duration(seconds) == shown


def test_a_wrong_implementation_is_never_timed(monkeypatch):
    right = IMPLEMENTATIONS["chunk"]

    def wrong(*inputs, **options):
        o, state = right(*inputs, **options)
        return 1.001 * o, state

    monkeypatch.setitem(IMPLEMENTATIONS, "chunk", wrong)
    monkeypatch.setattr(attention, "measure_memory", lambda *args: pytest.fail("memory was measured"))
    monkeypatch.setattr(attention, "time_interleaved", lambda *args: pytest.fail("it was timed"))
    with pytest.raises(WrongResultError, match="implementation 'chunk' is wrong"):
        benchmark_attention(TINY)


@pytest.mark.slow
def test_what_was_skipped_is_in_the_table_and_in_the_json_with_its_reason(monkeypatch):
    real = attention.measure_memory

    def measure(name, groups, device, budget):
        for outcome in real(name, groups, device, budget):
            if name == "chunk" and outcome.workload.length == 128:
                yield MemoryOutcome(workload=outcome.workload, skipped="would need about 9 GiB, the limit is 1 GiB")
            elif name == "sdpa" and outcome.workload.length == 128:
                assert outcome.reading is not None
                yield replace(outcome, reading=replace(outcome.reading, call_s=11.0))
            else:
                yield outcome

    monkeypatch.setattr(attention, "measure_memory", measure)
    report = benchmark_attention(replace(TINY, passes=("forward",)))
    text = as_text(report)
    assert "  skipped: would need about 9 GiB, the limit is 1 GiB" in text
    assert "  time skipped: a call took 11 s, the limit is 10 s" in text
    results = {(result["name"], result["length"]): result for result in report.to_dict()["results"]}  # pyright: ignore
    assert results["chunk", 128]["time"] is results["chunk", 128]["memory"] is None
    assert results["sdpa", 128]["time"] is None
    assert results["sdpa", 128]["memory"]["allocated_bytes"] > 0
    assert results["chunk", 64]["time"] is not None


def test_an_interrupted_run_reports_what_it_has(monkeypatch, tmp_path):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(attention, "time_interleaved", interrupted)
    report = benchmark_attention(replace(TINY, passes=("forward",), implementations=()))
    assert report.interrupted
    text = as_text(report)
    assert text.count("time skipped: interrupted") == 2
    assert text.endswith("The run was interrupted: what is missing was not reached.")
    assert len(write_report(report, tmp_path)) == 3


@pytest.mark.slow
def test_memory_alone_when_no_sample_is_asked_for(monkeypatch):
    monkeypatch.setattr(attention, "time_interleaved", lambda *args, **options: pytest.fail("it was timed"))
    report = benchmark_attention(replace(TINY, passes=("forward",), peers=(), repeats=0))
    results = report.to_dict()["results"]
    assert isinstance(results, list)
    assert all(result["time"] is None and result["memory"]["peak_bytes"] > 0 for result in results)
    assert "not asked for" not in as_text(report)


def test_a_gpu_that_is_not_there_is_a_line(monkeypatch):
    monkeypatch.setattr(attention.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="device 'cuda' is not to be had"):
        benchmark_attention(replace(TINY, device="cuda"))
