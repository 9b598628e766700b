"""Whole models beside each other: cosine, its softmax twin, and transformers' own, forward and a whole training step.

The twin has the stock model's weights by name, so that both must have one loss and one gradient, which is checked
before anything is timed. All see the same rows, as many tokens at every length.

    points = measure_twins(ModelSettings(arch="gpt", lengths=(128, 1024)))
    lines = twins_as_lines(points)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cottention.benchmarks.check import WrongResultError
from cottention.benchmarks.measure import Key, Timing, time_interleaved
from cottention.benchmarks.settings import PAIR_LENGTHS, ModelSettings
from cottention.benchmarks.units import duration
from cottention.files import IGNORE_INDEX
from cottention.models import (
    CottentionBertConfig,
    CottentionBertForPreTraining,
    CottentionGPTConfig,
    CottentionGPTForCausalLM,
)
from cottention.training.optimizer import build_optimizer
from cottention.training.recipe_sections import OptimizerSettings

STOCK = "transformers"
"""The name of the stock model among the twins."""

LONGEST_PAIR = max(map(max, PAIR_LENGTHS.values()))
"""Tokens; rows of other lengths hold as many tokens in all as a batch of such pairs."""

# Relative, as between packed and padded rows: the same numbers summed in another order.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
_MASKED_SHARE = 0.15

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TwinPoint:
    """One model on rows of one length, forward alone or a whole step."""

    name: str
    passes: str
    """"forward" (no gradients) or "step": forward, loss, backward, AdamW."""
    length: int
    num_rows: int
    timing: Timing

    @property
    def tokens_per_s(self) -> float:
        """Of all rows."""
        return self.length * self.num_rows / self.timing.median_s


def new_model(settings: ModelSettings, attention_type: str) -> Any:
    """Our model of these sizes, in training mode, without dropout: the same weights for the same seed."""
    torch.manual_seed(settings.seed)
    longest = max(LONGEST_PAIR, *settings.lengths)
    if settings.arch == "gpt":
        model: Any = CottentionGPTForCausalLM(
            CottentionGPTConfig(
                attention_type=attention_type,
                vocab_size=settings.vocab_size,
                n_embd=settings.hidden_size,
                n_layer=settings.num_layers,
                n_head=settings.num_heads,
                n_positions=longest,
            )
        )
    else:
        model = CottentionBertForPreTraining(
            CottentionBertConfig(
                attention_type=attention_type,
                vocab_size=settings.vocab_size,
                hidden_size=settings.hidden_size,
                num_hidden_layers=settings.num_layers,
                num_attention_heads=settings.num_heads,
                intermediate_size=4 * settings.hidden_size,
                max_position_embeddings=longest,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                sparse_prediction=True,
            )
        )
    return model.to(settings.device).train()


def _stock_model(settings: ModelSettings, twin: Any) -> Any:
    """transformers' model with the weights of our softmax twin."""
    from transformers import BertConfig, BertForPreTraining, GPTJConfig, GPTJForCausalLM  # seconds, for this alone

    config = twin.config
    if settings.arch == "gpt":
        names = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "activation_function")
        stock: Any = GPTJForCausalLM(
            GPTJConfig(
                **{name: getattr(config, name) for name in names},
                rotary_dim=config.turned_dims,
                layer_norm_epsilon=config.layer_norm_epsilon,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    else:
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        more = ("max_position_embeddings", "layer_norm_eps", "hidden_act")
        stock = BertForPreTraining(
            BertConfig(
                **{name: getattr(config, name) for name in (*names, *more)},
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
    stock.load_state_dict(twin.state_dict())
    return stock.to(settings.device).train()


def training_step(model: Any, batch: Batch, settings: ModelSettings) -> Callable[[], object]:
    """A training step as something to time."""
    optimizer = build_optimizer(model, OptimizerSettings())

    def step() -> None:
        with _autocast(settings):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss_and_gradients(model: Any, batch: Batch) -> tuple[float, Tensor]:
    """The loss in float32, and all gradients end to end, by name."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), torch.cat([gradients[name] for name in sorted(gradients)])


def refuse_different(what: str, found: tuple[float, Tensor], exact: tuple[float, Tensor]) -> tuple[float, float]:
    """The relative differences of losses and of gradients.

    Raises:
        WrongResultError: one of them is more than rounding.
    """
    loss_difference = abs(found[0] - exact[0]) / abs(exact[0])
    gradient_difference = float((found[1] - exact[1]).norm() / exact[1].norm())
    for name, difference, tolerance in (
        ("loss", loss_difference, LOSS_TOLERANCE),
        ("gradient", gradient_difference, GRADIENT_TOLERANCE),
    ):
        if not difference < tolerance:
            raise WrongResultError(
                f"{what} must have the same {name} to {tolerance:.0e}; they differ by {difference:.1e}"
            )
    return loss_difference, gradient_difference


def measure_twins(settings: ModelSettings) -> list[TwinPoint]:
    """Time the three models at every length.

    Raises:
        WrongResultError: the softmax twin and transformers' model differ; nothing is reported.
    """
    points = []
    for length in settings.lengths:
        batch = _rows(length, settings)
        twin = new_model(settings, "softmax")
        models = {
            "cosine": new_model(settings, "cosine"),
            "softmax": twin,
            STOCK: _stock_model(settings, twin),
        }
        refuse_different(
            "the softmax twin and transformers' model",
            loss_and_gradients(twin, batch),
            loss_and_gradients(models[STOCK], batch),
        )
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        for name, model in models.items():
            calls["forward", name] = _forward(model, batch, settings)
            calls["step", name] = training_step(model, batch, settings)
        timings = time_models(calls, settings)
        points += [
            TwinPoint(name=name, passes=passes, length=length, num_rows=len(batch["input_ids"]), timing=timing)
            for (passes, name), timing in sorted(timings.items(), key=lambda item: item[0][0])
        ]
    return points


def time_models(calls: Mapping[Key, Callable[[], object]], settings: ModelSettings) -> dict[Key, Timing]:
    """Time calls of models interleaved, as the settings say."""
    return time_interleaved(
        calls,
        settings.device,
        repeats=settings.repeats,
        time_limit_s=settings.time_limit_s,
        processor_time=settings.processor_time,
    )


def _rows(length: int, settings: ModelSettings) -> Batch:
    """Rows of random tokens without padding, with labels for all heads of the model."""
    source = torch.Generator().manual_seed(settings.seed)
    num_rows = max(1, settings.batch_size * LONGEST_PAIR // length)
    ids = torch.randint(0, settings.vocab_size, (num_rows, length), generator=source)
    batch = {"input_ids": ids, "labels": ids}
    if settings.arch == "bert":
        is_target = torch.rand(ids.shape, generator=source) < _MASKED_SHARE
        is_target[:, 0] = True
        batch["labels"] = ids.where(is_target, IGNORE_INDEX)
        batch["next_sentence_label"] = torch.randint(0, 2, (num_rows,), generator=source)
    return {name: tensor.to(settings.device) for name, tensor in batch.items()}


def _forward(model: Any, batch: Batch, settings: ModelSettings) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad(), _autocast(settings):
            return model(input_ids=batch["input_ids"])

    return forward


def _autocast(settings: ModelSettings) -> torch.autocast:
    return torch.autocast(settings.device, dtype=torch.bfloat16, enabled=settings.dtype == "bfloat16")


def twins_as_lines(points: list[TwinPoint]) -> list[str]:
    """A row for each length and pass; nothing where nothing was measured."""
    if not points:
        return []
    names = tuple(dict.fromkeys(point.name for point in points))
    ratios = tuple(f"vs {name}" for name in names[1:])
    lines = [f"{'':<9}{'T':>6}{'rows':>6}" + "".join(f"{name:>14}{'spread':>8}" for name in names)]
    lines[0] += "".join(f"{ratio:>17}" for ratio in ratios)
    for length, passes in dict.fromkeys((point.length, point.passes) for point in points):
        row = {point.name: point for point in points if (point.length, point.passes) == (length, passes)}
        line = f"{passes:<9}{length:>6}{row[names[0]].num_rows:>6}"
        for point in row.values():
            spread = point.timing.spread
            line += f"{duration(point.timing.median_s):>14}{'-' if spread is None else f'{spread:.0%}':>8}"
        cosine = row[names[0]].timing.median_s
        lines.append(line + "".join(f"{row[name].timing.median_s / cosine:>16.2f}x" for name in names[1:]))
    return lines
