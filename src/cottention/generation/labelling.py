"""What a fine-tuned model says of texts and of words, row after row, in constant memory.

Rows are read some hundreds at a time, put into batches of like length, and come back in the order given.

    kind = label_kind("runs/mine/model")                             # "text-labels" or "word-labels"
    model, tokenizer = load_model_and_tokenizer("runs/mine/model", kind)
    for row, found in label_texts(model, tokenizer, [("Never again.", "")]):
        found                                                        # {"label": "neg", "score": 0.93}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.data.glue_batches import GlueCollator, packs_best
from cottention.data.label_batches import LabelCollator, longest_row, with_text_ends, words_to_tokens
from cottention.errors import SettingsError
from cottention.generation.counting import Cuts
from cottention.generation.loading import Kind
from cottention.generation.source import resolve_directory
from cottention.json_files import read_json
from cottention.models.configuration import check_vocabulary

_WINDOW_BATCHES = 8  # batches whose texts are sorted together
_WINDOW_CHARACTERS = 1 << 22
_SEVERAL = "multi_label_classification"
_NUMBER = "regression"

_Row = TypeVar("_Row")


def label_kind(source: str | Path) -> Kind:
    """Whether a model directory, or a name on the Hub, holds a model for texts or for words.

    Raises:
        CheckpointError: there is no such directory.
    """
    directory = resolve_directory(source, file_patterns=("config.json",))
    path = directory / "config.json"
    config = read_json(path) if path.is_file() else {}
    names = config.get("architectures") if isinstance(config, dict) else None
    for_words = isinstance(names, list) and any(str(name).endswith("ForTokenClassification") for name in names)
    return "word-labels" if for_words else "text-labels"


def label_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[tuple[str | None, str]],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    all_scores: bool = False,
    cuts: Cuts | None = None,
) -> Iterator[tuple[tuple[str | None, str], dict[str, Any]]]:
    """Yield each row with what the model says of it.

    Args:
        model: of kind "text-labels".
        tokenizer: its own.
        rows: a text, and the second of a pair or ""; None is no text, of which nothing is said.
        batch_size: texts read together; the result does not depend on it.
        max_length: tokens of a row at most; None: as the model was trained.
        all_scores: add "scores", those of every label.
        cuts: counts the rows that were longer.

    Yields:
        label and score: a class and its probability; a number's name and the number; lists of both where a text may
        have several labels, those above one half; None where there is no text.

    Raises:
        SettingsError: the tokenizer is not the model's, or a size makes no sense.
    """
    reads = _Reader(model, with_text_ends(tokenizer), batch_size, max_length, cuts)
    names = _names(model)

    def said(logits: Tensor) -> dict[str, Any]:
        return _said(logits, names, model.config.problem_type, all_scores)

    for window in reads.windows(rows, lambda row: len(row[0] or "") + len(row[1])):
        given = [at for at, row in enumerate(window) if row[0] is not None]
        found = reads.texts([window[at] for at in given]) if given else {}
        outputs = reads.in_batches(found, lambda batch, _rows: list(model(**batch).logits.float().cpu()))
        by_row = dict(zip(given, outputs, strict=True))
        for at, row in enumerate(window):
            yield row, said(by_row[at]) if at in by_row else {"label": None, "score": None}


def label_words(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Sequence[str]],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    cuts: Cuts | None = None,
) -> Iterator[tuple[Sequence[str], dict[str, Any]]]:
    """Yield the words of each text with the tag and the probability of each.

    Args:
        model: of kind "word-labels".
        tokenizer: its own.
        rows: the words of each text.
        batch_size: texts read together; the result does not depend on it.
        max_length: tokens of a row at most; None: as the model was trained.
        cuts: counts the rows that were longer.

    Yields:
        label and score, a list each; None for a word that was cut off, or has no token.

    Raises:
        SettingsError: the tokenizer is not the model's, or a size makes no sense.
    """
    reads = _Reader(model, with_text_ends(tokenizer), batch_size, max_length, cuts)
    names = _names(model)
    for window in reads.windows(rows, lambda words: sum(map(len, words))):
        found = words_to_tokens(reads.tokenizer, window, reads.limit)
        outputs = reads.in_batches(found, lambda batch, rows: split_tokens(model, batch, rows))
        for words, starts, logits in zip(window, found["starts"], outputs, strict=True):
            best = logits.softmax(-1).max(-1)
            labels = [names[int(best.indices[at])] if at >= 0 else None for at in starts]
            scores = [float(best.values[at]) if at >= 0 else None for at in starts]
            yield words, {"label": labels, "score": scores}


def split_tokens(
    model: PreTrainedModel, batch: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]]
) -> list[Tensor]:
    """A tagger's logits `[T_i, L]` for each row of a batch, float32 on the CPU.

    Args:
        model: a token classifier.
        batch: of a `LabelCollator`, without labels.
        rows: what the batch was made of.
    """
    logits = model(**batch).logits.float().cpu()
    lengths = [len(row["input_ids"]) for row in rows]
    if "cu_seqlens" in batch:
        return list(logits[0].split(lengths))
    return [row[:length] for row, length in zip(logits, lengths, strict=True)]


def _names(model: PreTrainedModel) -> list[str]:
    config: Any = model.config
    return [str(config.id2label[at]) for at in range(config.num_labels)]


class _Reader:
    """Rows through a model, window by window."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int | None,
        cuts: Cuts | None,
    ) -> None:
        if batch_size < 1:
            raise SettingsError(f"batch_size must be at least 1; got {batch_size}")
        check_vocabulary(tokenizer, model.config)
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.limit = longest_row(max_length, tokenizer, model.config.longest_text)
        self.cuts = cuts if cuts is not None else Cuts()
        self.cuts.limit = self.limit
        self._collator: GlueCollator = LabelCollator(
            kind="classes",
            pad_token_id=tokenizer.pad_token_id or 0,  # pyright: ignore[reportArgumentType]
            packed=packs_best(model.config.attention_type, torch.device(model.device)),
            num_token_types=getattr(model.config, "type_vocab_size", 1),
        )

    def windows(self, rows: Iterable[_Row], size: Callable[[_Row], int]) -> Iterator[list[_Row]]:
        """Rows in groups, of some megabytes at most."""
        held: list[_Row] = []
        num_characters = 0
        for row in rows:
            held.append(row)
            num_characters += size(row)
            if len(held) == self.batch_size * _WINDOW_BATCHES or num_characters > _WINDOW_CHARACTERS:
                yield held
                held, num_characters = [], 0
        if held:
            yield held

    def texts(self, rows: Sequence[tuple[str | None, str]]) -> dict[str, list[Any]]:
        """Columns input_ids, num_first, was_cut of texts and pairs."""
        firsts: Any = [first for first, _ in rows]
        seconds = [second for _, second in rows]
        found: Any = self.tokenizer(
            firsts,
            seconds if any(seconds) else None,
            truncation="longest_first",
            max_length=min(self.limit, 1 << 30),
            verbose=False,
        )
        return {
            "input_ids": found["input_ids"],
            "num_first": [encoding.type_ids.count(0) for encoding in found.encodings],
            "was_cut": [bool(encoding.overflowing) for encoding in found.encodings],
        }

    @torch.inference_mode()
    def in_batches(self, columns: Mapping[str, list[Any]], compute: Callable[[Any, Any], list[Tensor]]) -> list[Tensor]:
        """What `compute` makes of the batch and of its rows, for every row in the order given."""
        if not columns:
            return []
        self.cuts.count += sum(columns["was_cut"])
        names = ("input_ids", "num_first")
        rows: list[dict[str, Any]] = [
            dict(zip(names, row, strict=True)) for row in zip(*(columns[name] for name in names), strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda at: len(rows[at]["input_ids"]))
        results: dict[int, Tensor] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            picked = [rows[at] for at in chosen]
            batch = {name: x.to(self.model.device) for name, x in self._collator(picked).items()}
            results.update(zip(chosen, compute(batch, picked), strict=True))
        return [results[at] for at in range(len(rows))]


def _said(logits: Tensor, names: list[str], problem_type: str | None, all_scores: bool) -> dict[str, Any]:
    values = logits.double()
    if problem_type == _NUMBER or (problem_type is None and len(names) == 1):
        found: dict[str, Any] = {"label": names[0], "score": float(values[0])}
        return found
    scores = values.sigmoid() if problem_type == _SEVERAL else values.softmax(-1)
    listed = scores.tolist()
    if problem_type == _SEVERAL:
        over = np.flatnonzero(np.asarray(listed) > 0.5)
        found = {"label": [names[at] for at in over], "score": [listed[at] for at in over]}
    else:
        best = int(scores.argmax())
        found = {"label": names[best], "score": listed[best]}
    return {**found, "scores": dict(zip(names, listed, strict=True))} if all_scores else found
