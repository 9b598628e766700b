"""The model benchmark: a step of BERT pretraining on sentence pairs packed end to end, beside the same pairs padded.

Pairs differ in length. Padded to the longest of a batch, every matrix product also runs over the padding; packed, over
real tokens alone. Loss and gradients of both are compared first. Then whole steps (forward, both losses, backward,
AdamW) are timed interleaved in one process, each on a model of its own with the same weights.

    report = benchmark_model(ModelSettings(batch_size=32))
    print(model_as_text(report))
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cottention.benchmarks.check import WrongResultError
from cottention.benchmarks.environment import describe_environment
from cottention.benchmarks.journal import write_texts
from cottention.benchmarks.measure import Timing, time_interleaved
from cottention.benchmarks.settings import PAIR_LENGTHS, ModelSettings
from cottention.errors import SettingsError
from cottention.files import IGNORE_INDEX
from cottention.models import CottentionBertConfig, CottentionBertForPreTraining
from cottention.training.memory import keep_freed_memory
from cottention.training.optimizer import build_optimizer
from cottention.training.recipe_sections import OptimizerSettings

_MASKED_SHARE = 0.15
# Relative. Both sum the same numbers in another order; 1e-6 measured, for gradients relative to their norm.
_LOSS_TOLERANCE = 1e-5
_GRADIENT_TOLERANCE = 1e-4

Batch = dict[str, Tensor]


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
        }


def benchmark_model(settings: ModelSettings) -> ModelReport:
    """Measure every mix of lengths.

    Raises:
        SettingsError: there is no such device.
        WrongResultError: the two forms differ; nothing is reported.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device must be cpu where torch finds no GPU; got 'cuda'")
    if settings.device == "cpu":
        keep_freed_memory()
    report = ModelReport(
        settings=settings,
        environment=describe_environment(settings.device),
        num_parameters=_model(settings).num_parameters(),
    )
    for mix in settings.mixes:
        report.points.append(_measure(mix, settings))
    return report


def _measure(mix: str, settings: ModelSettings) -> ModelPoint:
    packed = _packed_batch(mix, settings)
    batches = {"unpadded": packed, "padded": _padded(packed)}
    losses, gradients = zip(*(_loss_and_gradients(settings, batch) for batch in batches.values()), strict=True)
    loss_difference = abs(losses[0] - losses[1]) / abs(losses[1])
    gradient_difference = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    for name, difference, tolerance in (
        ("loss", loss_difference, _LOSS_TOLERANCE),
        ("gradient", gradient_difference, _GRADIENT_TOLERANCE),
    ):
        if not difference < tolerance:
            raise WrongResultError(
                f"packed and padded pairs must have the same {name} to {tolerance:.0e}; they differ by {difference:.1e}"
            )
    calls = {name: _step(settings, batch) for name, batch in batches.items()}
    timings = time_interleaved(calls, settings.device, repeats=settings.repeats, time_limit_s=settings.time_limit_s)
    return ModelPoint(
        mix=mix,
        num_tokens=packed["input_ids"].numel(),
        num_padded=batches["padded"]["input_ids"].numel(),
        unpadded=timings["unpadded"],
        padded=timings["padded"],
        loss_difference=loss_difference,
        gradient_difference=gradient_difference,
    )


def _model(settings: ModelSettings) -> Any:
    torch.manual_seed(settings.seed)
    config = CottentionBertConfig(
        attention_type=settings.attention_type,
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        intermediate_size=4 * settings.hidden_size,
        max_position_embeddings=max(map(max, PAIR_LENGTHS.values())),
        # Without dropout the two forms have the same loss.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        sparse_prediction=True,
    )
    model: Any = CottentionBertForPreTraining(config)
    return model.to(settings.device).train()


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
    model = _model(settings)
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _step(settings: ModelSettings, batch: Batch) -> Callable[[], object]:
    """A training step as something to time."""
    model = _model(settings)
    optimizer = build_optimizer(model, OptimizerSettings())
    autocast: dict[str, Any] = {
        "device_type": settings.device,
        "dtype": torch.bfloat16,
        "enabled": settings.dtype == "bfloat16",
    }

    def step() -> None:
        with torch.autocast(**autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def model_as_text(report: ModelReport) -> str:
    """The machine and one table."""
    about, settings = report.environment, report.settings
    columns = ("lengths", "tokens", "padded to", "unpadded", "spread", "padded", "spread", "faster", "loss", "gradient")
    where = f"{about['processor']} ({about['instruction_set']}), {about['threads']} threads"
    what = f"{settings.attention_type} BERT of {report.num_parameters / 1e6:.1f} M parameters, {settings.dtype}"
    lines = [
        f"{where}, torch {torch.__version__}, load {about['load_at_start']} before the start",
        f"a step of {settings.batch_size} sentence pairs, {what}",
        "",
        "{:<11}{:>8}{:>11}{:>12}{:>8}{:>12}{:>8}{:>9}{:>10}{:>10}".format(*columns),
    ]
    for point in report.points:
        times = [
            f"{timing.median_s * 1e3:>9.1f} ms{'-' if timing.spread is None else f'{timing.spread:.0%}':>8}"
            for timing in (point.unpadded, point.padded)
        ]
        lines.append(
            f"{point.mix:<11}{point.num_tokens:>8}{point.num_padded:>11}{times[0]}{times[1]}"
            f"{point.speedup:>8.2f}x{point.loss_difference:>10.1e}{point.gradient_difference:>10.1e}"
        )
    lines += [
        "",
        "sentences   one sentence on each side, as in the paper; filled: whole sentences up to 128 tokens",
        "loss        relative difference of the two losses; gradient: of all gradients, relative to their norm",
    ]
    return "\n".join(lines)


def write_model_report(report: ModelReport, directory: Path) -> list[Path]:
    """Write model.json and model.txt; returns the files."""
    return write_texts(
        {"model.json": json.dumps(report.to_dict(), indent=1), "model.txt": model_as_text(report)}, directory
    )
