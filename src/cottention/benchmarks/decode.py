"""The decode benchmark: one token at a position far into a text, in each implementation, beside softmax with its cache.

Cosine attention carries the past as one matrix a head, so a step costs the same anywhere; softmax reads all keys and
values again. Values are checked first, against the plain step in float64 from the same state; then the steps of each
position are timed interleaved, each going on from the state that it left behind.

    report = benchmark_decode(DecodeSettings(positions=(100, 100_000)))
    print(decode_as_text(report))
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cottention.benchmarks.budget import free_bytes
from cottention.benchmarks.check import TOLERANCES, WrongResultError
from cottention.benchmarks.environment import check_clock, describe_environment, machine_line
from cottention.benchmarks.journal import write_texts
from cottention.benchmarks.measure import Timing, time_interleaved
from cottention.benchmarks.settings import DecodeSettings
from cottention.errors import SettingsError, did_you_mean
from cottention.ops import CosineState, cosine_attention, cosine_attention_step
from cottention.ops.native.binding import suits_native
from cottention.ops.plain import plain_step

BASELINE = "torch"
"""What the others are compared with: the same step in plain torch operators."""

_PREFILL = 4096
_SHARE_OF_FREE_MEMORY = 0.5
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class DecodePoint:
    """One implementation at one position of one batch."""

    name: str
    batch_size: int
    position: int
    timing: Timing
    state_bytes: int
    """What is carried from token to token: the state, or for softmax the keys and values so far."""
    error: float | None
    """Largest relative error of output and state against float64; None for softmax, which computes something else."""

    @property
    def tokens_per_s(self) -> float:
        """One token for each sequence of the batch a step."""
        return self.batch_size / self.timing.median_s


@dataclass(kw_only=True)
class DecodeReport:
    """Everything that one run found."""

    settings: DecodeSettings
    environment: dict[str, object]
    unavailable: dict[str, str]
    points: list[DecodePoint] = field(default_factory=list)

    def beside(self, point: DecodePoint, name: str) -> DecodePoint | None:
        """The point of another implementation at the same place."""
        where = (name, point.batch_size, point.position)
        return next((each for each in self.points if (each.name, each.batch_size, each.position) == where), None)

    def at_first_position(self, point: DecodePoint) -> DecodePoint:
        """The same implementation at the shortest text."""
        return next(each for each in self.points if (each.name, each.batch_size) == (point.name, point.batch_size))

    def to_dict(self) -> dict[str, object]:
        """The report as plain data for JSON."""
        return {
            "benchmark": "decode",
            "format": 1,
            "environment": self.environment,
            "settings": asdict(self.settings),
            "unavailable": self.unavailable,
            "results": [self._result(point) for point in self.points],
        }

    def _result(self, point: DecodePoint) -> dict[str, object]:
        plain = self.beside(point, BASELINE)
        return {
            "name": point.name,
            "batch_size": point.batch_size,
            "position": point.position,
            "median_s": point.timing.median_s,
            "spread": point.timing.spread,
            "samples_s": list(point.timing.samples_s),
            "tokens_per_s": point.tokens_per_s,
            "times_as_fast_as_torch": None if plain is None else plain.timing.median_s / point.timing.median_s,
            "time_to_first_position": point.timing.median_s / self.at_first_position(point).timing.median_s,
            "state_bytes": point.state_bytes,
            "error": point.error,
        }


def benchmark_decode(settings: DecodeSettings) -> DecodeReport:
    """Measure every step that the settings ask for.

    Raises:
        SettingsError: a name is unknown, or cannot run here and was asked for by name.
        WrongResultError: a step differs from the plain one in float64; nothing is reported.
    """
    check_clock("cpu", settings.processor_time)
    names, unavailable = _find(settings)
    report = DecodeReport(settings=settings, environment=describe_environment("cpu"), unavailable=unavailable)
    for batch_size in settings.batch_sizes:
        for position in settings.positions:
            fitting = list(names)
            needed, free = _cache_bytes(batch_size, position, settings), free_bytes("cpu") * _SHARE_OF_FREE_MEMORY
            if "sdpa" in names and needed > free:
                fitting.remove("sdpa")
                unavailable[f"sdpa at B = {batch_size}, position {position}"] = (
                    f"its keys and values need {needed / 2**30:.3g} GiB, the limit is {free / 2**30:.3g} GiB"
                )
            report.points += _measure(fitting, batch_size, position, settings)
    return report


def _cache_bytes(batch_size: int, position: int, settings: DecodeSettings) -> int:
    """Keys and values of a text, drawn in float32 whatever they are kept in."""
    return 2 * batch_size * position * settings.num_heads * settings.head_dim * 4


def _find(settings: DecodeSettings) -> tuple[list[str], dict[str, str]]:
    names, unavailable = [], {}
    for name in dict.fromkeys(settings.implementations or STEPS):
        if name not in STEPS:
            raise SettingsError(
                f"implementations must be of {', '.join(STEPS)}; got {name!r}{did_you_mean(name, STEPS)}"
            )
        if name in _NATIVE and not suits_native(torch.empty(0, dtype=getattr(torch, settings.dtype))):
            reason = f"the native library is missing (see `cottention doctor`) or does not take {settings.dtype}"
            if settings.implementations is not None:
                raise SettingsError(f"implementation {name!r} cannot be measured here: {reason}")
            unavailable[name] = reason
        else:
            names.append(name)
    return names, unavailable


def _measure(names: list[str], batch_size: int, position: int, settings: DecodeSettings) -> list[DecodePoint]:
    token = _Token(batch_size, position, settings)
    runs = {name: STEPS[name](token) for name in names}
    errors = {name: None if run.error is None else run.error() for name, run in runs.items()}
    for name, error in errors.items():
        if error is not None and error > TOLERANCES[settings.dtype]:
            raise WrongResultError(
                f"nothing is reported: the step of {name!r} differs from float64 by {error:.1e} at position {position}"
            )
    timings = time_interleaved(
        {name: run.call for name, run in runs.items()},
        "cpu",
        repeats=settings.repeats,
        time_limit_s=settings.time_limit_s,
        processor_time=settings.processor_time,
    )
    return [
        DecodePoint(
            name=name,
            batch_size=batch_size,
            position=position,
            timing=timings[name],
            state_bytes=run.state_bytes,
            error=errors[name],
        )
        for name, run in runs.items()
    ]


class _Token:
    """The token to decode, and the state that a text of random tokens before it has left."""

    def __init__(self, batch_size: int, position: int, settings: DecodeSettings) -> None:
        self.generator = torch.Generator().manual_seed(position)
        self.dtype = getattr(torch, settings.dtype)
        H, K = settings.num_heads, settings.head_dim
        self.shape, self.position = (batch_size, H, K), position
        self.q, self.k, self.v = (torch.randn(self.shape, generator=self.generator).to(self.dtype) for _ in range(3))
        self.norm_const = torch.full((H,), 0.5)

    @functools.cached_property
    def state(self) -> CosineState:
        """Of the `position` tokens before."""
        B, H, K = self.shape
        state = CosineState.zeros(B, H, K, K)
        for start in range(0, self.position, _PREFILL):
            T = min(_PREFILL, self.position - start)
            q, k, v = (torch.randn(B, T, H, K, generator=self.generator) for _ in range(3))
            _, after = cosine_attention(
                q, k, v, self.norm_const, causal=True, initial_state=state, output_final_state=True
            )
            assert after is not None
            state = after
        return state


@dataclass(frozen=True, kw_only=True)
class _Run:
    call: Callable[[], Tensor]
    state_bytes: int
    error: Callable[[], float] | None


def _fused_step(q, k, v, norm_const, state: CosineState) -> tuple[Tensor, CosineState]:
    return cosine_attention_step(q, k, v, norm_const, state)


def _in_place_step(q, k, v, norm_const, state: CosineState) -> tuple[Tensor, CosineState]:
    return cosine_attention_step(q, k, v, norm_const, state, in_place=True)


def _torch_step(q, k, v, norm_const, state: CosineState) -> tuple[Tensor, CosineState]:
    """What runs where there is no native library."""
    return plain_step(q, k, v, norm_const, state, None)


def _cosine_step(token: _Token, step: Callable[..., tuple[Tensor, CosineState]]) -> _Run:
    def copy() -> CosineState:
        return CosineState(token.state.kv.clone(), token.state.seen.clone())

    state = copy()

    def call() -> Tensor:
        nonlocal state
        with torch.no_grad():
            o, state = step(token.q, token.k, token.v, token.norm_const, state)
        return o

    def error() -> float:
        before = CosineState(token.state.kv.double(), token.state.seen)
        inputs = (token.q.double(), token.k.double(), token.v.double(), token.norm_const.double())
        exact, after = plain_step(*inputs, before, None)
        found, found_after = step(token.q, token.k, token.v, token.norm_const, copy())
        assert torch.equal(found_after.seen, after.seen)
        pairs = ((found, exact), (found_after.kv, after.kv))
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
        return max(math.inf if math.isnan(each) else each for each in errors)  # max() alone would pass over a NaN

    return _Run(call=call, state_bytes=state.nbytes, error=error)


def _softmax_step(token: _Token) -> _Run:
    """F.scaled_dot_product_attention over keys and values that lie ready, without the cost of growing their cache."""
    B, H, K = token.shape
    k, v = (torch.randn(B, H, token.position, K, generator=token.generator).to(token.dtype) for _ in range(2))
    q = token.q[:, :, None]

    def call() -> Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, k, v)

    return _Run(call=call, state_bytes=k.nbytes + v.nbytes, error=None)


STEPS: dict[str, Callable[[_Token], _Run]] = {
    "native": functools.partial(_cosine_step, step=_fused_step),
    "in-place": functools.partial(_cosine_step, step=_in_place_step),
    BASELINE: functools.partial(_cosine_step, step=_torch_step),
    "sdpa": _softmax_step,
}
"""Name -> the step at a token: the fused one, the same over its state, in plain torch operators, and softmax."""

_NATIVE = ("native", "in-place")


def decode_as_text(report: DecodeReport) -> str:
    """The machine and one table."""
    about, settings = report.environment, report.settings
    where = machine_line(about, asdict(settings))
    columns = ("", "B", "position", "time", "spread", "tokens/s", "vs torch", "vs first", "state")
    lines = [
        f"{where}, torch {torch.__version__}, load {about['load_at_start']} before the start",
        f"one token, {settings.dtype}, H = {settings.num_heads}, K = V = {settings.head_dim}",
        *(f"left out: {name}, {reason}" for name, reason in report.unavailable.items()),
        "",
        "{:<9}{:>5}{:>10}{:>12}{:>8}{:>11}{:>10}{:>10}{:>12}".format(*columns),
    ]
    for point in report.points:
        plain, first = report.beside(point, BASELINE), report.at_first_position(point)
        median, spread = point.timing.median_s, point.timing.spread
        lines.append(
            f"{point.name:<9}{point.batch_size:>5}{point.position:>10}{median * 1e6:>9.1f} us"
            f"{'-' if spread is None else f'{spread:.0%}':>8}{point.tokens_per_s:>11.4g}"
            f"{'-' if plain is None else f'{plain.timing.median_s / median:.2f}x':>10}"
            f"{median / first.timing.median_s:>9.2f}x{point.state_bytes / _MIB:>8.2f} MiB"
        )
    lines += [
        "",
        "vs torch   time of the same step in plain torch operators divided by this one: more is faster",
        "vs first   time divided by that at the first position: 1 is a cost that does not grow with the text",
        "state      what is carried from token to token; for sdpa the keys and values of the whole text",
    ]
    return "\n".join(lines)


def write_decode_report(report: DecodeReport, directory: Path) -> list[Path]:
    """Write decode.json, decode.txt and decode.png; returns the files."""
    from cottention.benchmarks.plot import write_decode_figure  # matplotlib takes a second

    texts = {"decode.json": json.dumps(report.to_dict(), indent=1), "decode.txt": decode_as_text(report)}
    return [*write_texts(texts, directory), write_decode_figure(report, directory)]
