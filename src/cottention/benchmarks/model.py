"""The model benchmark: BERT steps on sentence pairs packed end to end beside the same pairs padded, and whole models.

Pairs differ in length. Padded to the longest of a batch, every matrix product also runs over the padding; packed, over
real tokens alone. Loss and gradients of both are compared first. Then whole steps (forward, both losses, backward,
AdamW) are timed interleaved in one process, each on a model of its own with the same weights. Whole models beside their
twins are `twins.py`.

    report = benchmark_model(ModelSettings(batch_size=32))
    print(model_as_text(report))
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cottention.benchmarks.environment import check_clock, describe_environment, machine_line
from cottention.benchmarks.journal import write_texts
from cottention.benchmarks.measure import Timing
from cottention.benchmarks.settings import PAIR_LENGTHS, ModelSettings
from cottention.benchmarks.twins import (
    STOCK,
    Batch,
    TwinPoint,
    loss_and_gradients,
    measure_twins,
    new_model,
    refuse_different,
    time_models,
    training_step,
    twins_as_lines,
)
from cottention.errors import SettingsError
from cottention.files import IGNORE_INDEX
from cottention.training.memory import keep_freed_memory

_MASKED_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class ModelPoint:
    """Both forms on one mix of lengths."""

    mix: str
    num_tokens: int
    """Real tokens of a step."""
    num_padded: int
    """Positions that the padded form computes on."""
    unpadded: Timing
    padded: Timing
    loss_difference: float
    """Of the two losses, relative."""
    gradient_difference: float
    """Of all gradients together, relative to their norm."""

    @property
    def speedup(self) -> float:
        """How many times as fast the packed form is."""
        return self.padded.median_s / self.unpadded.median_s


@dataclass(kw_only=True)
class ModelReport:
    """Everything that one run found."""

    settings: ModelSettings
    environment: dict[str, object]
    num_parameters: int
    points: list[ModelPoint] = field(default_factory=list)
    twins: list[TwinPoint] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """The report as plain data for JSON."""
        return {
            "benchmark": "model",
            "format": 1,
            "environment": self.environment,
            "settings": asdict(self.settings),
            "num_parameters": self.num_parameters,
            "results": [
                {
                    **{name: getattr(point, name) for name in ("mix", "num_tokens", "num_padded", "speedup")},
                    "loss_difference": point.loss_difference,
                    "gradient_difference": point.gradient_difference,
                    **{
                        name: {"median_s": timing.median_s, "spread": timing.spread, "samples_s": timing.samples_s}
                        for name, timing in (("unpadded", point.unpadded), ("padded", point.padded))
                    },
                }
                for point in self.points
            ],
            "twins": [
                {
                    **{name: getattr(twin, name) for name in ("name", "passes", "length", "num_rows", "tokens_per_s")},
                    "median_s": twin.timing.median_s,
                    "spread": twin.timing.spread,
                    "samples_s": twin.timing.samples_s,
                }
                for twin in self.twins
            ],
        }


def benchmark_model(settings: ModelSettings) -> ModelReport:
    """Measure every mix of lengths.

    Raises:
        SettingsError: there is no such device.
        WrongResultError: the two forms differ; nothing is reported.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device must be cpu where torch finds no GPU; got 'cuda'")
    check_clock(settings.device, settings.processor_time)
    if settings.device == "cpu":
        keep_freed_memory()
    report = ModelReport(
        settings=settings,
        environment=describe_environment(settings.device),
        num_parameters=new_model(settings, settings.attention_type).num_parameters(),
    )
    if settings.arch == "bert":  # a GPT reads texts of the length that it is given
        for mix in settings.mixes:
            report.points.append(_measure(mix, settings))
    report.twins = measure_twins(settings)
    return report


def _measure(mix: str, settings: ModelSettings) -> ModelPoint:
    packed = _packed_batch(mix, settings)
    batches = {"unpadded": packed, "padded": _padded(packed)}
    found = {name: _loss_and_gradients(settings, batch) for name, batch in batches.items()}
    loss_difference, gradient_difference = refuse_different(
        "packed and padded pairs", found["unpadded"], found["padded"]
    )
    calls = {
        name: training_step(new_model(settings, settings.attention_type), batch, settings)
        for name, batch in batches.items()
    }
    timings = time_models(calls, settings)
    return ModelPoint(
        mix=mix,
        num_tokens=packed["input_ids"].numel(),
        num_padded=batches["padded"]["input_ids"].numel(),
        unpadded=timings["unpadded"],
        padded=timings["padded"],
        loss_difference=loss_difference,
        gradient_difference=gradient_difference,
    )


def _packed_batch(mix: str, settings: ModelSettings) -> Batch:
    """Pairs of random tokens, with lengths drawn from the mix and 15 % of the tokens to predict."""
    source = np.random.default_rng(settings.seed)
    quantiles = PAIR_LENGTHS[mix]
    places = np.linspace(0, 1, len(quantiles))
    lengths = np.interp(source.random(settings.batch_size), places, quantiles).round().astype(np.int64)
    ids = source.integers(0, settings.vocab_size, lengths.sum())
    is_target = source.random(len(ids)) < _MASKED_SHARE
    is_target[0] = True
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(ids)) - np.repeat(starts, lengths)
    rows = {
        "input_ids": ids,
        "token_type_ids": (positions > np.repeat(lengths // 2, lengths)).astype(np.int64),
        "position_ids": positions,
        "labels": np.where(is_target, ids, IGNORE_INDEX),
    }
    batch = {name: torch.from_numpy(row)[None] for name, row in rows.items()}
    batch["cu_seqlens"] = torch.from_numpy(np.append(starts, len(ids)).astype(np.int32))
    batch["next_sentence_label"] = torch.from_numpy(source.integers(0, 2, settings.batch_size))
    return {name: tensor.to(settings.device) for name, tensor in batch.items()}


def _padded(packed: Batch) -> Batch:
    """The same pairs, one a row, as long as the longest."""
    lengths = packed["cu_seqlens"].diff()
    real = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]  # [N, longest]
    batch = {"attention_mask": real.long(), "next_sentence_label": packed["next_sentence_label"]}
    for name, filling in (("input_ids", 0), ("token_type_ids", 0), ("labels", IGNORE_INDEX)):
        rows = torch.full(real.shape, filling, device=lengths.device)
        rows[real] = packed[name][0]
        batch[name] = rows
    return batch


def _loss_and_gradients(settings: ModelSettings, batch: Batch) -> tuple[float, Tensor]:
    return loss_and_gradients(new_model(settings, settings.attention_type), batch)


def model_as_text(report: ModelReport) -> str:
    """The machine, a table of packed and padded pairs, and one of the twins."""
    about, settings = report.environment, report.settings
    where = machine_line(about, asdict(settings))
    what = f"{settings.arch.upper()} of {report.num_parameters / 1e6:.1f} M parameters, {settings.dtype}"
    lines = [f"{where}, torch {torch.__version__}, load {about['load_at_start']} before the start"]
    if report.points:
        lines += [f"a step of {settings.batch_size} sentence pairs, {settings.attention_type} {what}", ""]
        lines += [*_pair_rows(report.points), ""]
        lines += [
            "sentences   one sentence on each side, as in the paper; filled: whole sentences up to 128 tokens",
            "loss        relative difference of the two losses; gradient: of all gradients, relative to their norm",
            "",
        ]
    lines += [f"whole models beside each other, {what}", "", *twins_as_lines(report.twins), ""]
    lines += [
        "forward     without gradients, all logits; step: forward, loss, backward, AdamW",
        "vs          time divided by that of cosine: above 1 cosine is faster",
        f"{STOCK}  its own softmax model with the weights of the twin, whose loss and gradients are the same",
    ]
    return "\n".join(lines)


def _pair_rows(points: list[ModelPoint]) -> list[str]:
    columns = ("lengths", "tokens", "padded to", "unpadded", "spread", "padded", "spread", "faster", "loss", "gradient")
    rows = ["{:<11}{:>8}{:>11}{:>12}{:>8}{:>12}{:>8}{:>9}{:>10}{:>10}".format(*columns)]
    for point in points:
        times = [
            f"{timing.median_s * 1e3:>9.1f} ms{'-' if timing.spread is None else f'{timing.spread:.0%}':>8}"
            for timing in (point.unpadded, point.padded)
        ]
        rows.append(
            f"{point.mix:<11}{point.num_tokens:>8}{point.num_padded:>11}{times[0]}{times[1]}"
            f"{point.speedup:>8.2f}x{point.loss_difference:>10.1e}{point.gradient_difference:>10.1e}"
        )
    return rows


def write_model_report(report: ModelReport, directory: Path) -> list[Path]:
    """Write model.json and model.txt; returns the files."""
    return write_texts(
        {"model.json": json.dumps(report.to_dict(), indent=1), "model.txt": model_as_text(report)}, directory
    )
