"""Text for a distillation: windows to learn from, and a part that is kept for the scores.

text = prepare_text(settings, tokenizer, "bert")
text.train[0]["input_ids"], text.held_out_documents
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cottention.convert.configs import Architecture
from cottention.data import load_corpus, pack_mlm_windows, pack_windows, tokenize_documents
from cottention.data.tokenization import arrow_batches
from cottention.errors import DataError

Source = str | PathLike[str] | Sequence[str | PathLike[str]]

# The end of the text that no held-out text was named for: a tenth, but not more than a minute's work on one core.
_HELD_OUT_SHARE = 0.1
_MOST_HELD_OUT_CHARACTERS = 100_000
_LONGEST_WORD = 1000  # characters without a space: no word
_SHORTEST = 16  # tokens of the shortest rows that a BERT learns from


@dataclass(frozen=True, kw_only=True)
class DistillationText:
    """What to learn from and what to score."""

    train: Dataset
    """Windows, as `pack_windows` or `pack_mlm_windows` makes them."""
    held_out_documents: Dataset
    """Text of the scores, tokenised."""
    held_out: Dataset
    """The same as windows, the last one padded."""


def prepare_text(
    text: Source, held_out: Source | None, tokenizer: PreTrainedTokenizerBase, architecture: Architecture, window: int
) -> DistillationText:
    """Open, split, tokenise and pack.

    Args:
        text: what `load_corpus` takes.
        held_out: likewise, for the scores; None: the end of `text`, which is then not learnt from.
        tokenizer: the source's.
        architecture: decides the special tokens of a row.
        window: tokens of a row.

    Raises:
        DataError: there is no text, or too little for one row.
        SettingsError: the tokenizer lacks a special token.
    """
    corpus = load_corpus(text).select_columns(["text", "ends_document"])
    if held_out is None:
        corpus, kept = split_off_end(corpus)
    else:
        kept = load_corpus(held_out).select_columns(["text", "ends_document"])
    tokens, kept_tokens = (tokenize_documents(part, tokenizer) for part in (corpus, kept))
    return DistillationText(
        train=_windows(tokens, tokenizer, architecture, window, tail="drop"),
        held_out_documents=kept_tokens,
        held_out=_windows(kept_tokens, tokenizer, architecture, window, tail="pad"),
    )


def split_off_end(corpus: Dataset) -> tuple[Dataset, Dataset]:
    """Cut a corpus near its end, between two words: what comes before, and the rest.

    Raises:
        DataError: there are too few words to cut between.
    """
    lengths = np.concatenate([pc.utf8_length(table["text"]).to_numpy() for table in arrow_batches(corpus)])  # pyright: ignore
    ends = np.cumsum(lengths)
    cut = int(ends[-1]) - min(int(ends[-1] * _HELD_OUT_SHARE), _MOST_HELD_OUT_CHARACTERS)
    index = int(np.searchsorted(ends, cut))
    row = corpus[index]
    place = cut - int(ends[index] - lengths[index])
    at = row["text"].rfind(" ", max(0, place - _LONGEST_WORD), place + 1)
    if at < 0 and place > _LONGEST_WORD:  # text without spaces, as Chinese is, is cut where it should be
        at = place
    head, tail = row["text"][: max(at, 0)], row["text"][max(at, 0) :].lstrip()
    # `select` takes no empty range at the end of a dataset.
    before = [corpus.select(range(index))] if index else []
    after = [corpus.select(range(index + 1, len(corpus)))] if index + 1 < len(corpus) else []
    if head.strip():
        before.append(_one_row(head, True, corpus))
    if tail:
        after.insert(0, _one_row(tail, row["ends_document"], corpus))
    if not before or not after:
        raise DataError(f"the text must hold enough words to keep some for the scores; got {int(ends[-1])} characters")
    return concatenate_datasets(before), concatenate_datasets(after)


def _one_row(text: str, ends_document: bool, like: Dataset) -> Dataset:
    return Dataset.from_dict({"text": [text], "ends_document": [ends_document]}, features=like.features)


def _windows(
    tokens: Dataset, tokenizer: PreTrainedTokenizerBase, architecture: Architecture, window: int, *, tail: str
) -> Dataset:
    if architecture == "gpt":
        return pack_windows(tokens, window, tokenizer.eos_token_id, tail=tail)  # pyright: ignore[reportArgumentType]
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad")}
    return pack_mlm_windows(tokens, window, tail=tail, **special)


def training_batches(
    windows: Dataset, architecture: Architecture, *, batch_size: int, steps: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Yield `steps` batches of about `batch_size` windows' tokens, each window once before any comes again.

    A BERT's rows are cut, all of a batch to one length, drawn anew for each: its divisor is a power of the length, and
    rows of one length could not tell the power from a factor. In a GPT's rows every length occurs.
    """
    generator = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(steps):
        window = len(windows[0]["input_ids"])
        shortest = min(_SHORTEST, window)
        length = window if architecture == "gpt" else int(generator.integers(shortest, window + 1))
        num_rows = max(batch_size * window // length, 1)
        while len(order) < num_rows:
            order += generator.permutation(len(windows)).tolist()
        rows, order = order[:num_rows], order[num_rows:]
        input_ids = np.stack([windows[row]["input_ids"] for row in rows])  # [B, window]
        # A shorter BERT row ends as a whole one does: with [SEP].
        cut = input_ids if length == window else np.hstack([input_ids[:, : length - 1], input_ids[:, -1:]])
        yield {"input_ids": torch.from_numpy(cut.astype(np.int64))}


def scoring_batches(windows: Dataset, batch_size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield the windows in order as model inputs, and which of their tokens are real, `[B, T]`."""
    for start in range(0, len(windows), batch_size):
        rows = windows[start : start + batch_size]
        input_ids = torch.from_numpy(np.stack(rows["input_ids"]).astype(np.int64))
        real = torch.arange(input_ids.shape[1]) < torch.from_numpy(np.asarray(rows["num_tokens"]))[:, None]
        batch = {"input_ids": input_ids}
        yield (batch if real.all() else {**batch, "attention_mask": real.to(torch.int64)}), real
