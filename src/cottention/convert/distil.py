"""Distillation of a converted model: a short training on text after which cosine attention does what softmax did.

Softmax weights under cosine attention compute another function; taught on some text, they come near the source's, and
further training starts from there. The model is scored on text that it was not taught on, before and after.

    settings = DistillationSettings(text=("books/",), steps=200)
    report = distil(source, model, tokenizer, "bert", settings, has_head=True)
    print(report.before.loss, report.after.loss, report.source.loss)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.convert.configs import Architecture
from cottention.convert.distil_report import DistillationReport
from cottention.convert.distil_scores import score_copy, score_source
from cottention.convert.distil_text import prepare_text, training_batches
from cottention.convert.distil_train import teach_attention, teach_whole
from cottention.errors import SettingsError
from cottention.models.configuration import check_number, check_size


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """How much to teach, and on what."""

    text: tuple[str, ...]
    """Files, folders or patterns, as `load_corpus` takes them."""
    held_out: tuple[str, ...] = ()
    """Text of the scores; empty: the end of `text`, a tenth of it but at most 100,000 characters."""
    steps: int = 200
    """Updates of the first phase, each layer's attention by itself; 0 leaves it out."""
    end_to_end_steps: int = 0
    """Updates of the second phase, the model as a whole."""
    window: int = 128
    """Tokens of a row."""
    batch_size: int = 16
    """Whole rows' worth of tokens in an update."""
    learning_rate: float = 3e-3
    """Highest rate of the first phase."""
    end_to_end_learning_rate: float = 5e-4
    """Highest rate of the second phase."""
    seed: int = 0
    """Of the order of the text and of the masked tokens that are scored."""

    def __post_init__(self) -> None:
        if not self.text:
            raise SettingsError("a distillation needs text; got none")
        for name, minimum in (("steps", 0), ("end_to_end_steps", 0), ("window", 4), ("batch_size", 1), ("seed", 0)):
            check_size(name, getattr(self, name), minimum)
        for name in ("learning_rate", "end_to_end_learning_rate"):
            check_number(name, getattr(self, name), minimum=0)


def check_window(window: int, config: object) -> None:
    """Refuse rows that the softmax source has no positions for.

    Raises:
        SettingsError: they are too long.
    """
    limit = getattr(config, "max_position_embeddings")  # noqa: B009  (GPT's n_positions has this name too)
    if window > limit:
        raise SettingsError(f"window must be at most the {limit} positions of the source; got {window}")


def distil(
    source: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
    settings: DistillationSettings,
    *,
    has_head: bool,
    show_progress: bool = False,
) -> DistillationReport:
    """Teach `model`, in place, what `source` does.

    Args:
        source: the softmax model, in evaluation mode; left as it is.
        model: its cosine copy, in evaluation mode, on the same device; both in float32.
        tokenizer: of both.
        architecture: of both.
        settings: how much to teach, and on what.
        has_head: whether the vocabulary's head is trained, so that a loss means something.
        show_progress: show bars on stderr.

    Returns:
        Settings and scores.

    Raises:
        SettingsError: a window is too long, or the tokenizer lacks a special token.
        DataError: there is no text, or too little.
        CottentionError: the loss is no number any more.
    """
    check_window(settings.window, source.config)
    text = prepare_text(settings.text, settings.held_out or None, tokenizer, architecture, settings.window)
    options: dict[str, Any] = {
        "has_head": has_head,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "show_progress": show_progress,
    }
    before = score_copy(source, model, tokenizer, text, settings.window, **options)
    num_trained = _teach(
        source, model, text.train, architecture, settings, has_head=has_head, show_progress=show_progress
    )
    return DistillationReport(
        steps=settings.steps,
        end_to_end_steps=settings.end_to_end_steps,
        window=settings.window,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        end_to_end_learning_rate=settings.end_to_end_learning_rate,
        seed=settings.seed,
        num_trained=num_trained,
        num_train_windows=len(text.train),
        num_held_out_windows=len(text.held_out),
        source=score_source(source, tokenizer, text, settings.window, **options),
        before=before,
        after=score_copy(source, model, tokenizer, text, settings.window, **options) if num_trained else None,
    )


def _teach(
    source: PreTrainedModel,
    model: PreTrainedModel,
    windows: Dataset,
    architecture: Architecture,
    settings: DistillationSettings,
    *,
    has_head: bool,
    show_progress: bool,
) -> int:
    """Run both phases; returns how many numbers they trained."""

    def batches(phase: int, steps: int) -> Iterator[dict[str, Tensor]]:
        seed = settings.seed + phase
        return training_batches(windows, architecture, batch_size=settings.batch_size, steps=steps, seed=seed)

    trained: dict[str, nn.Parameter] = {}
    if settings.steps:
        trained |= teach_attention(
            source,
            model,
            batches(0, settings.steps),
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            show_progress=show_progress,
        )
    if settings.end_to_end_steps:
        trained |= teach_whole(
            source,
            model,
            batches(1, settings.end_to_end_steps),
            steps=settings.end_to_end_steps,
            learning_rate=settings.end_to_end_learning_rate,
            has_head=has_head,
            show_progress=show_progress,
        )
    return sum(parameter.numel() for parameter in trained.values())
