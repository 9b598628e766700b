"""The figures show every candidate, in both panels, on logarithmic axes."""

from __future__ import annotations

import numpy as np
import pytest

from cottention.benchmarks.measure import Timing
from cottention.benchmarks.memory import MemoryReading
from cottention.benchmarks.plot import _draw, write_figures
from cottention.benchmarks.results import AttentionReport, Point, memory_growth, speed_ratio
from cottention.benchmarks.settings import AttentionSettings

SETTINGS = AttentionSettings(lengths=(128, 512, 2048), passes=("forward",))
ENVIRONMENT = {
    "processor": "a processor",
    "instruction_set": "AVX2",
    "threads": 4,
    "packages": {"torch": "2.13.0"},
    "load_at_start": 0.1,
}


def report_of(growths: dict[str, int]) -> AttentionReport:
    """Candidates whose time and memory grow with a power of T."""
    (workloads,) = SETTINGS.groups()
    group = [
        Point(
            name=name,
            is_peer=name == "sdpa",
            workload=workload,
            timing=Timing(samples_s=(1e-3 * (workload.length / 128) ** exponent,) * 3),
            memory=MemoryReading(
                allocated_bytes=1000 * (workload.length // 128) ** exponent,
                resident_bytes=None,
                result_bytes=100,
                call_s=0.1,
            ),
        )
        for name, exponent in growths.items()
        for workload in workloads
    ]
    return AttentionReport(settings=SETTINGS, environment=dict(ENVIRONMENT), unavailable={}, checks=[], groups=[group])


def test_one_line_for_each_candidate_in_each_panel():
    report = report_of({"chunk": 1, "sdpa": 2})
    figure = _draw(report, report.groups[0], {"chunk": ("k", "o"), "sdpa": ("r", "s")})
    panels = figure.axes
    assert [panel.get_ylabel() for panel in panels] == ["time of a call, ms", "peak memory, MiB"]
    for panel in panels:
        assert panel.get_xscale() == panel.get_yscale() == "log"
        lines = {line.get_label(): line for line in panel.lines if not str(line.get_label()).startswith("_")}
        assert set(lines) == {"chunk", "sdpa"}
        assert np.asarray(lines["chunk"].get_xdata()).tolist() == [128, 512, 2048]
        assert lines["chunk"].get_linestyle() == "-"
        assert lines["sdpa"].get_linestyle() == "--"
    assert np.asarray(panels[0].lines[0].get_ydata()).tolist() == pytest.approx([1, 4, 16])


def test_a_candidate_that_was_never_timed_is_still_in_the_memory_panel_and_the_legend():
    report = report_of({"chunk": 1, "sdpa": 2})
    for point in report.groups[0]:
        if point.name == "sdpa":
            point.timing = None
    figure = _draw(report, report.groups[0], {"chunk": ("k", "o"), "sdpa": ("r", "s")})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chunk", "sdpa"]


def test_memory_alone_has_one_panel():
    report = report_of({"chunk": 1})
    for point in report.groups[0]:
        point.timing = None
    figure = _draw(report, report.groups[0], {"chunk": ("k", "o")})
    assert [panel.get_ylabel() for panel in figure.axes] == ["peak memory, MiB"]


def test_a_group_without_any_figure_is_not_drawn(tmp_path):
    report = report_of({"chunk": 1})
    for point in report.groups[0]:
        point.timing = point.memory = None
    assert write_figures(report, tmp_path) == []


def test_growth_and_speed_are_ratios_to_the_length_before_and_to_sdpa():
    report = report_of({"chunk": 1, "sdpa": 2})
    (group,) = report.groups
    assert [memory_growth(point, group) for point in group] == [None, 4, 4, None, 16, 16]
    assert [speed_ratio(point, group) for point in group] == pytest.approx([1, 4, 16, 1, 1, 1])
