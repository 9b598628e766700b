"""Fine-tunes a pretrained BERT on a task of GLUE, once per seed; keeps the best epoch of the best seed.

    OUTPUT/TASK/settings.yaml     what the run is; another one in the same place is refused
    OUTPUT/TASK/metrics.json      every seed's and epoch's scores
    OUTPUT/TASK/model/            the best model, with its tokenizer
    OUTPUT/TASK/seed-N/           checkpoints of a seed that is not finished

The same call goes on where a killed one stopped, and trains only the seeds that are not done yet.

    result = finetune("runs/bert/model", task="cola", data="glue/", output_dir="runs/glue", seeds=[1, 2, 3])
    result.model_dir, result.metrics["best"]
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from cottention.data.glue import has_split, load_glue, task_folder
from cottention.data.glue_batches import encode_glue
from cottention.data.glue_tasks import GlueTask, glue_task
from cottention.errors import CheckpointError, SettingsError
from cottention.files import one_line
from cottention.generation import load_model_and_tokenizer
from cottention.json_files import read_json_object
from cottention.locks import LOCK, sole_writer
from cottention.logging import get_logger
from cottention.models import CottentionBertForSequenceClassification
from cottention.models.model_card import write_model_card
from cottention.seals import check_model, damage, is_intact_record, missing_parts, sealed_record
from cottention.training.checkpoints import atomic_directory, write_atomically, writing_to
from cottention.training.finetune_settings import FinetuneSettings
from cottention.training.finetune_trainer import FinetuneTrainer
from cottention.training.plain_yaml import read_yaml, shown

_SETTINGS, _METRICS = "settings.yaml", "metrics.json"
_FINISHED = "result.json"
_PLACES = ("model", "data", "dev")  # settings that name a file or a folder
_REMEDY = "choose another --output-dir, or --overwrite to start again"

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a run left behind."""

    run_dir: Path
    """The task's directory."""
    model_dir: Path | None
    """The best model; None when a signal stopped the run before its first seed was done."""
    metrics: dict[str, Any]
    """The content of metrics.json; empty when a signal stopped the run before its first seed was done."""
    stopped_by: signal.Signals | None = None
    """The signal that stopped the run."""

    @property
    def exit_code(self) -> int:
        """What a command that ran this returns: 0, or 128 and the signal's number as a shell has it."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """A task's rows as tokens."""

    train: Dataset
    dev: dict[str, Dataset]
    description: dict[str, Any]


def finetune(
    model: str | Path,
    *,
    task: str,
    data: str | Path,
    output_dir: str | Path,
    settings: FinetuneSettings | None = None,
    seeds: Sequence[int] = (0,),
    overwrite: bool = False,
) -> FinetuneResult:
    """Fine-tune.

    Args:
        model: a directory with a pretrained BERT of ours, or its name on the Hub.
        task: one of GLUE's, e.g. "cola".
        data: GLUE's folder, the task's own, or "hub".
        output_dir: the run goes to output_dir/task.
        settings: None: the published ones.
        seeds: one training each; of the head's initial weights, the order of rows, and dropout.
        overwrite: delete the run that is there and start again.

    Returns:
        Where the best model is, and all scores.

    Raises:
        SettingsError: no such task, or the directory holds a run of other settings.
        CheckpointError: the model cannot be used, or the disk is full.
        DataError: the task's files cannot be used.
        NonFiniteLossError: the loss became infinite or NaN.
    """
    run = task_run(model, task=task, data=data, output_dir=output_dir, settings=settings or FinetuneSettings())
    return train_seeds(run, seeds=seeds, overwrite=overwrite)


@dataclass(frozen=True, kw_only=True)
class SeedRuns:
    """What the trainings of one run have in common."""

    title: str
    """Of the run, in the log."""
    description: dict[str, Any]
    """What metrics.json says of it beside the settings."""
    trainer: Callable[[int, Path], FinetuneTrainer]
    """Makes the training of a seed, in that seed's directory."""


@dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """A run before it begins: its choices are checked, nothing is opened."""

    run_dir: Path
    """Where it is written."""
    content: dict[str, Any]
    """What the run is, of plain types; another one in the same place is refused."""
    prepare: Callable[[], SeedRuns]
    """Opens model and data; what it raises leaves nothing behind."""


def task_run(
    model: str | Path, *, task: str, data: str | Path, output_dir: str | Path, settings: FinetuneSettings
) -> FinetuneRun:
    """The run of `finetune`, with its arguments and errors."""
    chosen = glue_task(task)
    if not has_split(chosen, data, "train"):
        task_folder(chosen, data)  # says what is missing; a folder without the file is told of when it is read
    return FinetuneRun(
        run_dir=Path(output_dir) / task,
        content={"model": str(model), "data": str(data), "task": task, **settings.as_dict()},
        prepare=lambda: _prepared(chosen, model, data, settings),
    )


def train_seeds(run: FinetuneRun, *, seeds: Sequence[int], overwrite: bool) -> FinetuneResult:
    """Train seed after seed in the run's directory, from where it stands; keep the best model.

    Args:
        run: what is trained, and where.
        seeds: one training each.
        overwrite: delete the run that is there and start again.
    """
    with opened(run, seeds=seeds, overwrite=overwrite) as (runs, continues):
        if not continues:  # only now: a mistake in model or data leaves nothing behind
            _claim(run.run_dir, run.content)
        metrics = _metrics_of(run.run_dir, {**run.content, **runs.description})
        return _train_seeds(run.run_dir, metrics, runs, seeds)


@contextmanager
def opened(run: FinetuneRun, *, seeds: Sequence[int], overwrite: bool) -> Iterator[tuple[SeedRuns, bool]]:
    """The run's trainings, and whether it goes on; nobody else writes its directory meanwhile, and it stays as it is.

    Args:
        run: to open.
        seeds: one training each.
        overwrite: whatever is there does not go on.
    """
    check_seeds(seeds)
    with ExitStack() as held:
        with writing_to(run.run_dir):
            held.enter_context(sole_writer(run.run_dir))
        continues = _continues(run.run_dir, run.content, overwrite=overwrite)
        yield run.prepare(), continues


def _train_seeds(run_dir: Path, metrics: dict[str, Any], runs: SeedRuns, seeds: Sequence[int]) -> FinetuneResult:
    for seed in seeds:
        if any(entry["seed"] == seed for entry in metrics["seeds"]):
            logger.info("%s, seed %d is done already", runs.title, seed)
            continue
        seed_dir = run_dir / f"seed-{seed}"
        if _finished_seed(seed_dir) is None:
            trainer = runs.trainer(seed, seed_dir)
            trainer.fit()
            stopped_by = trainer.run_control.stopped_by
            if stopped_by is not None:
                logger.info("stopped after step %d; the same command continues", trainer.state.global_step)
                return _result(run_dir, metrics, stopped_by)
            entry = {"seed": seed, "best_epoch": trainer.best_epoch, "epochs": trainer.epochs}
            with writing_to(seed_dir):
                write_atomically(seed_dir / _FINISHED, json.dumps(entry))
        metrics = _take_in(run_dir, seed_dir, metrics)
    return _result(run_dir, metrics, None)


def _prepared(task: GlueTask, model: str | Path, data: str | Path, settings: FinetuneSettings) -> SeedRuns:
    """A task of GLUE, opened."""
    # Opened before the data: a wrong directory shall not cost the time of tokenising.
    encoder, tokenizer = load_model_and_tokenizer(model, "encoder", device="cpu", dtype=torch.float32)
    check_max_length(settings.max_length, encoder.config.longest_text)
    rows = _read(task, data, tokenizer, settings)

    def trainer(seed: int, seed_dir: Path) -> FinetuneTrainer:
        return FinetuneTrainer(
            build_classifier(model, task, seed=seed, from_scratch=settings.from_scratch),
            tokenizer,
            task=task,
            train=rows.train,
            dev=rows.dev,
            settings=settings,
            seed=seed,
            run_dir=seed_dir,
        )

    description = {"attention_type": encoder.config.attention_type, **rows.description}
    return SeedRuns(title=task.title, description=description, trainer=trainer)


def check_max_length(max_length: int, limit: int | None) -> None:
    """Refuse texts that a model has no positions for.

    Raises:
        SettingsError: max_length is above the limit.
    """
    if limit is not None and max_length > limit:
        raise SettingsError(f"max_length must be at most the model's {limit} positions; got {max_length}")


def build_classifier(
    source: str | Path, task: GlueTask, *, seed: int, from_scratch: bool = False
) -> CottentionBertForSequenceClassification:
    """A classifier for a task on a pretrained BERT.

    Args:
        source: the BERT's directory; a head that it has is not taken over.
        task: decides the number of outputs and the loss.
        seed: of the weights that are new.
        from_scratch: take the shape alone.

    Raises:
        CheckpointError: the directory cannot be used.
    """
    set_seed(seed)
    encoder, _ = load_model_and_tokenizer(source, "encoder", device="cpu", dtype=torch.float32)
    config: Any = encoder.config
    config.num_labels = task.num_labels
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    if task.classes:
        config.id2label = dict(enumerate(task.classes))
        config.label2id = {name: number for number, name in enumerate(task.classes)}
    set_seed(seed)  # reading may have drawn numbers
    classifier = CottentionBertForSequenceClassification(config)
    if not from_scratch:
        classifier.bert.load_state_dict(encoder.state_dict())
    return classifier


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that are none, and several processes.

    Raises:
        SettingsError: they are negative or twice the same, or the process is one of several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError("fine-tuning runs in one process; got WORLD_SIZE above 1")
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise SettingsError(f"seeds must be different numbers from 0 up; got {', '.join(map(str, seeds)) or 'none'}")


def _read(task: GlueTask, data: str | Path, tokenizer: PreTrainedTokenizerBase, settings: FinetuneSettings) -> _Rows:
    splits = {"train": load_glue(task, data, "train", skip_malformed=settings.skip_malformed)}
    absent = []
    for name in task.dev_splits:
        # Only the first is needed to train; a second one may be missing, which every table will say.
        if name == task.dev_splits[0] or has_split(task, data, name):
            splits[name] = load_glue(task, data, name, skip_malformed=settings.skip_malformed)
        else:
            logger.warning("%s: %s is absent from %s, so it is not measured", task.title, name, data)
            absent.append(name)
    limits = {name: settings.train_limit if name == "train" else settings.dev_limit for name in splits}
    encoded = {
        name: encode_glue(_limited(rows, name, limits[name]), tokenizer, settings.max_length)
        for name, rows in splits.items()
    }
    for name, found in encoded.items():
        if found.num_cut:
            logger.warning(
                "%s %s: %d of %d rows are longer than %d tokens and were cut",
                task.title,
                name,
                found.num_cut,
                len(found.rows),
                settings.max_length,
            )
    return _Rows(
        train=encoded["train"].rows,
        dev={name: found.rows for name, found in encoded.items() if name != "train"},
        description={
            "num_rows": {name: len(found.rows) for name, found in encoded.items()},
            "num_cut": {name: found.num_cut for name, found in encoded.items()},
            "absent": absent,
        },
    )


def _limited(rows: Dataset, split: str, limit: int | None) -> Dataset:
    if limit is None or limit >= len(rows):
        return rows
    if split != "train":
        return rows.select(range(limit))
    # Some files are sorted, by source for example: the first rows would be a task of their own.
    return rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:limit]))


def _continues(run_dir: Path, content: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether the directory holds a run of these settings that goes on; changes nothing."""
    path = run_dir / _SETTINGS
    if not path.is_file():
        if run_dir.is_dir() and any(entry.name != LOCK for entry in run_dir.iterdir()):
            raise SettingsError(f"{run_dir} is not empty and holds no {_SETTINGS}; choose another --output-dir")
        return False
    if overwrite or not ((run_dir / _METRICS).is_file() or any(run_dir.glob("seed-*"))):
        return False
    try:
        there = read_yaml(path, str(path))
    except SettingsError as error:
        raise SettingsError(f"{path} is damaged: {one_line(error)}; {_REMEDY}") from error
    if not isinstance(there, dict):
        raise SettingsError(f"{path} is damaged: it holds no settings; {_REMEDY}")
    for name, value in content.items():
        if there.get(name) != value and not (name in _PLACES and _same_place(there.get(name), value)):
            raise SettingsError(
                f"{run_dir} holds a run of other settings: {name} ({shown(there.get(name))} there, {shown(value)} "
                f"now); {_REMEDY}"
            )
    return True


def _same_place(there: Any, now: str) -> bool:
    """Whether two names lead to one folder; a run may be gone on with from another working directory."""
    try:
        return Path(str(there)).expanduser().samefile(Path(now).expanduser())
    except OSError:
        return False


def _claim(run_dir: Path, content: dict[str, Any]) -> None:
    """Begin a run: delete what an earlier one left, write down the settings."""
    with writing_to(run_dir):
        for name in (_METRICS, "model", *(entry.name for entry in run_dir.glob("seed-*"))):
            _remove(run_dir / name)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / _SETTINGS, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _metrics_of(run_dir: Path, content: dict[str, Any]) -> dict[str, Any]:
    path = run_dir / _METRICS
    if not path.is_file():
        return {**content, "best": None, "seeds": []}
    found = read_json_object(path, error=SettingsError)
    if not is_intact_record(found):
        raise SettingsError(f"{path} was changed after it was written; {_REMEDY}")
    best, seeds = found.get("best"), found.get("seeds")
    if not isinstance(best, dict) or not isinstance(seeds, list) or not all(map(_is_entry, seeds)):
        raise SettingsError(f"{path} is damaged: it holds no scores; {_REMEDY}")
    lost = missing_parts(run_dir / "model")
    if lost:
        raise CheckpointError(f"{run_dir / 'model'} lacks {lost[0]}; {_REMEDY}")
    check_model(run_dir / "model", tokenizer=True, edits=False)
    return found


def _finished_seed(seed_dir: Path) -> dict[str, Any] | None:
    """The scores of a seed that is done, with its best model; None where it has to go on from its last checkpoint."""
    path = seed_dir / _FINISHED
    if not path.is_file():
        return None
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        entry = None
    problem = damage(seed_dir / "best") if _is_entry(entry) else f"{_FINISHED} cannot be read"
    if problem is None:
        return entry
    if problem.startswith(_FINISHED):  # the last checkpoint holds the same scores
        logger.warning("%s: %s; it is written again", seed_dir, problem)
        return None
    raise CheckpointError(f"{seed_dir / 'best'} is damaged ({problem}); remove {seed_dir} to train that seed again")


def _is_entry(entry: Any) -> bool:
    """Whether this is what a seed's training comes to."""
    if not isinstance(entry, dict) or not {"seed", "best_epoch", "epochs"} <= entry.keys():
        return False
    epochs, best = entry["epochs"], entry["best_epoch"]
    has_best = isinstance(epochs, list) and isinstance(best, int) and 1 <= best <= len(epochs)
    return has_best and all(isinstance(epoch, dict) and {"score", "epoch"} <= epoch.keys() for epoch in epochs)


def _take_in(run_dir: Path, seed_dir: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Add a finished seed to metrics.json, keep its model when it is the best, and remove its directory.

    Each step may be repeated: a run that is killed between two of them does them again.
    """
    entry = _finished_seed(seed_dir)
    assert entry is not None
    epoch = entry["epochs"][entry["best_epoch"] - 1]
    best = metrics["best"]
    with writing_to(run_dir):
        if best is None or epoch["score"] > best["score"]:
            best = {"seed": entry["seed"], "epoch": epoch["epoch"], "score": epoch["score"]}
            with atomic_directory(run_dir / "model", sealed=False) as staging:
                shutil.copytree(seed_dir / "best", staging, dirs_exist_ok=True)
                _write_card(staging, run_dir, epoch["splits"])
        metrics = sealed_record({**metrics, "best": best, "seeds": [*metrics["seeds"], entry]})
        write_atomically(run_dir / _METRICS, json.dumps(metrics, indent=2) + "\n")
        shutil.rmtree(seed_dir, ignore_errors=True)
    return metrics


def _write_card(model_dir: Path, run_dir: Path, splits: dict[str, dict[str, Any]]) -> None:
    settings = read_yaml(run_dir / _SETTINGS, str(run_dir / _SETTINGS))
    write_model_card(
        model_dir,
        metrics={
            name if len(splits) == 1 else f"{split} {name}": value
            for split, scores in splits.items()
            for name, value in scores["official"].items()
        },
        recipe=settings,
        name=run_dir.resolve().name,
        path=".",
        data=_measured_on(settings),
        license=settings.get("license"),
    )


def _measured_on(settings: dict[str, Any]) -> str:
    """The dev rows in a few words, without the folders that they lie in."""
    if "task" in settings:
        return f"the dev rows of {settings['task']}, GLUE"
    if settings["dev"] is not None:
        return Path(settings["dev"]).name
    return f"{Path(settings['data']).name}, {settings['dev_share']:.3g} of the rows"


def _result(run_dir: Path, metrics: dict[str, Any], stopped_by: signal.Signals | None) -> FinetuneResult:
    has_model = metrics["best"] is not None
    return FinetuneResult(
        run_dir=run_dir,
        model_dir=run_dir / "model" if has_model else None,
        metrics=metrics if has_model else {},
        stopped_by=stopped_by,
    )
