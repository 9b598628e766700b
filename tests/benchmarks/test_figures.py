"""The published figures, measured and drawn, at the smallest sizes."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from cottention.benchmarks import attention, figures, memory_process, roofline
from cottention.benchmarks.budget import Budget
from cottention.benchmarks.calls import Inputs, prepare
from cottention.benchmarks.curves import Curve, draw_apart, one_line_each
from cottention.benchmarks.figures import benchmark_figures, figures_as_text, published, readings, write_figures_report
from cottention.benchmarks.memory import measure_call
from cottention.benchmarks.peers import load_candidate
from cottention.benchmarks.settings import LAYERS, PUBLISHED_SWEEPS, QUICK_FIGURES, FigureSettings, Workload
from cottention.benchmarks.units import duration, size
from cottention.cli import bench
from cottention.cli.main import main

TINY = FigureSettings(
    sweeps={
        "length": ((8, 2, 8), (32, 2, 8)),
        "width": ((8, 2, 8), (8, 2, 16)),
        "heads": ((8, 1, 16), (8, 2, 8)),
    },
    positions=(4, 16),
    repeats=1,
)


def measured_here(
    name: str, groups: Sequence[Sequence[Workload]], device: str, budget: Budget
) -> Iterator[memory_process.MemoryOutcome]:
    """Without processes of their own, which take seconds each."""
    for group in groups:
        yield from memory_process._measure_group(load_candidate(name, device), list(group), device, budget)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "_MATRIX", 32)
        patch.setattr(roofline, "_COPIED_BYTES", 1 << 12)
        patch.setattr(roofline, "_SAMPLE_S", 0.0)
        patch.setattr(roofline, "_FMA_S", 1e-3)
        patch.setattr(memory_process, "_PROBED_LENGTHS", (4,))
        patch.setattr(attention, "measure_memory", measured_here)
        patch.setattr(gc, "collect", lambda: 0)  # most of the time here, and nothing is large
        return json.loads(json.dumps(benchmark_figures(TINY)))


@pytest.fixture(scope="module")
def written(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("figures")
    write_figures_report(data, directory)
    return directory


def test_every_layer_is_timed_and_weighed_over_every_size(data: dict[str, Any]) -> None:
    for picture, shapes in TINY.sweeps.items():
        for direction in figures.DIRECTIONS:
            found = readings(data, picture, direction)
            assert list(found) == list(LAYERS)
            for results in found.values():
                assert [(each["length"], each["num_heads"], each["head_dim"]) for each in results] == list(shapes)
                assert all(each["time"]["median_s"] > 0 and each["memory"]["peak_bytes"] > 0 for each in results)
    assert {each["position"] for each in data["decode"]["results"]} == {4, 16}


def test_a_shape_of_two_pictures_is_measured_once() -> None:
    for settings in (TINY, FigureSettings(), FigureSettings(**QUICK_FIGURES)):
        workloads = [workload for group in settings.groups() for workload in group]
        assert len(set(workloads)) == len(workloads)
        shapes = {shape for sweep in settings.sweeps.values() for shape in sweep}
        assert len(workloads) == 2 * len(shapes)


def test_weights_are_no_part_of_the_memory_of_a_layer() -> None:
    """1 token of width 256: the weights alone take a megabyte, what the call makes some kilobytes."""
    shape = Workload(
        direction="causal", passes="forward", dtype="float32", batch_size=1, num_heads=4, head_dim=64, length=1
    )
    layer = load_candidate("layer-softmax", "cpu")
    layer.set_up(shape)
    reading = measure_call(prepare(layer.function, shape, Inputs(shape, "cpu")), "cpu")
    assert 1024 <= reading.allocated_bytes < 4 * 256 * 256


def test_written_out_scores_are_in_the_memory_and_fused_ones_are_not() -> None:
    """With T = 1024 and 2 heads, T x T float32 scores are 8 MiB; tokens of width 16 are 64 KiB."""
    shape = Workload(
        direction="causal", passes="forward", dtype="float32", batch_size=1, num_heads=2, head_dim=8, length=1024
    )
    allocated = {}
    for name in LAYERS:
        layer = load_candidate(name, "cpu")
        layer.set_up(shape)
        allocated[name] = measure_call(prepare(layer.function, shape, Inputs(shape, "cpu")), "cpu").allocated_bytes
    cosine, matrix, fused = allocated.values()
    assert matrix > 2 * 1024 * 1024 * 4
    assert max(cosine, fused) < matrix / 4


def test_published_readings_stand_where_the_shapes_are_the_published_ones(data: dict[str, Any]) -> None:
    assert published(data, "length", "causal") == []
    full = {**data, "layers": {"settings": {"sweeps": PUBLISHED_SWEEPS}}}
    shown = {each["name"]: (each["median_s"], each["peak_bytes"]) for each in published(full, "length", "causal")}
    assert shown == {"layer-softmax-matrix": (0.59, 35e9), "layer-cosine": (13e-3, 3.5e9)}
    assert published(full, "width", "causal") == []


def test_the_pictures_come_from_the_json_alone(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {f"{name}.{kind}" for name in ("length", "width", "heads", "decode") for kind in ("png", "svg")}
    assert {path.name for path in written.iterdir()} == {*names, "figures.json", "figures.txt"}
    again = tmp_path / "again"
    assert main(["bench", "figures", "--from", str(written / "figures.json"), "--output-dir", str(again)]) == 0
    assert "causal (GPT), over the length (heads 2, width 16)" in capsys.readouterr().out
    for path in written.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_a_busy_machine_is_said(data: dict[str, Any]) -> None:
    for load, expected in ((0.1, "load 0.1\n"), (3.2, "load 3.2 (a busy machine)\n")):
        environment = {**data["layers"]["environment"], "load_at_start": load}
        assert expected in figures_as_text({**data, "layers": {**data["layers"], "environment": environment}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot read"),
        ("[]", "is no figures.json of format 1"),
        ('{"benchmark": "decode", "format": 1}', "is no figures.json of format 1"),
    ],
)
def test_another_file_is_refused_in_a_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(text)
    given = str(tmp_path / "other.json")
    assert main(["bench", "figures", "--from", given, "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_lines_on_each_other_take_turns_and_others_are_whole() -> None:
    axes = Figure().subplots()
    low = {1.0: 10.0, 2.0: 20.0}
    curves = [
        Curve("a", "k", "o", low),
        Curve("b", "r", "s", {1.0: 100.0, 2.0: 400.0}),
        Curve("c", "b", "D", {1.0: 10.3, 2.0: 20.0, 4.0: 40.0}),
    ]
    draw_apart(axes, curves)
    drawn = {line.get_label(): line for line in axes.lines}
    assert drawn["b"].get_linestyle() == "-"
    assert drawn["a"].get_linestyle() == drawn["c"].get_linestyle() == "--"
    assert drawn["a"].get_markersize() > drawn["c"].get_markersize()
    apart = Figure().subplots()
    draw_apart(apart, [Curve("a", "k", "o", {1.0: 3.0, 2.0: 9.0}), Curve("c", "b", "D", {1.0: 2.0, 2.0: 9.0})])
    assert [line.get_linestyle() for line in apart.lines] == ["-", "-"]
    assert one_line_each([Curve("a", "k", "o", low), Curve("c", "b", "D", dict(low)), curves[1]]) == [
        Curve("a", "k", "o", low),
        curves[1],
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (1.0, "1.00 s"),
        (123.4, "123 s"),
        (1e-3, "1.00 ms"),
        (0.9996, "1.00 s"),
        (0.0123, "12.3 ms"),
        (1e-6, "1.00 µs"),
        (4.5e-10, "0.45 ns"),
    ],
)
def test_a_duration_is_three_digits_and_a_unit(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_sizes_count_in_thousands_and_ticks_have_one_digit() -> None:
    assert [size(each) for each in (35e9, 1.2e9, 4096, 7)] == ["35.0 GB", "1.20 GB", "4.10 kB", "7.00 bytes"]
    assert [duration(each, digits=1) for each in (1e-4, 0.2, 1.0)] == ["100 µs", "200 ms", "1 s"]


def test_quick_is_what_its_flag_takes() -> None:
    given = bench.build_parser().parse_args(["figures", "--quick"]).figures
    assert not bench.figure_settings_from(given).processor_time
    assert bench.figure_settings_from(given) == replace(FigureSettings(), **QUICK_FIGURES)
    assert bench.figure_settings_from(bench.build_parser().parse_args(["figures"]).figures) == FigureSettings()
