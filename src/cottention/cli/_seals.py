"""`cottention doctor --model DIR`: compares what is finished with the hashes that it was written with.

parts, problems = compare(Path("runs/bert"))        # model, checkpoints; or a model, a corpus, a fine-tuning
"""

from __future__ import annotations

from pathlib import Path

from cottention.errors import CheckpointError, CottentionError, DataError
from cottention.json_files import read_json_object
from cottention.seals import MANIFEST, RECORD_SEAL, damage, is_intact_record, missing_parts


def compare(directory: Path) -> tuple[dict[str, str], list[str]]:
    """Read everything in a directory that was sealed.

    Args:
        directory: a model, a checkpoint, a run of any kind with those in it, or a corpus.

    Returns:
        Each part and what was found, and a line for everything that is damaged.

    Raises:
        CheckpointError: there is nothing of ours.
    """
    if not directory.is_dir():
        raise CheckpointError(f"no directory {directory}")
    if (directory / "manifest.json").is_file() and not _is_model(directory):
        return _corpus(directory)
    found = [directory] if _is_model(directory) else sorted(filter(_is_model, directory.glob("*/")))
    if not _is_model(directory):
        found += sorted(filter(_is_model, directory.glob("*/*/")))
    if not found:
        raise CheckpointError(f"{directory} holds no model, no checkpoint and no corpus")
    parts, problems = {}, []
    for part in found:
        if (part / MANIFEST).is_file():
            problem = damage(part)
            said = "as it was written"
        else:
            lost = missing_parts(part)
            problem = f"{lost[0]} is missing" if lost else None
            said = "written without hashes: nothing to compare"
        parts[str(part)] = said if problem is None else f"damaged: {problem}"
        if problem is not None:
            problems.append(f"{part}: {problem}")
    for record in [*directory.glob("metrics.json"), *sorted(directory.glob("*/metrics.json"))]:
        said = _said_of(record)
        parts[str(record)] = said
        if said.startswith("damaged"):
            problems.append(f"{record}: {said.removeprefix('damaged: ')}")
    return parts, problems


def _said_of(record: Path) -> str:
    """Of the scores of a fine-tuning."""
    try:
        content = read_json_object(record, error=CheckpointError)
    except CottentionError as error:
        return f"damaged: {error}"
    if RECORD_SEAL not in content:
        return "written without hashes: nothing to compare"
    return "as it was written" if is_intact_record(content) else "damaged: was changed after it was written"


def _is_model(path: Path) -> bool:
    # A checkpoint that lost its config is told by its seal; on a Mac a corpus' manifest.json would pass for one.
    return (path / "config.json").is_file() or ((path / MANIFEST).is_file() and (path / "trainer_state.json").is_file())


def _corpus(directory: Path) -> tuple[dict[str, str], list[str]]:
    from cottention.data.shards import check_corpus

    try:
        sealed = check_corpus(directory)
    except DataError as error:
        return {str(directory): "damaged"}, [str(error)]
    return {str(directory): "as it was written" if sealed else "written without hashes: only sizes were compared"}, []
