"""The models of a playground: opened once, used by one visitor at a time.

opened = open_models(["runs/quickstart-gpt/model"], device="auto")
opened[0].name, opened[0].is_gpt
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.errors import CheckpointError
from cottention.generation import GenerationResult, load_model_and_tokenizer
from cottention.generation.source import resolve_directory
from cottention.json_files import read_json
from cottention.models.layer_types import TYPE_WORDS


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model that is ready, with what a page says about it."""

    name: str
    """What the page calls it: the directory as it was given."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the model computes: two visitors at once would share its processor and its random numbers."""

    @property
    def is_gpt(self) -> bool:
        """Whether it writes text; else it is a BERT."""
        return self.model.config.model_type == "cottention-gpt"

    @property
    def has_next_sentence(self) -> bool:
        """Whether it has a head that says how likely one sentence follows another."""
        return hasattr(self.model, "cls") and getattr(self.model.cls, "seq_relationship", None) is not None

    @property
    def description(self) -> str:
        """Kind, size and attention in a line."""
        kinds = [word for name, word in TYPE_WORDS.items() if name in self.model.config.layer_types]
        size = sum(x.numel() for x in self.model.parameters())
        return f"{'GPT' if self.is_gpt else 'BERT'}, {size:,} parameters, {' and '.join(kinds)} attention"


def open_models(sources: Sequence[str], *, device: str) -> list[OpenedModel]:
    """Open each directory as what its config says it is.

    Raises:
        CheckpointError, SettingsError: as of `load_model_and_tokenizer`.
    """
    return [_open(source, device) for source in sources]


def _open(source: str, device: str) -> OpenedModel:
    path = resolve_directory(source, file_patterns=("config.json",)) / "config.json"
    config: Any = read_json(path) if path.is_file() else {}
    if isinstance(config, dict) and config.get("model_type") == "cottention-bert":
        try:
            model, tokenizer = load_model_and_tokenizer(source, "next-sentence", device=device)
        except CheckpointError:  # it has no such head, or something else is wrong, which the next line says
            model, tokenizer = load_model_and_tokenizer(source, "masked-lm", device=device)
    else:
        model, tokenizer = load_model_and_tokenizer(source, "causal-lm", device=device)
    return OpenedModel(name=str(Path(source)), model=model, tokenizer=tokenizer)


class _LeftError(Exception):
    """The visitor has gone or pressed stop."""


def stream_pieces(
    opened: OpenedModel, generate: Callable[[Callable[[str], None]], GenerationResult]
) -> Generator[str | GenerationResult, None, None]:
    """Give each piece of text as it is written, and the whole result last; leaving the iteration ends the writing.

    Args:
        opened: whose lock is held meanwhile.
        generate: writes, and calls what it is given with each piece.

    Raises:
        CottentionError: what `generate` raised.
    """
    pieces: SimpleQueue[str | GenerationResult | BaseException] = SimpleQueue()
    left = threading.Event()

    def hear(piece: str) -> None:
        if left.is_set():
            raise _LeftError
        pieces.put(piece)

    def work() -> None:
        try:
            with opened.lock:
                pieces.put(generate(hear))
        except BaseException as error:  # noqa: BLE001  # it is raised where somebody hears it
            pieces.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            piece = pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if isinstance(piece, GenerationResult):
                return
    finally:
        left.set()
        thread.join()
