"""A fine-tuned model on GLUE's dev rows, and its predictions for the GLUE server.

The server takes one TSV per test set, `index` and `prediction` in each: class names where the files have names, STS-B's
scores with three decimals.

    scores = score_glue_model(model, tokenizer, glue_task("rte"), "glue/")       # {"dev": GlueScores}
    paths = write_submission(model, tokenizer, glue_task("rte"), "glue/", Path("submission"))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.data.glue import has_split, load_glue
from cottention.data.glue_batches import GlueCollator, encode_glue, packs_best
from cottention.data.glue_tasks import DIAGNOSTIC, GLUE_TASKS, GlueTask
from cottention.errors import DataError, SettingsError
from cottention.evaluation.glue import GlueScores, glue_logits, glue_scores, predictions_of
from cottention.files import one_line, write_text
from cottention.locks import sole_writer
from cottention.logging import get_logger

_SUFFIXES = {"test_matched": "-m", "test_mismatched": "-mm"}

logger = get_logger(__name__)


def score_glue_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: GlueTask,
    data: str | Path,
    *,
    max_length: int = 128,
    batch_size: int = 64,
    show_progress: bool = False,
) -> dict[str, GlueScores]:
    """Score a classifier on every labelled split that is there.

    Args:
        model: fine-tuned on the task.
        tokenizer: its own.
        task: whose rows and metrics.
        data: GLUE's folder, the task's own, or "hub".
        max_length: tokens of a row at most.
        batch_size: rows read together; the result does not depend on it.
        show_progress: a bar on stderr.

    Raises:
        SettingsError: the model has another number of outputs than the task.
        DataError: the first split is missing, or a file is wrong.
    """
    check_outputs(model, task)
    splits = [name for name in task.dev_splits if name == task.dev_splits[0] or has_split(task, data, name)]
    scores = {}
    for split in splits:
        rows = load_glue(task, data, split)
        logits = _logits(model, tokenizer, rows, max_length, batch_size, show_progress)
        scores[split] = glue_scores(task, predictions_of(task, logits), np.asarray(rows["label"]))
    for split in task.dev_splits:
        if split not in scores:
            logger.warning("%s: %s is absent from %s, so it is not measured", task.title, split, data)
    return scores


def write_submission(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: GlueTask,
    data: str | Path,
    folder: Path,
    *,
    max_length: int = 128,
    batch_size: int = 64,
) -> list[Path]:
    """Write the predictions for every test split that is there; for MNLI those for the diagnostic set too.

    Args:
        model: fine-tuned on the task.
        tokenizer: its own.
        task: whose test rows.
        data: GLUE's folder, the task's own, or "hub".
        folder: gets CoLA.tsv and its kind; made when missing.
        max_length: tokens of a row at most.
        batch_size: rows read together; the result does not depend on it.

    Returns:
        The files written; none when there are no test rows, which is logged.

    Raises:
        SettingsError: the model has another number of outputs than the task.
        DataError: a file is wrong.
    """
    check_outputs(model, task)
    tests = [(task, split) for split in task.test_splits]
    if task.name == "mnli":
        tests += [(DIAGNOSTIC, split) for split in DIAGNOSTIC.test_splits]
    written = []
    for which, split in tests:
        title = f"{which.title}{_SUFFIXES.get(split, '')}"
        if not has_split(which, data, split):
            logger.warning("%s: no test rows in %s, so nothing is written for the server", title, data)
            continue
        rows = load_glue(which, data, split)
        predictions = predictions_of(which, _logits(model, tokenizer, rows, max_length, batch_size, False))
        lines = [f"{index}\t{_shown(which, value)}\n" for index, value in zip(rows["index"], predictions, strict=True)]
        path = folder / f"{title}.tsv"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, "index\tprediction\n" + "".join(lines))
        except OSError as error:
            raise DataError(f"cannot write {path}: {one_line(error)}") from error
        written.append(path)
    return written


@contextmanager
def submission_folder(folder: Path) -> Iterator[None]:
    """Be the only one who writes predictions into a folder, before any are made.

    Raises:
        DataError: it holds something else than predictions, or cannot be written.
        InUseError: another process writes there.
    """
    with ExitStack() as held:
        try:
            held.enter_context(sole_writer(folder))
        except OSError as error:
            raise DataError(f"cannot write {folder}: {one_line(error)}") from error
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        titles = {task.title for task in (*GLUE_TASKS.values(), DIAGNOSTIC)}
        if names and not any(name.endswith(".tsv") and name[:-4].rstrip("m").rstrip("-") in titles for name in names):
            raise DataError(f"{folder} holds {names[0]} but no predictions; choose another folder")
        yield


def check_outputs(model: PreTrainedModel, task: GlueTask) -> None:
    """Refuse a model of another task.

    Raises:
        SettingsError: its number of outputs differs.
    """
    if model.config.num_labels != task.num_labels:
        raise SettingsError(f"{task.title} needs a model with {task.num_labels} outputs; got {model.config.num_labels}")


def _logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    max_length: int,
    batch_size: int,
    show_progress: bool,
) -> np.ndarray:
    limit = model.config.longest_text
    if limit is not None and max_length > limit:
        raise SettingsError(f"max_length must be at most the model's {limit} positions; got {max_length}")
    encoded = encode_glue(rows, tokenizer, max_length)
    if encoded.num_cut:
        logger.warning("%d of %d rows are longer than %d tokens and were cut", encoded.num_cut, len(rows), max_length)
    collator = GlueCollator(
        pad_token_id=tokenizer.pad_token_id or 0,  # pyright: ignore[reportArgumentType]
        packed=packs_best(model.config.attention_type, torch.device(model.device)),
        num_token_types=model.config.type_vocab_size,
    )
    return glue_logits(model, encoded.rows, collator, batch_size=batch_size, show_progress=show_progress)


def _shown(task: GlueTask, value: float) -> str:
    # Scores are from 0 to 5, which a regression may overstep.
    return f"{min(max(value, 0.0), 5.0):.3f}" if task.is_regression else task.classes[int(value)]
