"""From a recipe's data section to windows of tokens: corpus, held-out part, tokenizer, packing, collators.

All of it is memory-mapped Arrow that `cottention.data` caches by content and settings, so that a second run on the same
text starts at once. A tokenizer trained for the run lies in its directory.

    text = prepare_text(recipe, run_dir)
    text.train[0]["input_ids"], text.tokenizer, text.held_out
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from cottention.data.collators import CausalCollator, MaskedLMCollator
from cottention.data.corpus import DEFAULT_CORPUS, load_corpus
from cottention.data.packing import pack_mlm_windows, pack_windows, packing_report
from cottention.data.tokenization import tokenize_documents
from cottention.data.tokenizer import load_tokenizer, train_tokenizer
from cottention.errors import DataError, SettingsError
from cottention.logging import get_logger
from cottention.training.held_out import HeldOut
from cottention.training.recipe import BertRecipe, DataSettings, GPTRecipe, Recipe

TRAINED = "train"
"""`data.tokenizer` of a recipe that trains its own."""

_WINDOWS_IN_FINGERPRINT = 64

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreparedText:
    """Everything that training needs to know about text."""

    tokenizer: PreTrainedTokenizerBase
    """Trained for this run, or the recipe's."""
    train: Dataset
    """Windows to train on."""
    collator: Any
    """Turns windows of the stream into a batch."""
    validation_documents: Dataset
    """The held-out text itself, column "text"."""
    held_out: HeldOut
    """Measures a model on windows of the held-out text, data.eval_tokens at most."""

    def fingerprint(self) -> str:
        """Name the windows to train on by their number and a sample of them: a run may go on with no others."""
        sample = _spread(self.train, _WINDOWS_IN_FINGERPRINT)
        digest = hashlib.blake2b(str(len(self.train)).encode(), digest_size=16)
        for row in sample:
            digest.update(np.asarray(row["input_ids"], dtype=np.int64).tobytes())  # pyright: ignore
        return digest.hexdigest()


def prepare_text(recipe: Recipe, run_dir: Path | None) -> PreparedText:
    """Open, split, tokenise and pack the text of a recipe. Writes nothing outside the cache of `datasets`.

    Args:
        recipe: its sections `data` and `model` (the size of a vocabulary to train).
        run_dir: the directory of a run of this recipe, whose tokenizer is taken; None trains it again.

    Raises:
        DataError: the text cannot be used, or is too short for its windows.
        SettingsError: the tokenizer does not fit the recipe.
    """
    train, validation = open_documents(recipe.data, seed=recipe.training.seed)
    tokenizer = _tokenizer(recipe, train, run_dir)
    train_windows, _ = _windows(recipe, train, tokenizer, tail="drop")
    held_out_windows, targets_per_byte = _windows(recipe, validation, tokenizer, tail="pad")
    logger.info(
        "%d windows of %d tokens to train on, %d held out",
        len(train_windows),
        recipe.data.sequence_length,
        len(held_out_windows),
    )
    held_out = HeldOut(
        _spread(held_out_windows, recipe.data.eval_tokens // recipe.data.sequence_length),
        collator=_collator(recipe, tokenizer, seed=recipe.training.seed + 1),
        arch=recipe.arch,
        batch_size=recipe.training.micro_batch_size,
        targets_per_byte=targets_per_byte if recipe.arch == "gpt" else None,
    )
    return PreparedText(
        tokenizer=tokenizer,
        train=train_windows,
        collator=_collator(recipe, tokenizer, seed=recipe.training.seed),
        validation_documents=validation,
        held_out=held_out,
    )


def open_documents(settings: DataSettings, *, seed: int) -> tuple[Dataset, Dataset]:
    """Open the text to train on and the held-out text.

    Args:
        settings: a recipe's section `data`.
        seed: decides which documents are held out, where the recipe gives a fraction.

    Raises:
        DataError: a source cannot be read, or is one document only and no other is held out.
    """
    options: dict[str, Any] = {"split_by": settings.split_by, "text_column": settings.text_column}
    limited = {**options, "max_document_chars": settings.max_document_chars}
    if isinstance(settings.validation, (int, float)):
        if settings.source == DEFAULT_CORPUS:
            train = load_corpus(f"{DEFAULT_CORPUS}:train", **limited)
            return train, load_corpus(f"{DEFAULT_CORPUS}:validation", **options)
        return _hold_out(load_corpus(settings.source, **limited), settings.validation, seed)
    return load_corpus(settings.source, **limited), load_corpus(settings.validation, **options)


def _hold_out(documents: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split at random by whole documents, at least one on each side."""
    numbers = _document_numbers(documents)
    num_documents = int(numbers[-1]) + 1
    if num_documents < 2:
        raise DataError(
            "the corpus is one document, of which nothing can be held out: set data.split_by to paragraph or line, "
            "or name another text as data.validation"
        )
    num_held_out = min(max(1, round(fraction * num_documents)), num_documents - 1)
    is_held_out = np.zeros(num_documents, dtype=bool)
    is_held_out[np.random.default_rng(seed).permutation(num_documents)[:num_held_out]] = True
    rows = is_held_out[numbers]
    return documents.select(np.flatnonzero(~rows)), documents.select(np.flatnonzero(rows))


def _document_numbers(documents: Dataset) -> np.ndarray:
    """To which document each row belongs; a long document has several rows."""
    ends = np.asarray(documents.with_format("numpy")["ends_document"][:], dtype=bool)
    return np.cumsum(ends) - ends


def _tokenizer(recipe: Recipe, train: Dataset, run_dir: Path | None) -> PreTrainedTokenizerBase:
    name = recipe.data.tokenizer
    if name != TRAINED:
        return load_tokenizer(name)
    if run_dir is not None and (run_dir / "tokenizer").is_dir():
        return load_tokenizer(run_dir / "tokenizer")
    kind = "bpe" if recipe.arch == "gpt" else "wordpiece"
    logger.info("training a tokenizer with %d tokens", recipe.model.vocab_size)
    return train_tokenizer(train, kind=kind, vocab_size=recipe.model.vocab_size)


def _windows(
    recipe: Recipe, documents: Dataset, tokenizer: PreTrainedTokenizerBase, *, tail: str
) -> tuple[Dataset, float]:
    """Windows, and how many targets there are per byte of text when each token is one once."""
    tokens = tokenize_documents(documents, tokenizer)
    length = recipe.data.sequence_length
    special: Any = tokenizer  # its ids are made at run time, which a type checker reads as anything at all
    if isinstance(recipe, GPTRecipe):
        windows = pack_windows(tokens, length, special.eos_token_id, tail=tail)
    else:
        windows = pack_mlm_windows(
            tokens,
            length,
            cls_token_id=special.cls_token_id,
            sep_token_id=special.sep_token_id,
            pad_token_id=special.pad_token_id,
            tail=tail,
        )
    report = packing_report(tokens, windows)
    # The very first token, an end-of-text, has nothing before it. Each document's own is a target, but no byte.
    return windows, (report.num_tokens - 1) / report.num_bytes


def _spread(windows: Dataset, most: int) -> Dataset:
    """At most so many windows, evenly spread over all."""
    if len(windows) <= max(1, most):
        return windows
    return windows.select(np.linspace(0, len(windows) - 1, max(1, most)).round().astype(int))


def _collator(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Any:
    if isinstance(recipe, GPTRecipe):
        return CausalCollator(reset_at_documents=recipe.data.reset_at_documents)
    assert isinstance(recipe, BertRecipe)
    if tokenizer.mask_token_id is None:
        raise SettingsError(f"a BERT needs a tokenizer with a mask token; {recipe.data.tokenizer!r} has none")
    return MaskedLMCollator(tokenizer, recipe.data.mlm_probability, seed)
