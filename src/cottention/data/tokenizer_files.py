"""Opens tokenizer files that may come from a stranger: damage and traps become one line, before any text is read.

The tokenizers library reports a damaged file as a plain Exception, and some damage only when it encodes: as a panic of
Rust, which is no Exception and prints itself, or as an allocation that ends the process. So what can grow without bound
is looked at in tokenizer.json, and whatever opens a tokenizer tries it on a few texts.

    tokenizer = open_tokenizer(folder, lambda: AutoTokenizer.from_pretrained(folder), "a damaged tokenizer")
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase

from cottention.errors import CheckpointError, CottentionError
from cottention.files import one_line
from cottention.json_files import LARGEST_TABLE, read_json

_Tokenizer = TypeVar("_Tokenizer", bound=PreTrainedTokenizerBase)

_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# What reading and parsing damaged files raises in transformers, beside the plain Exception of tokenizers.
_DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    OverflowError,
    StrictDataclassError,  # a field of a config has another type
)
# Characters that a small vocabulary lacks too, so that it shows what it does with them.
_PROBES = ("The people's 1,999 naïve cafés \u6771\u4eac ☃\U0001f642\u0378\n\ta", "", "a" * 70 + "b")
_MOST_GROWTH = 1000
_LONGEST_PADDING = 1 << 20


def open_tokenizer(
    path: Path, build: Callable[[], _Tokenizer], what: str, error: type[CottentionError] = CheckpointError
) -> _Tokenizer:
    """Open a tokenizer and try it.

    Args:
        path: the folder of its files, or its tokenizer.json.
        build: opens it.
        what: how the message begins, e.g. "DIR has a damaged tokenizer".
        error: what is raised.

    Raises:
        CottentionError: the files are damaged, or make a tokenizer that cannot encode every text.
    """
    with damage_told_as(what, error):
        check_files(path, what, error)
        tokenizer = build()
        try_encoding(tokenizer)
    return tokenizer


def check_files(path: Path, what: str, error: type[CottentionError] = CheckpointError) -> None:
    """Look at the JSON files of a folder, or at a tokenizer.json, before the libraries do; see `open_tokenizer`."""
    for file in [path] if path.suffix == ".json" else [path / name for name in _JSON_FILES]:
        if not file.exists():
            continue
        try:
            content = read_json(file, limit=LARGEST_TABLE, error=error)
        except error as problem:
            reason = str(problem).removeprefix(f"{file} ")
            raise error(f"{what}: {file.name} is damaged, it {reason}") from problem
        if not isinstance(content, dict):
            raise error(f"{what}: {file.name} is damaged, a JSON object expected; got {json.dumps(content)[:40]}")
        if isinstance(content.get("model"), dict):
            _check_growth(content, f"{what}: {file.name}", error)


@contextmanager
def damage_told_as(what: str, error: type[CottentionError] = CheckpointError) -> Iterator[None]:
    """Say in one line, beginning with `what`, that tokenizer files cannot be used; see `open_tokenizer`."""
    with _panics_silent():
        try:
            yield
        except CottentionError:
            raise
        except BaseException as problem:
            if not is_damage(problem):
                raise
            raise error(f"{what}: {one_line(problem)}") from problem


def try_encoding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Encode and decode texts that are unlike each other; what a tokenizer lacks shows in nothing else."""
    for text in _PROBES:
        tokenizer.decode(tokenizer(text, verbose=False)["input_ids"])
        tokenizer(text, text, verbose=False)


def check_ids(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, source: object) -> None:
    """Refuse a tokenizer with ids that a model has no embedding for.

    Raises:
        CheckpointError: they do not belong together.
    """
    if len(tokenizer) > num_embeddings:
        raise CheckpointError(f"{source} has a tokenizer of {len(tokenizer)} tokens but {num_embeddings} embeddings")
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= num_embeddings:
        raise CheckpointError(f"{source} has a tokenizer with the id {highest} but {num_embeddings} embeddings")


def is_damage(problem: BaseException) -> bool:
    """Whether an exception is what the libraries raise on damaged files; anything else is a bug and passes."""
    return type(problem) is Exception or is_panic(problem) or isinstance(problem, _DAMAGE)


def is_panic(problem: BaseException) -> bool:
    """Whether this is a panic of a library in Rust, which derives from BaseException and cannot be imported."""
    return type(problem).__name__ == "PanicException"


def _check_growth(content: dict[str, Any], where: str, error: type[CottentionError]) -> None:
    """Refuse a tokenizer.json whose parts make much of little, or would end the process."""
    growth = 1.0
    for part in _parts(content):
        if part["type"] in ("Replace", "Prepend"):
            text = part.get("content", part.get("prepend"))
            growth *= max(1, len(text)) if isinstance(text, str) else 1
        elif part["type"] == "Precompiled" and not _is_charsmap(part.get("precompiled_charsmap")):
            raise error(f"{where}: precompiled_charsmap is damaged")
    if growth > _MOST_GROWTH:
        raise error(f"{where} may make a text {growth:,.0f} times as long; the limit is {_MOST_GROWTH}")
    padding, truncation = content.get("padding"), content.get("truncation")
    if isinstance(padding, dict):
        strategy = padding.get("strategy")
        lengths = [strategy.get("Fixed") if isinstance(strategy, dict) else None, padding.get("pad_to_multiple_of")]
        longest = max((length for length in lengths if isinstance(length, int)), default=0)
        if longest > _LONGEST_PADDING:
            raise error(f"{where} pads to {longest} tokens; the limit is {_LONGEST_PADDING}")
    if isinstance(truncation, dict):
        stride, longest = truncation.get("stride", 0), truncation.get("max_length", 0)
        if isinstance(stride, int) and isinstance(longest, int) and stride and stride >= longest:
            raise error(f"{where} cuts to {longest} tokens with a stride of {stride}, which must be less")


def _parts(content: Any) -> Iterator[dict[str, Any]]:
    """Every object with a type in the sections of a tokenizer.json that change text, sequences unfolded."""
    waiting = [content.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            if isinstance(part.get("type"), str):
                yield part
            waiting += [inner for inner in part.values() if isinstance(inner, (list, dict))]


def _is_charsmap(encoded: object) -> bool:
    """Whether a table of characters is as long as it says; the library reads past its end otherwise."""
    try:
        table = base64.b64decode(str(encoded), validate=True)
    except (binascii.Error, ValueError):
        return False
    return len(table) >= 4 and int.from_bytes(table[:4], "little") <= len(table) - 4


@contextmanager
def _panics_silent() -> Iterator[None]:
    """Hold back what is written to the process's stderr, and pass it on unless a panic ended the block.

    The library prints a panic from Rust before it raises it, and has no switch for that.
    """
    try:
        sys.stderr.flush()
        own = os.dup(2)
    except (OSError, ValueError, AttributeError):  # closed, or there is none
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as problem:
            panicked = is_panic(problem) or is_panic(problem.__cause__ or problem)
            raise
        finally:
            sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)
            held.seek(0)
            if not panicked and (written := held.read()):
                os.write(2, written)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer; the same files whether it was made just now or opened from disk.

    Raises:
        OSError: it cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # The tokenizers library tells every error of the system as a plain Exception.
        told = re.search(r"\(os error (\d+)\)", str(error)) if type(error) is Exception else None
        if told is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(folder)) from error
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    opened_with = {"is_local", "local_files_only"} & config.keys()
    if opened_with:
        kept = {name: value for name, value in config.items() if name not in opened_with}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
