"""The attention benchmark: every implementation beside every peer, in one run, beside what the machine can do.

First values are checked, then memory is measured (a process each), then time (interleaved, in this process), with the
machine's own limits read in the same rounds. What does not fit the limits is skipped, and the report says why.

    with open_journal(settings, directory) as journal:       # an interrupted run is gone on with
        report = benchmark_attention(settings, journal)
        write_report(report, directory)
        journal.finish()
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from cottention.benchmarks.budget import Budget, free_bytes
from cottention.benchmarks.calls import Inputs, prepare
from cottention.benchmarks.check import check_candidates
from cottention.benchmarks.environment import check_clock, describe_environment
from cottention.benchmarks.journal import Journal, write_texts
from cottention.benchmarks.measure import Timing, time_interleaved
from cottention.benchmarks.memory_process import MemoryOutcome, measure_memory, outcome_from_json
from cottention.benchmarks.peers import Candidate, find_candidates
from cottention.benchmarks.results import AttentionReport, Point
from cottention.benchmarks.roofline import Meter, Roofline, find_meters
from cottention.benchmarks.settings import AttentionSettings, Workload
from cottention.benchmarks.table import as_text
from cottention.errors import SettingsError
from cottention.logging import get_logger
from cottention.training.memory import keep_freed_memory

_logger = get_logger(__name__)

_SHARE_OF_FREE_MEMORY = 0.5
# Threads that wait for each other at every barrier feel one other process many times over.
_QUIET_LOAD = 0.5


def open_journal(settings: AttentionSettings, directory: Path) -> Journal:
    """The journal of a run with these settings on this machine, that of an earlier try where there is one."""
    _check_device(settings)
    environment = {**describe_environment(settings.device), "load_at_start": None}
    return Journal.open(directory, {"settings": asdict(settings), "environment": environment})


def benchmark_attention(settings: AttentionSettings, journal: Journal | None = None) -> AttentionReport:
    """Measure everything that the settings ask for, but what the journal has already.

    Returns:
        The report; interrupted from the keyboard, what was measured until then.

    Raises:
        SettingsError: a name is unknown, or what was asked for cannot be measured here.
        WrongResultError: an implementation differs from naive in float64; nothing was measured.
    """
    _check_device(settings)
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
    journal = journal or Journal.nowhere()
    meters = find_meters(settings.device)
    roofline = Roofline(meters)
    for piece in journal.pieces("roofline"):
        roofline.add(piece["name"], piece["readings"])
    try:
        _sample(roofline, journal)
        _measure_memory(report, candidates, journal)
        if settings.repeats:
            # As in training: clearing fresh pages is a large part of a call that streams, and none of its work.
            keep_freed_memory()
            _measure_time(report, candidates, meters, journal)
        _sample(roofline, journal)
    except KeyboardInterrupt:
        report.interrupted = True
        _mark_as_interrupted(report)
    report.roofline = roofline.results()
    return report


def write_report(report: AttentionReport, directory: Path) -> list[Path]:
    """Write attention.json, attention.txt (the tables) and the figures; returns the files."""
    from cottention.benchmarks.plot import write_figures  # matplotlib takes a second

    texts = {"attention.json": json.dumps(report.to_dict(), indent=1), "attention.txt": as_text(report)}
    return [*write_texts(texts, directory), *write_figures(report, directory)]


def _check_device(settings: AttentionSettings) -> None:
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise SettingsError(f"device {settings.device!r} is not to be had: torch finds no GPU here")
    check_clock(settings.device, settings.processor_time)


def _warn_when_busy(environment: dict[str, object]) -> None:
    load = environment["load_at_start"]
    if isinstance(load, float) and load > _QUIET_LOAD:
        _logger.warning("something else is running here (load %.1f): times will be noisy, memory will not", load)


def _sample(roofline: Roofline, journal: Journal) -> None:
    for name, readings in roofline.sample().items():
        journal.add("roofline", {"name": name, "readings": readings})


def _measure_memory(report: AttentionReport, candidates: list[Candidate], journal: Journal) -> None:
    settings = report.settings
    points = {(point.name, point.workload): point for point in _points(report)}
    for piece in journal.pieces("memory"):
        _set_memory(points.pop((piece["name"], Workload(**piece["workload"]))), outcome_from_json(piece))
    budget = _budget(settings)
    with tqdm(total=len(points), desc="memory", unit="point", disable=None) as progress:
        for candidate in candidates:
            # A group is measured whole: what its long calls need is predicted from its short ones.
            groups = [
                group for group in settings.groups() if any((candidate.name, workload) in points for workload in group)
            ]
            for outcome in measure_memory(candidate.name, groups, settings.device, budget):
                point = points.pop((candidate.name, outcome.workload), None)
                if point is None:
                    continue
                _set_memory(point, outcome)
                journal.add("memory", {"name": candidate.name, **asdict(outcome)})
                progress.set_postfix_str(f"{candidate.name} T={outcome.workload.length}", refresh=False)
                progress.update()


def _set_memory(point: Point, outcome: MemoryOutcome) -> None:
    point.memory, point.memory_skipped = outcome.reading, outcome.skipped


def _measure_time(
    report: AttentionReport, candidates: list[Candidate], meters: dict[str, Meter], journal: Journal
) -> None:
    settings = report.settings
    by_name = {candidate.name: candidate for candidate in candidates}
    points: dict[Workload, list[Point]] = {}
    for point in _points(report):
        points.setdefault(point.workload, []).append(point)
        point.time_skipped = _why_not_timed(point, settings)
    for piece in journal.pieces("time"):
        _set_times(points.pop(Workload(**piece["workload"])), piece)
    with tqdm(total=len(points), desc="time", unit="shape", disable=None) as progress:
        for workloads in _shapes(points):
            progress.set_postfix_str(f"{workloads[0].passes} T={workloads[0].length}")
            timed = {
                workload: [by_name[point.name] for point in points[workload] if point.time_skipped is None]
                for workload in workloads
            }
            for workload, figures in _time(timed, meters, settings).items():
                piece = {"workload": asdict(workload), **figures}
                _set_times(points[workload], piece)
                journal.add("time", piece)
            progress.update(len(workloads))


def _shapes(workloads: Iterable[Workload]) -> list[list[Workload]]:
    """Workloads that differ in dtype alone: they are timed in the same rounds, so that dtypes can be compared."""
    shapes: dict[Workload, list[Workload]] = {}
    for workload in workloads:
        shapes.setdefault(replace(workload, dtype=""), []).append(workload)
    return list(shapes.values())


def _set_times(group: list[Point], piece: dict) -> None:
    for point in group:
        if point.name in piece["samples_s"]:
            point.timing, point.limits = Timing(samples_s=tuple(piece["samples_s"][point.name])), piece["limits"]


def _why_not_timed(point: Point, settings: AttentionSettings) -> str | None:
    if point.memory is None:
        return point.memory_skipped
    if point.memory.call_s > settings.time_limit_s:
        return f"a call took {point.memory.call_s:.3g} s, the limit is {settings.time_limit_s:.3g} s"
    return None


def _time(
    timed: Mapping[Workload, list[Candidate]], meters: dict[str, Meter], settings: AttentionSettings
) -> dict[Workload, dict[str, dict[str, list[float]]]]:
    """For each workload the samples of each candidate, and what the machine could do meanwhile in this dtype."""
    gc.collect()
    calls: dict[tuple[Workload, str], Callable[[], object]] = {}
    limits: dict[Workload, dict[str, list[float]]] = {workload: {} for workload in timed}
    for workload, candidates in timed.items():
        if not candidates:
            continue
        inputs = Inputs(workload, settings.device)
        # Limits are read by the clock on the wall, so beside processor time they mean nothing.
        limits[workload] = (
            {}
            if settings.processor_time
            else {kind: [] for kind in ("mm", "fma") if f"{kind}_{workload.dtype}" in meters}
        )
        for candidate in candidates:
            candidate.set_up(workload)
            calls[workload, candidate.name] = prepare(candidate.function, workload, inputs)

    def read_limits() -> None:
        for workload, kinds in limits.items():
            for kind, readings in kinds.items():
                readings.append(meters[f"{kind}_{workload.dtype}"].read())

    timings: dict[tuple[Workload, str], Timing] = {}
    if calls:
        timings = time_interleaved(
            calls,
            settings.device,
            repeats=settings.repeats,
            time_limit_s=settings.time_limit_s,
            before_each_round=read_limits,
            processor_time=settings.processor_time,
        )
    samples: dict[Workload, dict[str, list[float]]] = {workload: {} for workload in timed}
    for (workload, name), timing in timings.items():
        samples[workload][name] = list(timing.samples_s)
    return {workload: {"samples_s": samples[workload], "limits": limits[workload]} for workload in timed}


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
