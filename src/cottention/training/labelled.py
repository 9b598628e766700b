"""Fine-tunes a BERT or a GPT on labels of one's own: classes, numbers, several labels to a text, or tags of words.

The directory is that of a run on GLUE (`finetuning.py`); the model's config keeps the labels' names, its tokenizer the
longest text. The same call goes on where a killed one stopped.

    rows = OwnData(data="train.csv", text_column="review", label_column=("stars",))
    result = finetune_labels("runs/bert/model", rows, output_dir="runs/stars")
    result.model_dir, result.metrics["labels"], result.metrics["best"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from cottention import models
from cottention.data.glue_batches import EncodedRows
from cottention.data.label_batches import encode_texts, encode_words, with_text_ends
from cottention.data.labelled import Labels, held_out_rows, hold_out, labels_of, read_labelled, with_labels
from cottention.data.tagged import read_tagged, tags_of, with_tags
from cottention.errors import DataError
from cottention.generation import load_model_and_tokenizer
from cottention.logging import get_logger
from cottention.training.finetune_settings import FinetuneSettings
from cottention.training.finetuning import FinetuneResult, FinetuneRun, SeedRuns, check_max_length, train_seeds
from cottention.training.labelled_trainer import LabelTask, LabelTrainer
from cottention.training.own_data import OwnData

_SPLIT_SEED = 0  # one split for all seeds, which are compared by it
_PROBLEMS = {"classes": "single_label_classification", "number": "regression", "several": "multi_label_classification"}

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Split:
    """Rows with labels as a model takes them, before they are tokens."""

    kind: str
    names: tuple[str, ...]
    train: Dataset
    dev: Dataset


def finetune_labels(
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
        model: a directory with a BERT or a GPT of ours, or its name on the Hub.
        rows: the data, and what of it is text and label.
        output_dir: the run's directory.
        settings: None: the defaults.
        seeds: one training each; of the head's initial weights, the order of rows, and dropout.
        overwrite: delete the run that is there and start again.

    Returns:
        Where the best model is, and all scores.

    Raises:
        SettingsError: the settings make no sense here, or the directory holds a run of others.
        CheckpointError: the model cannot be used, or the disk is full.
        DataError: a file cannot be used; one line with the row.
        NonFiniteLossError: the loss became infinite or NaN.
    """
    run = label_run(model, rows, output_dir=output_dir, settings=settings or FinetuneSettings())
    return train_seeds(run, seeds=seeds, overwrite=overwrite)


def label_run(model: str | Path, rows: OwnData, *, output_dir: str | Path, settings: FinetuneSettings) -> FinetuneRun:
    """The run of `finetune_labels`, with its arguments and errors."""
    rows.check_files()
    return FinetuneRun(
        run_dir=Path(output_dir),
        content={"model": str(model), **rows.as_dict(), **settings.as_dict()},
        prepare=lambda: _prepared(model, rows, settings),
    )


def build_labeller(source: str | Path, task: LabelTask, *, seed: int, from_scratch: bool = False) -> PreTrainedModel:
    """A classifier, regressor or tagger on a pretrained BERT or GPT.

    Args:
        source: the model's directory; a head that it has is not taken over.
        task: decides the outputs and the loss.
        seed: of the weights that are new.
        from_scratch: take the shape alone.

    Raises:
        CheckpointError: the directory cannot be used.
    """
    set_seed(seed)
    base, _ = load_model_and_tokenizer(source, "base", device="cpu", dtype=torch.float32)
    config: Any = base.config
    config.num_labels = len(task.names)
    config.id2label = dict(enumerate(task.names))
    config.label2id = {name: number for number, name in enumerate(task.names)}
    config.problem_type = _PROBLEMS.get(task.kind)
    family = "CottentionGPT" if config.model_type == "cottention-gpt" else "CottentionBert"
    what = "TokenClassification" if task.kind == "words" else "SequenceClassification"
    set_seed(seed)  # reading may have drawn numbers
    labeller = getattr(models, f"{family}For{what}")(config)
    if not from_scratch:
        own = labeller.base_model.state_dict()  # a tagger has no pooler
        labeller.base_model.load_state_dict({name: x for name, x in base.state_dict().items() if name in own})
    return labeller


def _prepared(model: str | Path, rows: OwnData, settings: FinetuneSettings) -> SeedRuns:
    # Opened before the data: a wrong directory shall not cost the time of reading.
    base, tokenizer = load_model_and_tokenizer(model, "base", device="cpu", dtype=torch.float32)
    check_max_length(settings.max_length, base.config.longest_text)
    split = _split(rows, settings)
    tokenizer = with_text_ends(tokenizer)
    tokenizer.model_max_length = settings.max_length  # is saved with the model: what reads with it cuts alike
    limits = {"train": settings.train_limit, "dev": settings.dev_limit}
    encoded = {
        name: _encoded(_limited(getattr(split, name), limits[name], name), tokenizer, split.kind, settings, name)
        for name in ("train", "dev")
    }
    task = LabelTask(title=Path(rows.data).name, kind=split.kind, names=split.names)

    def trainer(seed: int, seed_dir: Path) -> LabelTrainer:
        return LabelTrainer(
            build_labeller(model, task, seed=seed, from_scratch=settings.from_scratch),
            tokenizer,
            task=task,
            train=encoded["train"].rows,
            dev={"dev": encoded["dev"].rows},
            settings=settings,
            seed=seed,
            run_dir=seed_dir,
        )

    description = {
        "attention_type": base.config.attention_type,
        "labels": {"kind": split.kind, "names": list(split.names)},
        "num_rows": {name: len(found.rows) for name, found in encoded.items()},
        "num_cut": {name: found.num_cut for name, found in encoded.items()},
    }
    return SeedRuns(title=task.title, description=description, trainer=trainer)


def _split(rows: OwnData, settings: FinetuneSettings) -> _Split:
    if rows.of_words:
        return _tagged(rows, settings.skip_malformed)
    (text, *_), label = rows.texts, rows.labels

    def read(path: str) -> Dataset:
        return read_labelled(
            path,
            text=text,
            text_pair=rows.text_pair_column,
            label=label,
            separator=rows.label_separator,
            skip_malformed=settings.skip_malformed,
        )

    train = read(rows.data)
    listed = rows.label_separator is not None
    labels = labels_of(train, rows.data, kind=rows.label_type, label=label, listed=listed)
    logger.info("%s: %d rows with %s", rows.data, len(train), labels.described())
    if labels.kind == "classes" and rows.label_type == "auto" and all(map(_is_number, labels.names)):
        logger.info("--label-type number learns them as numbers instead")
    if rows.dev is not None:
        dev = read(rows.dev)
        return _made(labels, train, dev, rows.data, rows.dev)
    train, dev = hold_out(train, labels, share=rows.dev_share, seed=_SPLIT_SEED)
    _tell_share(len(dev), len(train) + len(dev), "with each label's share in both")
    return _made(labels, train, dev, rows.data, rows.data)


def _made(labels: Labels, train: Dataset, dev: Dataset, data: str, dev_path: str) -> _Split:
    return _Split(
        kind=labels.kind,
        names=labels.names,
        train=with_labels(train, labels, data),
        dev=with_labels(dev, labels, dev_path),
    )


def _tagged(rows: OwnData, skip_malformed: bool) -> _Split:
    (words,), (tags,) = rows.texts, rows.labels
    train = read_tagged(rows.data, words=words, tags=tags, skip_malformed=skip_malformed)
    names = tags_of(train, rows.data)
    logger.info("%s: %d texts with %d tags to their words", rows.data, len(train), len(names))
    dev_path = rows.dev or rows.data
    if rows.dev is not None:
        dev = read_tagged(rows.dev, words=words, tags=tags, skip_malformed=skip_malformed)
    else:
        held = held_out_rows(np.zeros(len(train), dtype=np.int64), share=rows.dev_share, seed=_SPLIT_SEED)
        if not len(held):
            raise DataError(f"{len(train)} texts are too few to hold some out; give others with --dev")
        train, dev = train.select(np.setdiff1d(np.arange(len(train)), held)), train.select(held)
        _tell_share(len(dev), len(train) + len(dev), "drawn at random")
    return _Split(
        kind="words", names=names, train=with_tags(train, names, rows.data), dev=with_tags(dev, names, dev_path)
    )


def _tell_share(num_held: int, num_rows: int, how: str) -> None:
    logger.info(
        "no --dev: %d of %d rows (seed %d, %s) are held out to measure on", num_held, num_rows, _SPLIT_SEED, how
    )


def _limited(rows: Dataset, limit: int | None, name: str) -> Dataset:
    if limit is None or limit >= len(rows):
        return rows
    if name == "dev":
        return rows.select(range(limit))
    # Some files are sorted, by label for example: the first rows would be a task of their own.
    return rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:limit]))


def _encoded(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, kind: str, settings: FinetuneSettings, name: str
) -> EncodedRows:
    encoded = (encode_words if kind == "words" else encode_texts)(rows, tokenizer, settings.max_length)
    if encoded.num_cut:
        logger.warning(
            "%s: %d of %d rows are longer than %d tokens and were cut; --max-length takes more",
            name,
            encoded.num_cut,
            len(encoded.rows),
            settings.max_length,
        )
    return encoded


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True
