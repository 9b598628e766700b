"""Checkpoints that survive a crash: written beside, flushed to disk, renamed; read only after their checksums agree.

A checkpoint is a directory `checkpoint-STEP` whose seal, MANIFEST.json, lists every file with size and SHA-256. A
directory without one, with a file that differs from it, or without one of the parts that a run needs is damaged.

    with atomic_directory(folder / "checkpoint-200", sealed=True) as staging:
        ...write files into staging...
    newest = newest_intact_checkpoint(folder)
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cottention.errors import CheckpointError
from cottention.files import one_line, write_text, written_directory
from cottention.json_files import LARGEST_TABLE, read_json_object
from cottention.logging import get_logger
from cottention.seals import MANIFEST as MANIFEST  # for those who look into a checkpoint
from cottention.seals import SHARDS, WEIGHTS, check_model, damage, missing_parts
from cottention.seals import seal as _write_manifest

RUN_STATE = "run_state.json"
"""What a run adds to the files of every one."""
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
RANDOM_STATE = "rng_state.pth"
"""Of the only process; that of one of several has its number behind an underscore."""
TRAINER_STATE = "trainer_state.json"
"""The number of steps and what else transformers' `TrainerState` holds."""

PARTS = (
    ("config.json",),
    (*WEIGHTS, SHARDS),
    (OPTIMIZER, SHARDS),
    (SCHEDULER,),
    (RANDOM_STATE, RANDOM_STATE.replace(".", "_*.")),
    (RUN_STATE,),
)
"""What a run goes on from, beside trainer_state.json; of the names in brackets one has to be there."""

# What pretraining and fine-tuning write into RUN_STATE.
_RUN_STATES: tuple[dict[str, type | tuple[type, ...]], ...] = (
    {"step": int, "window_start": int, "window_losses": list, "elapsed_s": (int, float), "text": str},
    {"epochs": list, "loss_sum": (int, float), "rows": str},
)
_NAME = re.compile(r"checkpoint-[0-9]+")

logger = get_logger(__name__)

write_atomically = write_text


@contextmanager
def atomic_directory(target: Path, *, sealed: bool) -> Iterator[Path]:
    """Give a new directory to write into, which becomes `target` when the block ends well, and vanishes otherwise.

    Whatever `target` was before is replaced. A crash at any moment leaves the old `target`, the new one or none, never
    a half-written one. The new directory already has its final name, below `staging_area(target.parent)`.

    Args:
        target: the directory to make, in a folder that nobody else writes.
        sealed: add a manifest, by which `damage` finds out later whether all is as it was written.
    """
    area = staging_area(target.parent)
    try:
        with written_directory(target, staging=area / target.name) as staging:
            yield staging
            if sealed:
                _write_manifest(staging)
    finally:
        shutil.rmtree(area, ignore_errors=True)


def staging_area(folder: Path) -> Path:
    """Where directories on their way into `folder` are written."""
    return folder / ".writing"


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Report what keeps a file from being written (no space, no permission) in one line.

    Raises:
        CheckpointError: with the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, one_line(error)) from error
    except SafetensorError as error:
        raise _unwritable(folder, str(error)) from error
    except RuntimeError as error:
        # All that torch.save says about a full disk is where in its own code it noticed.
        if not any(sign in str(error) for sign in ("inline_container", "iostream error")):
            raise
        raise _unwritable(folder, "a file could not be written to its end, is the disk full?") from error


def _unwritable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"cannot write to {folder}: {reason}; what was saved before is intact")


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def newest_intact_checkpoint(folder: Path, parts: Sequence[Sequence[str]] = ()) -> Path | None:
    """Return the newest checkpoint that a run can go on from; report the damaged ones on the way.

    Args:
        folder: where checkpoints lie.
        parts: what one must hold, see `PARTS`; none: only what its manifest says.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        problem = damage(path) or (_lacks(path, parts) if parts else None) or _nonsense(path)
        if problem is None:
            return path
        logger.warning("checkpoint %s is damaged (%s): trying the one before", path, problem)
    if checkpoints:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; --overwrite starts again")
    return None


def _nonsense(path: Path) -> str | None:
    """What in a checkpoint is not what a run writes there, though the seal fits: somebody else wrote it."""
    for file in sorted(path.glob("*.json")):
        try:
            content = read_json_object(file, limit=LARGEST_TABLE)
        except CheckpointError as error:
            return str(error)
        if file.name == RUN_STATE and not any(_has_kinds(content, kinds) for kinds in _RUN_STATES):
            return f"{RUN_STATE} is not that of a run"
        if file.name == TRAINER_STATE and not _is_trainer_state(content):
            return f"{TRAINER_STATE} is not that of a run"
    strange = [file.name for file in path.iterdir() if file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file)]
    return f"{strange[0]} is no file of torch" if strange else None


def _has_kinds(content: dict[str, Any], kinds: dict[str, type | tuple[type, ...]]) -> bool:
    losses = content.get("window_losses", [])
    return all(isinstance(content.get(name), kind) for name, kind in kinds.items()) and all(
        isinstance(loss, (int, float)) for row in losses for loss in (row if isinstance(row, list) else [row])
    )


def _is_trainer_state(content: dict[str, Any]) -> bool:
    """Whether every value is of the kind that transformers' own state has there."""
    from transformers import TrainerState  # seconds, which a look at a finished run need not cost

    default = dataclasses.asdict(TrainerState())
    kinds = {name: (int, float) if isinstance(value, (int, float)) else type(value) for name, value in default.items()}
    return {"global_step", "epoch"} <= content.keys() <= default.keys() and all(
        value is None or default[name] is None or isinstance(value, kinds[name]) for name, value in content.items()
    )


def _lacks(path: Path, parts: Sequence[Sequence[str]]) -> str | None:
    """What keeps an intact checkpoint from being gone on from: transformers starts again without a word, or half."""
    names = [entry.name for entry in path.iterdir()]
    for patterns in parts:
        if not any(fnmatch(name, pattern) for name in names for pattern in patterns):
            return f"{patterns[0]} is missing"
    step = _json_object(path / TRAINER_STATE).get("global_step")
    if step != checkpoint_step(path):
        return f"{TRAINER_STATE} is not that of step {checkpoint_step(path)}"
    return None


def read_run_state(checkpoint: Path, kinds: dict[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """What a run added to a checkpoint.

    Args:
        checkpoint: the directory.
        kinds: the names that it must have, and the type of each.

    Raises:
        CheckpointError: it is not what a run wrote.
    """
    state = _json_object(checkpoint / RUN_STATE)
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{checkpoint / RUN_STATE} is damaged: no {name}; remove that checkpoint")
    return state


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def finished_model(folder: Path) -> bool:
    """Whether a run's model is there, whole; a run without its weights is not finished.

    Raises:
        CheckpointError: it was changed after it was written.
    """
    lost = missing_parts(folder)
    if lost:
        if folder.exists():
            logger.warning("%s lacks %s: it is made again", folder, lost[0])
        return False
    try:
        check_model(folder, tokenizer=True, edits=False)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; without {folder} the same command makes it again") from error
    return True


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted save left behind."""
    for path in list_checkpoints(folder)[:-keep]:
        # Moved first, so that a crash while deleting leaves no checkpoint that looks damaged.
        doomed = staging_area(folder) / path.name
        doomed.parent.mkdir(exist_ok=True)
        path.rename(doomed)
    shutil.rmtree(staging_area(folder), ignore_errors=True)


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` updates."""
    return f"checkpoint-{step}"


def checkpoint_step(path: Path) -> int:
    """Updates that the checkpoint in a directory of this name has seen."""
    return int(path.name.rpartition("-")[2])
