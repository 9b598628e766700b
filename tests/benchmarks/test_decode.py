"""The decode benchmark from settings to files, at the smallest sizes."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cottention.benchmarks import decode
from cottention.benchmarks.check import WrongResultError
from cottention.benchmarks.decode import benchmark_decode, decode_as_text, write_decode_report
from cottention.benchmarks.settings import DecodeSettings
from cottention.errors import SettingsError
from cottention.ops import CosineState
from cottention.ops.native import is_available

TINY = DecodeSettings(positions=(3, 70), batch_sizes=(1, 2), num_heads=2, head_dim=16, repeats=3)
NAMES = ["native", "in-place", "torch", "sdpa"] if is_available() else ["torch", "sdpa"]


@pytest.fixture(scope="module")
def report():
    return benchmark_decode(TINY)


def test_every_step_is_timed_at_every_position_of_every_batch(report):
    assert [(point.name, point.batch_size, point.position) for point in report.points] == [
        (name, B, T) for B in (1, 2) for T in (3, 70) for name in NAMES
    ]
    assert all(point.timing.median_s > 0 for point in report.points)
    assert all(point.tokens_per_s == point.batch_size / point.timing.median_s for point in report.points)


def test_the_state_has_one_size_and_the_cache_of_softmax_grows(report):
    K, H = 16, 2
    for point in report.points:
        kv = 2 * point.position * K * 4 if point.name == "sdpa" else K * K * 4
        count = 0 if point.name == "sdpa" else 8 * point.batch_size
        assert point.state_bytes == point.batch_size * H * kv + count


def test_the_token_stands_where_it_is_said_to(report):
    token = decode._Token(2, 70, TINY)
    assert token.state.seen.tolist() == [70, 70]
    assert token.state.kv.shape == (2, 2, 16, 16)
    assert token.state.kv.abs().max() > 0


def test_the_files_hold_what_was_measured(report, tmp_path: Path):
    paths = write_decode_report(report, tmp_path)
    assert sorted(path.name for path in paths) == ["decode.json", "decode.png", "decode.txt"]
    assert all(path.exists() for path in paths)
    written = json.loads((tmp_path / "decode.json").read_text())
    assert written["settings"]["positions"] == [3, 70]
    for result, point in zip(written["results"], report.points, strict=True):
        plain = report.beside(point, "torch")
        assert result["times_as_fast_as_torch"] == plain.timing.median_s / point.timing.median_s
        assert (result["time_to_first_position"] == 1) == (point.position == 3)
        assert (result["error"] is None) == (point.name == "sdpa")


def test_the_table_has_a_line_for_each_point(report):
    lines = decode_as_text(report).splitlines()
    assert sum(line.startswith(("native ", "in-place ", "torch ", "sdpa ")) for line in lines) == len(report.points)


@pytest.mark.parametrize("change", [1.001, float("nan")])
@pytest.mark.parametrize("where", ["output", "state"])
def test_a_wrong_step_is_never_timed(monkeypatch: pytest.MonkeyPatch, change: float, where: str):
    def wrong(*arguments):
        o, state = right(*arguments)
        return (o * change, state) if where == "output" else (o, CosineState(state.kv * change, state.seen))

    right = decode._torch_step
    monkeypatch.setitem(decode.STEPS, "torch", functools.partial(decode._cosine_step, step=wrong))
    monkeypatch.setattr(decode, "time_interleaved", lambda *args, **options: pytest.fail("it was timed"))
    with pytest.raises(WrongResultError, match="nothing is reported: the step of 'torch' differs from float64"):
        benchmark_decode(replace(TINY, implementations=("torch",)))


def test_a_cache_that_does_not_fit_is_left_out_with_its_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "free_bytes", lambda device: 2 * decode._cache_bytes(1, 70, TINY) - 1)
    report = benchmark_decode(replace(TINY, batch_sizes=(1,), implementations=("torch", "sdpa")))
    assert [(point.name, point.position) for point in report.points] == [("torch", 3), ("sdpa", 3), ("torch", 70)]
    assert list(report.unavailable) == ["sdpa at B = 1, position 70"]


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(SettingsError, match="got 'natve'; did you mean 'native'"):
        benchmark_decode(replace(TINY, implementations=("natve",)))


def test_native_is_left_out_where_it_does_not_run_unless_asked_for(monkeypatch: pytest.MonkeyPatch):
    names, unavailable = decode._find(replace(TINY, dtype="float64"))
    assert names == ["torch", "sdpa"]
    assert list(unavailable) == ["native", "in-place"]
    with pytest.raises(SettingsError, match=r"'native' cannot be measured here: .* float64"):
        decode._find(replace(TINY, dtype="float64", implementations=("native",)))
    monkeypatch.setattr(decode, "suits_native", lambda q: False)
    assert decode._find(TINY)[0] == ["torch", "sdpa"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"positions": (0,)}, "positions must be whole numbers of at least 1"),
        ({"batch_sizes": ()}, "batch_sizes must be whole numbers of at least 1"),
        ({"dtype": "float23"}, "did you mean 'float32'?"),
        ({"time_limit_s": 0.0}, "time_limit_s must be more than 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(values, message):
    with pytest.raises(SettingsError, match=message.replace("?", r"\?")):
        DecodeSettings(**values)


def test_each_call_goes_on_from_the_state_it_left():
    token = decode._Token(1, 3, TINY)
    run = decode.STEPS["torch"](token)
    first, second = run.call().clone(), run.call().clone()
    assert not torch.equal(first, second)
