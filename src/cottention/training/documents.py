"""From a recipe's data section to documents: text to train on, text that is held out, and the tokenizer of both.

train, held_out = open_documents(recipe.data, seed=0)
tokenizer = open_tokenizer(recipe, train, run_dir)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from cottention.data.corpus import DEFAULT_CORPUS, load_corpus
from cottention.data.tokenizer import load_tokenizer, train_tokenizer
from cottention.errors import SettingsError
from cottention.logging import get_logger
from cottention.training.corpora import TRAINED, open_source, reading_options
from cottention.training.recipe import Recipe
from cottention.training.recipe_sections import DataSettings
from cottention.training.splits import hold_out

logger = get_logger(__name__)


def open_documents(settings: DataSettings, *, seed: int, least: int = 1) -> tuple[Dataset, Dataset]:
    """Open the text to train on and the held-out text.

    Args:
        settings: a recipe's section `data`.
        seed: decides which documents are held out, where the recipe gives a fraction.
        least: documents to hold out and to keep, where the recipe gives a fraction.

    Raises:
        DataError: a source cannot be read, or has too few documents to hold some out.
    """
    options = reading_options(settings)
    limited = {**options, "max_document_chars": settings.max_document_chars}
    if isinstance(settings.validation, (int, float)):
        if settings.source == DEFAULT_CORPUS:
            train = load_corpus(f"{DEFAULT_CORPUS}:train", **limited)
            return train, load_corpus(f"{DEFAULT_CORPUS}:validation", **options)
        return hold_out(open_source(settings.source, **limited), settings.validation, seed, least)
    return open_source(settings.source, **limited), open_source(settings.validation, **options)


def check_tokenizer(recipe: Recipe) -> None:
    """Look at a tokenizer that a recipe names before any text is read for it.

    Raises:
        DataError: it cannot be opened.
        SettingsError: it lacks a token that the recipe needs, or has more tokens than the model has rows.
    """
    name = recipe.data.tokenizer
    if name == TRAINED:
        return
    tokenizer: Any = load_tokenizer(name)
    if recipe.arch == "gpt" and tokenizer.eos_token_id is None:
        raise SettingsError("the tokenizer has no end-of-text token (eos_token); documents cannot be told apart")
    needed = ("cls_token", "sep_token", "pad_token") if recipe.arch == "bert" else ()
    lacking = [token for token in needed if getattr(tokenizer, token) is None]
    if lacking:
        raise SettingsError(f"the tokenizer has no {', '.join(lacking)}; masked-language modelling needs BERT's tokens")
    if recipe.arch == "bert" and tokenizer.mask_token_id is None:
        raise SettingsError(f"a BERT needs a tokenizer with a mask token; {name!r} has none")
    if len(tokenizer) > recipe.model.vocab_size:
        raise SettingsError(
            f"model.vocab_size must be at least the tokenizer's {len(tokenizer)}; got {recipe.model.vocab_size}"
        )


def open_tokenizer(recipe: Recipe, train: Dataset, run_dir: Path | None) -> PreTrainedTokenizerBase:
    """Open the tokenizer that a recipe names, or train the one that it wants trained.

    Args:
        recipe: says which.
        train: text to train one on.
        run_dir: a run of this recipe, whose tokenizer is taken where there is one.
    """
    name = recipe.data.tokenizer
    if name != TRAINED:
        return load_tokenizer(name)
    if run_dir is not None and (run_dir / "tokenizer").is_dir():
        return load_tokenizer(run_dir / "tokenizer")
    kind = "bpe" if recipe.arch == "gpt" else "wordpiece"
    logger.info("training a tokenizer with %d tokens", recipe.model.vocab_size)
    return train_tokenizer(train, kind=kind, vocab_size=recipe.model.vocab_size)
