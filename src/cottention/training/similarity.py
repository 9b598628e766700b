"""Fine-tunes a BERT so that the cosine of two texts' vectors says how alike they are: for `embed` and `search`.

With a number beside each pair (as STS-B has), the cosine is to be that number, scaled from the smallest and the largest
of the training rows to 0 and 1. Without, each text is to be nearer to its own partner than to those of the other pairs
in its batch (in both directions), so larger batches teach more; partners that are equal are not set against each other.
The vectors are those of `embed`: the mean of the last layer.

    rows = OwnData(data="pairs.tsv", text_column="question", text_pair_column="answer")
    result = finetune_similarity("runs/bert/model", rows, output_dir="runs/vectors")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from cottention.data.arrow_cache import cached_map, fingerprint_of
from cottention.data.glue_batches import GlueCollator
from cottention.data.label_batches import with_text_ends
from cottention.data.labelled import Labels, held_out_rows, hold_out, labels_of, read_labelled, with_labels
from cottention.errors import DataError, SettingsError
from cottention.evaluation.glue import correlations
from cottention.generation import load_model_and_tokenizer
from cottention.generation.sentences import mean_of_tokens
from cottention.logging import get_logger
from cottention.models import CottentionBertModel
from cottention.training.finetune_settings import FinetuneSettings
from cottention.training.finetune_trainer import FinetuneTrainer
from cottention.training.finetuning import FinetuneResult, FinetuneRun, SeedRuns, check_max_length, train_seeds
from cottention.training.own_data import OwnData
from cottention.training.processes import to_device

_VERSION = 1  # part of the cache key: raise it when the same rows shall give other tokens
_SPLIT_SEED = 0  # one split for all seeds, which are compared by it
_TEMPERATURE = 0.05  # of cosines, whose softmax would be flat otherwise; as in SimCSE (arXiv 2104.08821)
_BATCH = 64
_ROWS_PER_BATCH = 200

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class SimilarityTask:
    """What is learned."""

    title: str
    """As in the log."""
    scale: tuple[float, float] | None
    """The numbers that stand for a cosine of 0 and of 1; None: there are none, and partners are told apart."""


def finetune_similarity(
    model: str | Path,
    rows: OwnData,
    *,
    output_dir: str | Path,
    settings: FinetuneSettings | None = None,
    seeds: Sequence[int] = (0,),
    overwrite: bool = False,
) -> FinetuneResult:
    """Fine-tune.

    Args:
        model: a directory with a BERT of ours, or its name on the Hub.
        rows: pairs of texts, with one label_column of numbers or none.
        output_dir: the run's directory.
        settings: None: the defaults.
        seeds: one training each.
        overwrite: delete the run that is there and start again.

    Raises:
        SettingsError, CheckpointError, DataError, NonFiniteLossError: as for `finetune_labels`.
    """
    run = similarity_run(model, rows, output_dir=output_dir, settings=settings or FinetuneSettings())
    return train_seeds(run, seeds=seeds, overwrite=overwrite)


def similarity_run(
    model: str | Path, rows: OwnData, *, output_dir: str | Path, settings: FinetuneSettings
) -> FinetuneRun:
    """The run of `finetune_similarity`, with its arguments and errors."""
    if rows.text_pair_column is None:
        raise SettingsError("--objective similarity needs --text-pair-column: it learns from pairs of texts")
    if len(rows.label_column) > 1 or rows.label_type not in ("auto", "number") or rows.label_separator is not None:
        raise SettingsError("--objective similarity takes one --label-column of numbers, or none")
    return FinetuneRun(
        run_dir=Path(output_dir),
        content={"model": str(model), "objective": "similarity", **rows.as_dict(), **settings.as_dict()},
        prepare=lambda: _prepared(model, rows, settings),
    )


def _prepared(model: str | Path, rows: OwnData, settings: FinetuneSettings) -> SeedRuns:
    base, tokenizer = load_model_and_tokenizer(model, "encoder", device="cpu", dtype=torch.float32)
    check_max_length(settings.max_length, base.config.longest_text)
    tokenizer = with_text_ends(tokenizer)
    parts, labels = _split(rows, settings)
    limits = {"train": settings.train_limit, "dev": settings.dev_limit}
    encoded = {
        name: _encoded(part.select(range(min(len(part), limits[name] or len(part)))), tokenizer, settings)
        for name, part in parts.items()
    }
    num_cut = {name: int(np.sum(part["was_cut"])) for name, part in encoded.items()}
    for name, count in num_cut.items():
        if count:
            logger.warning(
                "%s: of %d of %d pairs a text is longer than %d tokens and was cut; --max-length takes more",
                name,
                count,
                len(encoded[name]),
                settings.max_length,
            )
    given = np.asarray(encoded["train"]["label"]) if labels is not None else None
    scale = None if given is None else (float(given.min()), float(given.max()))
    task = SimilarityTask(title=Path(rows.data).name, scale=scale)

    def trainer(seed: int, seed_dir: Path) -> SimilarityTrainer:
        return SimilarityTrainer(
            _encoder(model, seed=seed, from_scratch=settings.from_scratch),
            tokenizer,
            task=task,
            train=encoded["train"],
            dev={"dev": encoded["dev"]},
            settings=settings,
            seed=seed,
            run_dir=seed_dir,
        )

    description = {
        "attention_type": base.config.attention_type,
        "scale": scale,
        "num_rows": {name: len(part) for name, part in encoded.items()},
        "num_cut": num_cut,
    }
    return SeedRuns(title=task.title, description=description, trainer=trainer)


def _encoder(source: str | Path, *, seed: int, from_scratch: bool) -> CottentionBertModel:
    """The BERT without its pooler, which would not be trained."""
    set_seed(seed)
    base, _ = load_model_and_tokenizer(source, "encoder", device="cpu", dtype=torch.float32)
    set_seed(seed)  # reading may have drawn numbers
    encoder = CottentionBertModel(base.config, add_pooling_layer=False)  # pyright: ignore[reportArgumentType]
    if not from_scratch:
        own = encoder.state_dict()
        encoder.load_state_dict({name: x for name, x in base.state_dict().items() if name in own})
    return encoder


def _split(rows: OwnData, settings: FinetuneSettings) -> tuple[dict[str, Dataset], Labels | None]:
    def read(path: str) -> Dataset:
        return read_labelled(
            path,
            text=rows.texts[0],
            text_pair=rows.text_pair_column,
            label=rows.label_column,
            skip_malformed=settings.skip_malformed,
        )

    train, labels = read(rows.data), None
    if rows.label_column:
        labels = labels_of(train, rows.data, kind="number", label=rows.label_column, listed=False)
    dev_path = rows.dev or rows.data
    if rows.dev is not None:
        dev = read(rows.dev)
    elif labels is not None:
        train, dev = hold_out(train, labels, share=rows.dev_share, seed=_SPLIT_SEED)
    else:
        held = held_out_rows(np.zeros(len(train), dtype=np.int64), share=rows.dev_share, seed=_SPLIT_SEED)
        train, dev = train.select(np.setdiff1d(np.arange(len(train)), held)), train.select(held)
    if rows.dev is None:
        total = len(train) + len(dev)
        logger.info("no --dev: %d of %d pairs (seed %d) are held out to measure on", len(dev), total, _SPLIT_SEED)
    if min(len(train), len(dev)) < 2:
        raise DataError(f"{len(train)} pairs to train on and {len(dev)} to measure on are too few")
    parts = {"train": (train, rows.data), "dev": (dev, dev_path)}
    if labels is None:
        return {name: part for name, (part, _) in parts.items()}, None
    return {name: with_labels(part, labels, path) for name, (part, path) in parts.items()}, labels


def _encoded(rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: FinetuneSettings) -> Dataset:
    features = {"first": List(Value("int32")), "second": List(Value("int32")), "was_cut": Value("bool")}
    if "label" in rows.column_names:
        features["label"] = Value("float64")
    backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009  # the base class does not declare it
    backend.no_truncation()
    key = ["pair tokens", _VERSION, fingerprint_of(rows), backend.to_str(), settings.max_length]
    work = _Encode(tokenizer, settings.max_length)
    encoded = cached_map(rows, work, Features(features), key=key, batch_size=_ROWS_PER_BATCH)
    backend.no_truncation()
    backend.no_padding()
    return encoded


class _Encode:
    """The step of `cached_map`: each text of a pair alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, Sequence[Any]]:
        found: list[Any] = [
            self.tokenizer(batch[name], truncation=True, max_length=self.max_length, verbose=False)
            for name in ("first", "second")
        ]
        cut = [[bool(encoding.overflowing) for encoding in each.encodings] for each in found]
        return {
            "first": found[0]["input_ids"],
            "second": found[1]["input_ids"],
            "was_cut": [any(both) for both in zip(*cut, strict=True)],
            "label": batch.get("label", ()),
        }


class PairCollator(GlueCollator):
    """Joins pairs to {"first": batch, "second": batch}, with "scores" or, without any, "same": equal partners."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join."""
        both = {}
        for name in ("first", "second"):
            texts = [{"input_ids": row[name], "num_first": len(row[name])} for row in rows]
            both[name] = super().__call__(texts)
        if "label" in rows[0]:
            return {**both, "scores": torch.tensor([row["label"] for row in rows], dtype=torch.float32)}
        partners = [tuple(row["second"]) for row in rows]
        same = [[one == other and at != by for by, other in enumerate(partners)] for at, one in enumerate(partners)]
        return {**both, "same": torch.tensor(same)}


class SimilarityTrainer(FinetuneTrainer):
    """One seed of a `SimilarityTask`."""

    fields: ClassVar[tuple[str, ...]] = ("first", "second", "label")
    task: SimilarityTask

    def make_collator(self, **options: Any) -> PairCollator:
        """What joins pairs; means are taken over rows, so they are padded."""
        return PairCollator(**{**options, "packed": False})

    def compute_loss(self, model: nn.Module, batch: Any, num_targets: Tensor | None) -> Tensor:
        """Loss of one batch of pairs."""
        with torch.autocast(**self.autocast):
            first, second = (
                normalize(mean_of_tokens(cast(PreTrainedModel, model), batch[name]), dim=-1)
                for name in ("first", "second")
            )
        return similarity_loss(first, second, self.task.scale, batch.get("scores"), batch.get("same"))

    def measured(self, rows: Dataset) -> dict[str, Any]:
        """Correlation of cosines and numbers; or how often a text's own partner is the nearest of all."""
        first, second = self._vectors(rows)
        if self.task.scale is not None:
            found = correlations((first * second).sum(1), np.asarray(rows["label"]))
            official = {"spearman": found["spearman"], "pearson": found["pearson"]}
            return {"main": found["spearman"], "official": official, "num_rows": len(rows)}
        own = (first * second).sum(1) + 1e-6  # partners that are equal are no nearer
        starts = range(0, len(first), _BATCH)
        nearer = [(first[at : at + _BATCH] @ second.T > own[at : at + _BATCH, None]).sum(1) for at in starts]
        ranks = np.concatenate(nearer)
        official = {"reciprocal_rank": float((1 / (1 + ranks)).mean()), "nearest_is_right": float((ranks == 0).mean())}
        return {"main": official["reciprocal_rank"], "official": official, "num_rows": len(rows)}

    @torch.inference_mode()
    def _vectors(self, rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors `[N, D]` of the first and of the second texts."""
        model = self.model
        was_training = model.training
        model.eval()
        found: dict[str, list[Tensor]] = {"first": [], "second": []}
        try:
            for start in range(0, len(rows), _BATCH):
                picked = rows.select(range(start, min(start + _BATCH, len(rows)))).to_list()
                batch = to_device(self.collator(picked), model.device)
                with torch.autocast(**self.autocast):
                    for name, vectors in found.items():
                        vectors.append(normalize(mean_of_tokens(model, batch[name]), dim=-1).cpu())
        finally:
            model.train(was_training)
        first, second = (torch.cat(vectors).numpy() for vectors in found.values())
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            self.stop_at("output", self.state.global_step)
        return first, second


def similarity_loss(
    first: Tensor, second: Tensor, scale: tuple[float, float] | None, scores: Tensor | None, same: Tensor | None
) -> Tensor:
    """Loss of pairs of unit vectors `[B, D]`.

    Args:
        first: of the first texts.
        second: of their partners.
        scale: the numbers for cosines of 0 and 1; None: partners are told apart.
        scores: `[B]` numbers.
        same: `[B, B]`, pairs whose partners are equal, which are not set against each other.
    """
    if scale is not None:
        assert scores is not None
        low, high = scale
        return mse_loss((first * second).sum(-1), (scores - low) / (high - low))
    cosines = first @ second.T / _TEMPERATURE  # [B, B]
    if same is not None:
        cosines = cosines.masked_fill(same, float("-inf"))
    own = torch.arange(len(first), device=first.device)
    return (cross_entropy(cosines, own) + cross_entropy(cosines.T, own)) / 2
