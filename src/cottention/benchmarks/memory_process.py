"""Measures memory in a process of its own for each candidate, where nothing else allocates and a crash ends nothing.

The parent sends one job as JSON on stdin; the child answers with one JSON line for each workload, in order, shortest
first, and from what it has seen decides whether the next one fits the budget. A call that hangs is ended by the child's
own alarm; a child that dies costs the workloads of its group, and the next group gets a new child.

    for outcome in measure_memory("chunk", groups, "cpu", budget): ...

The child is `python -m cottention.benchmarks.memory_process`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO

import torch

from cottention.benchmarks.budget import Budget
from cottention.benchmarks.calls import Inputs, prepare
from cottention.benchmarks.memory import MALLOC_ENVIRONMENT, MemoryReading, measure_call
from cottention.benchmarks.peers import Candidate, load_candidate
from cottention.benchmarks.settings import Workload

# Called first and not reported: they set up what is set up once, and the lengths that count are predicted from them.
_PROBED_LENGTHS = (64, 256, 1024)
# A prediction may be wrong; a call that is this many times over the limit will not be waited for.
_PATIENCE = 5
_SLACK_S = 60


@dataclass(frozen=True, kw_only=True)
class MemoryOutcome:
    """A reading, or the reason why there is none."""

    workload: Workload
    reading: MemoryReading | None = None
    skipped: str | None = None


def measure_memory(
    name: str, groups: Sequence[Sequence[Workload]], device: str, budget: Budget
) -> Iterator[MemoryOutcome]:
    """One outcome for each workload, in order, as they come.

    Args:
        name: an implementation or a peer, which the child process imports anew.
        groups: workloads that differ in length alone, shortest first.
        device: cpu or cuda.
        budget: what one call may take.
    """
    pending = [list(group) for group in groups]
    while pending:
        job = {
            "name": name,
            "device": device,
            "num_threads": torch.get_num_threads(),
            "budget": asdict(budget),
            "groups": [[asdict(workload) for workload in group] for group in pending],
        }
        done = 0
        with tempfile.TemporaryFile() as stderr:
            child = _start_child(job, stderr)
            assert child.stdout is not None
            try:
                for line in child.stdout:
                    done += 1
                    yield outcome_from_json(json.loads(line))
                reason = _why_it_ended(child.wait(), stderr)
            finally:
                child.kill()  # it has ended unless we were interrupted
                child.stdout.close()
                child.wait()
        # What is left of the group in which the child died is lost; the groups behind it are not.
        while pending and done >= len(pending[0]):
            done -= len(pending.pop(0))
        if pending:
            for workload in pending.pop(0)[done:]:
                yield MemoryOutcome(workload=workload, skipped=reason)


def _start_child(job: dict, stderr: IO[bytes]) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", "cottention.benchmarks.memory_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, **MALLOC_ENVIRONMENT},
    )
    assert child.stdin is not None
    try:
        child.stdin.write(json.dumps(job))
        child.stdin.close()
    except BrokenPipeError:  # it died at once; its exit code and stderr say why
        pass
    return child


def outcome_from_json(answer: dict) -> MemoryOutcome:
    """The outcome that `dataclasses.asdict` turned into this."""
    reading = answer["reading"]
    return MemoryOutcome(
        workload=Workload(**answer["workload"]),
        reading=None if reading is None else MemoryReading(**reading),
        skipped=answer["skipped"],
    )


def _why_it_ended(code: int, stderr: IO[bytes]) -> str:
    if code == -signal.SIGALRM:
        return "a call took far longer than predicted and was ended"
    if code < 0:
        return f"the process that measures memory was killed by signal {-code} (out of memory?)"
    stderr.seek(0)
    lines = stderr.read().decode(errors="replace").strip().splitlines()
    return f"the process that measures memory ended with {lines[-1] if lines else f'exit code {code}'}"


def _child_main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["num_threads"])
    device, budget = job["device"], Budget(**job["budget"])
    candidate = load_candidate(job["name"], device)
    for group in job["groups"]:
        for outcome in _measure_group(candidate, [Workload(**each) for each in group], device, budget):
            print(json.dumps(asdict(outcome)), flush=True)


def _measure_group(
    candidate: Candidate, workloads: list[Workload], device: str, budget: Budget
) -> Iterator[MemoryOutcome]:
    seconds: dict[int, float] = {}
    peaks: dict[int, float] = {}
    longest = workloads[-1].length
    probed = [_PROBED_LENGTHS[0], *(T for T in _PROBED_LENGTHS[1:] if longest > T)]
    probes = [replace(workloads[0], length=T) for T in probed]
    for i, workload in enumerate([*probes, *workloads]):
        T, reading = workload.length, None
        skipped = candidate.refuses(workload) or budget.refusal(
            length=T, seconds=seconds, peak_bytes=peaks, input_bytes=Inputs.num_bytes(workload)
        )
        if skipped is None:
            candidate.set_up(workload)
            _set_alarm(_PATIENCE * budget.time_limit_s + _SLACK_S)
            reading = measure_call(prepare(candidate.function, workload, Inputs(workload, device)), device)
            _set_alarm(0)
            seconds[T], peaks[T] = reading.call_s, reading.peak_bytes
        if i >= len(probes):
            yield MemoryOutcome(workload=workload, reading=reading, skipped=skipped)


def _set_alarm(after_s: float) -> None:
    """Have the operating system end this process, even inside native code; 0 calls it off."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, after_s)


if __name__ == "__main__":
    _child_main()
