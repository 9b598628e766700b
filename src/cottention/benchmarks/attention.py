"""The attention benchmark: every implementation beside every peer, in one run, beside what the machine can do.

First values are checked, then memory is measured (a process each), then time (interleaved, in this process), with the
machine's own limits sampled before and after. What does not fit the limits is skipped, and the report says why.

    report = benchmark_attention(AttentionSettings(lengths=(4096, 16384)))
    print(as_text(report))
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from cottention.benchmarks.budget import Budget, free_bytes
from cottention.benchmarks.calls import Inputs, prepare
from cottention.benchmarks.check import check_candidates
from cottention.benchmarks.environment import describe_environment
from cottention.benchmarks.measure import Timing, time_interleaved
from cottention.benchmarks.memory_process import measure_memory
from cottention.benchmarks.peers import Candidate, find_candidates
from cottention.benchmarks.results import AttentionReport, Point
from cottention.benchmarks.roofline import Roofline
from cottention.benchmarks.settings import AttentionSettings, Workload
from cottention.errors import SettingsError
from cottention.logging import get_logger

_logger = get_logger(__name__)

_SHARE_OF_FREE_MEMORY = 0.5
# Threads that wait for each other at every barrier feel one other process many times over.
_QUIET_LOAD = 0.5


def benchmark_attention(settings: AttentionSettings) -> AttentionReport:
    """Measure everything that the settings ask for.

    Returns:
        The report; interrupted from the keyboard, what was measured until then.

    Raises:
        SettingsError: a name is unknown, or what was asked for cannot be measured here.
        WrongResultError: an implementation differs from naive in float64; nothing was measured.
    """
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise SettingsError(f"device {settings.device!r} is not to be had: torch finds no GPU here")
    environment = describe_environment(settings.device)
    candidates, unavailable = find_candidates(settings)
    _warn_when_busy(environment)
    _logger.info("checking values against float64: %s", ", ".join(each.name for each in candidates))
    checks, candidates, wrong = check_candidates(candidates, settings)
    report = AttentionReport(
        settings=settings, environment=environment, unavailable={**unavailable, **wrong}, checks=checks
    )
    report.groups = [
        [
            Point(name=candidate.name, is_peer=candidate.is_peer, workload=workload)
            for candidate in candidates
            for workload in group
        ]
        for group in settings.groups()
    ]
    roofline = Roofline(settings.device)
    try:
        roofline.sample()
        _measure_memory(report, candidates)
        _measure_time(report, candidates)
        roofline.sample()
    except KeyboardInterrupt:
        report.interrupted = True
        _mark_as_interrupted(report)
    report.roofline = roofline.results()
    return report


def write_report(report: AttentionReport, directory: Path) -> list[Path]:
    """Write attention.json and the figures; returns the files."""
    from cottention.benchmarks.plot import write_figures  # matplotlib takes a second

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "attention.json"
    beside = path.with_suffix(".json.partial")
    beside.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    beside.replace(path)
    return [path, *write_figures(report, directory)]


def _warn_when_busy(environment: dict[str, object]) -> None:
    load = environment["load_at_start"]
    if isinstance(load, float) and load > _QUIET_LOAD:
        _logger.warning("something else is running here (load %.1f): times will be noisy, memory will not", load)


def _measure_memory(report: AttentionReport, candidates: list[Candidate]) -> None:
    settings = report.settings
    budget = _budget(settings)
    points = {(point.name, point.workload): point for point in _points(report)}
    groups = list(settings.groups())
    with tqdm(total=len(points), desc="memory", unit="point", disable=None) as progress:
        for candidate in candidates:
            for outcome in measure_memory(candidate.name, groups, settings.device, budget):
                point = points[candidate.name, outcome.workload]
                point.memory, point.memory_skipped = outcome.reading, outcome.skipped
                progress.set_postfix_str(f"{candidate.name} T={outcome.workload.length}", refresh=False)
                progress.update()


def _measure_time(report: AttentionReport, candidates: list[Candidate]) -> None:
    settings = report.settings
    by_name = {candidate.name: candidate for candidate in candidates}
    workloads = list(dict.fromkeys(point.workload for point in _points(report)))
    with tqdm(workloads, desc="time", unit="shape", disable=None) as progress:
        for workload in progress:
            progress.set_postfix_str(f"{workload.passes} {workload.dtype} T={workload.length}")
            points = [point for point in _points(report) if point.workload == workload]
            for point in points:
                point.time_skipped = _why_not_timed(point, settings)
            timed = [point for point in points if point.time_skipped is None]
            timings = _time([by_name[point.name] for point in timed], workload, settings)
            for point in timed:
                point.timing = timings[point.name]


def _why_not_timed(point: Point, settings: AttentionSettings) -> str | None:
    if point.memory is None:
        return point.memory_skipped
    if point.memory.call_s > settings.time_limit_s:
        return f"a call took {point.memory.call_s:.3g} s, the limit is {settings.time_limit_s:.3g} s"
    return None


def _time(candidates: list[Candidate], workload: Workload, settings: AttentionSettings) -> dict[str, Timing]:
    if not candidates:
        return {}
    gc.collect()
    inputs = Inputs(workload, settings.device)
    return time_interleaved(
        {candidate.name: prepare(candidate.function, workload, inputs) for candidate in candidates},
        settings.device,
        repeats=settings.repeats,
        time_limit_s=settings.time_limit_s,
    )


def _budget(settings: AttentionSettings) -> Budget:
    limit = settings.memory_limit_gib
    memory_limit_bytes = free_bytes(settings.device) * _SHARE_OF_FREE_MEMORY if limit is None else limit * 2**30
    return Budget(time_limit_s=settings.time_limit_s, memory_limit_bytes=memory_limit_bytes)


def _points(report: AttentionReport) -> Iterator[Point]:
    for group in report.groups:
        yield from group


def _mark_as_interrupted(report: AttentionReport) -> None:
    for point in _points(report):
        if point.memory is None and point.memory_skipped is None:
            point.memory_skipped = "interrupted"
        if point.timing is None and point.time_skipped is None:
            point.time_skipped = "interrupted"
