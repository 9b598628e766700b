"""No figure without right values: everything is compared with its float64 reference before it is timed.

An implementation of cosine attention that differs stops the benchmark. A peer that differs is left out, with the
reason.

    checks, candidates, unavailable = check_candidates(candidates, settings)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from cottention.benchmarks.calls import Inputs, prepare
from cottention.benchmarks.peers import Candidate
from cottention.benchmarks.settings import AttentionSettings, Workload
from cottention.errors import CottentionError

# Two chunks of 64 and a bit: the rims are where chunked forms go wrong. The second is for what takes whole chunks.
_LENGTHS = (129, 192)
_BATCH_SIZE, _NUM_HEADS = 2, 3

# Largest ||found - exact|| / ||exact|| of any tensor. float32: sums of some hundred products, each rounded at 6e-8.
# bfloat16 and float16: inputs are the same, so what remains is the rounding of the output and of tiles in between
# (2^-8 and 2^-11 at most each, half of that on average); two and a half at their worst are allowed.
TOLERANCES = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 1e-2, "float16": 1.2e-3}

_TENSORS = ("o", "dq", "dk", "dv", "dnorm_const")


class WrongResultError(CottentionError):
    """An implementation does not compute what it is said to, so its figures would mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison that was made."""

    name: str
    workload: Workload
    error: float
    """Largest relative error of the output and its gradients."""
    tensor: str
    """Which tensor has it."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is one of rounding. NaN is not."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        """What was found, for a message."""
        shown = self.workload
        return (
            f"{self.tensor} differs from float64 by {self.error:.1e} relative, allowed {self.tolerance:.1e} "
            f"({shown.direction}, {shown.dtype}, K = V = {shown.head_dim})"
        )


def check_candidates(
    candidates: list[Candidate], settings: AttentionSettings
) -> tuple[list[Check], list[Candidate], dict[str, str]]:
    """Compare every candidate with its reference, in all that will be measured but at a small shape.

    Returns:
        The comparisons, the candidates that passed, and for the peers that did not the reason.

    Raises:
        WrongResultError: an implementation of cosine attention differs from naive in float64.
    """
    checks: list[Check] = []
    passed: list[Candidate] = []
    wrong: dict[str, str] = {}
    for candidate in candidates:
        found = [check(candidate, workload, settings.device) for workload in _workloads(candidate, settings)]
        checks += found
        failures = [each for each in found if not each.passed]
        if not failures:
            passed.append(candidate)
        elif candidate.is_peer:
            wrong[candidate.name] = f"wrong values: {failures[0]}"
        else:
            raise WrongResultError(f"nothing is reported: implementation {candidate.name!r} is wrong: {failures[0]}")
    return checks, passed, wrong


def check(candidate: Candidate, workload: Workload, device: str) -> Check:
    """Compare one candidate with its reference on one workload."""
    inputs = Inputs(workload, device, seed=1)
    found = prepare(candidate.function, workload, inputs)()
    exact = prepare(candidate.reference, workload, inputs.in_float64())()
    errors = [_relative_error(a, b) for a, b in zip(found, exact, strict=True)]
    # max() would pass over a NaN
    worst = max(range(len(errors)), key=lambda i: float("inf") if errors[i] != errors[i] else errors[i])
    return Check(
        name=candidate.name,
        workload=workload,
        error=errors[worst],
        tensor=_TENSORS[worst],
        tolerance=TOLERANCES[workload.dtype],
    )


def _workloads(candidate: Candidate, settings: AttentionSettings) -> Iterator[Workload]:
    """Every direction, dtype and head size of the run; with backward where the run has it."""
    passes = max(settings.passes, key=len)  # forward+backward checks forward too
    for direction, dtype, head_dim in itertools.product(settings.directions, settings.dtypes, settings.head_dims):
        for length in _LENGTHS:
            workload = Workload(
                direction=direction,
                passes=passes,
                dtype=dtype,
                batch_size=_BATCH_SIZE,
                num_heads=_NUM_HEADS,
                head_dim=head_dim,
                length=length,
            )
            if candidate.refuses(workload) is None:
                yield workload
                break


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
