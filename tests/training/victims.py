"""Pretraining runs that are killed at a chosen moment: what the child processes of test_resume.py do.

Every moment is a name in MOMENTS, with how often it has to come before the process kills itself there. SIGKILL leaves
no chance to tidy up: nothing behind it runs, no `finally`, no handler.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cottention import files
from cottention.errors import CheckpointError
from cottention.training import checkpointing_trainer, checkpoints, pretraining, trainer
from cottention.training.metrics import MetricsLog
from cottention.training.recipe import Recipe

Original = Callable[..., Any]
Moment = tuple[Any, str, Callable[..., Any]]


def die(number: signal.Signals = signal.SIGKILL) -> None:
    """Kill this process, here."""
    os.kill(os.getpid(), number)


def _after(original: Original, *args: Any, **options: Any) -> None:
    original(*args, **options)
    die()


def _before(_original: Original, *_args: Any, **_options: Any) -> None:
    die()


def _half_written_weights(original: Original, model: Any, tokenizer: Any, folder: Path, **options: Any) -> None:
    original(model, tokenizer, folder, **options)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    die()


def _half_written_file(_original: Original, _content: Any, path: str | Path) -> None:
    Path(path).write_bytes(b"PK\x03\x04 the rest is missing")
    die()


def _half_written_line(_original: Original, log: MetricsLog, entry: dict[str, Any]) -> None:
    with log.path.open("a", encoding="utf-8") as file:
        file.write(f'{{"step": {entry["step"]}, "tok')
    die()


def _sigterm(original: Original, *args: Any, **options: Any) -> Any:
    die(signal.SIGTERM)
    return original(*args, **options)


def _sigint(original: Original, *args: Any, **options: Any) -> Any:
    die(signal.SIGINT)
    return original(*args, **options)


MOMENTS: dict[str, Moment] = {
    "a micro batch is done": (trainer.PretrainingTrainer, "training_step", _after),
    "an update is done": (torch.optim.AdamW, "step", _after),
    "a line of metrics is half written": (MetricsLog, "write", _half_written_line),
    "weights are half written": (checkpointing_trainer, "save_model", _half_written_weights),
    "an optimizer state is half written": (torch, "save", _half_written_file),
    "a checkpoint waits for its manifest": (checkpoints, "_write_manifest", _before),
    "a checkpoint waits for its new name": (files, "_flush_tree", _before),
    "a checkpoint has its name": (trainer, "rotate", _before),
    "old checkpoints are gone": (trainer, "rotate", _after),
    "the model is half written": (pretraining, "save_model", _half_written_weights),
    "SIGTERM comes": (trainer.PretrainingTrainer, "training_step", _sigterm),
    "Ctrl-C comes": (trainer.PretrainingTrainer, "training_step", _sigint),
}


def run(recipe: Recipe, run_dir: Path, moment: str | None = None, count: int = 1) -> None:
    """Start or continue a run, and die when `moment` has come for the `count`-th time; exit code as the command's."""
    if moment is not None:
        owner, name, strike = MOMENTS[moment]
        original, seen = getattr(owner, name), 0

        def counting(*args: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            return strike(original, *args, **options) if seen == count else original(*args, **options)

        setattr(owner, name, counting)
    sys.exit(pretraining.pretrain(recipe, output_dir=run_dir).exit_code)


def run_on_a_full_disk(recipe: Recipe, run_dir: Path, max_bytes: int, said: Path) -> None:
    """Continue a run where no file can have more than `max_bytes`; write down what it says about that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))
    try:
        pretraining.pretrain(recipe, output_dir=run_dir)
    except CheckpointError as error:
        said.write_text(str(error))
        sys.exit(2)
