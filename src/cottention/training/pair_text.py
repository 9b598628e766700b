"""From a recipe's data section to sentence pairs, of every length that the run reads.

`data.source` is raw text, whose pairs are made through the cache; or what `cottention data` made of a text: corpora of
sentences, or corpora of pairs, which are told apart by the length and the tokenizer in their manifests. Whole documents
are held out, the same ones at every length.

    pairs = open_pairs(recipe, run_dir)
    pairs.train, pairs.long, pairs.held_out, pairs.tokenizer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from cottention.data.pair_examples import PairExamples
from cottention.data.sentences import described_tokenizer, hash_of, sentence_documents, sentence_pairs
from cottention.data.shards import Corpus, is_corpus, open_corpus
from cottention.data.tokenization import arrow_batches
from cottention.data.tokenizer import load_tokenizer
from cottention.errors import DataError, SettingsError
from cottention.training.corpora import TRAINED
from cottention.training.documents import open_documents, open_tokenizer
from cottention.training.recipe import BertRecipe
from cottention.training.splits import choose

_SENTENCES, _PAIRS = "bert-sentences", "bert-pairs"
_NEEDED = ("cls_token", "sep_token", "mask_token", "pad_token")


@dataclass(frozen=True, kw_only=True)
class PairText:
    """The pairs of a run."""

    tokenizer: PreTrainedTokenizerBase
    """What made their tokens."""
    train: PairExamples
    """To train on."""
    long: PairExamples | None
    """Longer ones, for the last part of the run."""
    held_out: PairExamples
    """Of documents that are not trained on."""


def open_pairs(recipe: BertRecipe, run_dir: Path | None) -> PairText:
    """Open or make the pairs of a recipe.

    Args:
        recipe: its sections `data` and `model` (the size of a vocabulary to train).
        run_dir: the directory of a run of this recipe, whose tokenizer is taken; None trains it again.

    Raises:
        DataError: the text cannot be used, or has too few documents.
        SettingsError: the tokenizer does not fit the recipe or the corpora.
    """
    lengths = [length for length in (recipe.data.sequence_length, recipe.data.long_sequence_length) if length]
    corpora = _corpora_of(recipe.data.source, "data.source")
    make = _from_text if corpora is None else _from_corpora
    tokenizer, train, held_out = make(recipe, run_dir, lengths, corpora or [])
    seed = recipe.training.seed
    sets = [
        PairExamples(parts, max_length=length, seed=seed, name="the text to train on")
        for parts, length in zip(train, lengths, strict=True)
    ]
    return PairText(
        tokenizer=tokenizer,
        train=sets[0],
        long=sets[1] if len(sets) > 1 else None,
        held_out=PairExamples(held_out, max_length=lengths[0], seed=seed + 1, name="the held-out text"),
    )


Parts = list[Dataset]


def _from_text(
    recipe: BertRecipe, run_dir: Path | None, lengths: Sequence[int], _corpora: list[Corpus]
) -> tuple[PreTrainedTokenizerBase, list[Parts], Parts]:
    train, held_out = open_documents(recipe.data, seed=recipe.training.seed, least=2)
    tokenizer = open_tokenizer(recipe, train, run_dir)
    sentences = sentence_documents(train)
    made = [[sentence_pairs(sentences, tokenizer, length, seed=recipe.training.seed)] for length in lengths]
    held_out_pairs = sentence_pairs(sentence_documents(held_out), tokenizer, lengths[0], seed=recipe.training.seed)
    return tokenizer, made, [held_out_pairs]


def _from_corpora(
    recipe: BertRecipe, _run_dir: Path | None, lengths: Sequence[int], corpora: list[Corpus]
) -> tuple[PreTrainedTokenizerBase, list[Parts], Parts]:
    tokenizer = _tokenizer_of(recipe, corpora)
    seed, validation = recipe.training.seed, recipe.data.validation
    by_length = [_pairs_of(corpora, length, tokenizer, seed, "data.source") for length in lengths]
    if isinstance(validation, (int, float)):
        held_out_documents = _held_out_documents([part for parts in by_length for part in parts], validation, seed)
        split = [[_rows_of(part, held_out_documents[origin]) for part, origin in parts] for parts in by_length]
        train = [
            [_selected(part, ~rows) for (part, _), rows in zip(parts, held, strict=True)]
            for parts, held in zip(by_length, split, strict=True)
        ]
        return tokenizer, train, [_selected(part, rows) for (part, _), rows in zip(by_length[0], split[0], strict=True)]
    others = _corpora_of(validation, "data.validation")
    if others is None:
        raise SettingsError(
            f"data.validation must be a fraction or corpora of `cottention data`, as data.source is; got {validation!r}"
        )
    held_out = _pairs_of(others, lengths[0], tokenizer, seed, "data.validation")
    return tokenizer, [[part for part, _ in parts] for parts in by_length], [part for part, _ in held_out]


def _corpora_of(source: str | Sequence[str], name: str) -> list[Corpus] | None:
    """The corpora that are named; None when text is."""
    names = [source] if isinstance(source, str) else list(source)
    found = [one for one in names if is_corpus(one)]
    if not found:
        return None
    if len(found) < len(names):
        other = next(one for one in names if one not in found)
        raise SettingsError(f"{name} must be text or corpora, not both; {found[0]} is a corpus and {other} is not")
    corpora = [open_corpus(one) for one in names]
    for corpus in corpora:
        if corpus.kind not in (_SENTENCES, _PAIRS):
            open_corpus(corpus.path, kind=_PAIRS)  # says which command makes what is needed
    return corpora


def _tokenizer_of(recipe: BertRecipe, corpora: list[Corpus]) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer or, where it would be trained, the one that made the pairs."""
    own = next((corpus.tokenizer_path for corpus in corpora if corpus.tokenizer_path is not None), None)
    if recipe.data.tokenizer != TRAINED:
        return load_tokenizer(recipe.data.tokenizer)
    if own is None:
        raise SettingsError(
            f"data.tokenizer must be named for a corpus of sentences; got {TRAINED!r} and {corpora[0].path}"
        )
    return load_tokenizer(own)


def _pairs_of(
    corpora: list[Corpus], length: int, tokenizer: PreTrainedTokenizerBase, seed: int, name: str
) -> list[tuple[Dataset, str]]:
    """Pairs of a length, each with a name for the text that they come from."""
    wanted = hash_of(described_tokenizer(tokenizer, _NEEDED))
    parts, lengths = [], []
    for corpus in corpora:
        if corpus.kind == _SENTENCES:
            pairs = sentence_pairs(corpus.dataset, tokenizer, length, seed=seed)
            parts.append((pairs, _origin(corpus.manifest)))
            continue
        settings = corpus.manifest["settings"]
        lengths.append(settings["max_length"])
        if settings["max_length"] != length:
            continue
        if settings["tokenizer"]["sha256"] != wanted:
            raise SettingsError(
                f"the pairs in {corpus.path} were made with another tokenizer than data.tokenizer, which must be "
                f"{corpus.tokenizer_path}"
            )
        parts.append((corpus.dataset, _origin(settings["corpus"])))
    if not parts:
        held = ", ".join(map(str, sorted(set(lengths))))
        raise DataError(
            f"{name} needs a corpus with pairs of {length} tokens; got {held}; "
            f"`cottention data tokenize bert --max-length {length}` makes one"
        )
    return parts


def _origin(manifest: dict[str, Any]) -> str:
    """Name a corpus of sentences by what decides its documents."""
    return hash_of(repr(sorted((name, str(manifest[name])) for name in ("kind", "settings", "rows"))))


def _held_out_documents(parts: list[tuple[Dataset, str]], fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Which documents of each text are held out: a question of seed, text and number, so the same at any length."""
    origins = list(dict.fromkeys(origin for _, origin in parts))
    found = [(origin, *_documents_of([part for part, other in parts if other == origin])) for origin in origins]
    draws = np.array([_draw(seed, origin, number) for origin, numbers, _ in found for number in numbers])
    num_drawn = int((draws < fraction).sum())
    if not num_drawn:
        raise DataError(
            f"the held-out text holds no sentence pair: data.validation = {fraction:g} of {len(draws):,} documents is "
            "none; ask for more, or name another text as data.validation"
        )
    sizes = np.concatenate([size for *_, size in found])
    chosen = choose(sizes, np.argsort(draws, kind="stable"), fraction, num_held_out=num_drawn)
    ends = np.cumsum([len(numbers) for _, numbers, _ in found])[:-1]
    return {origin: numbers[held] for (origin, numbers, _), held in zip(found, np.split(chosen, ends), strict=True)}


def _draw(seed: int, origin: str, number: int) -> float:
    return int(hash_of(f"{seed} {origin} {number}")[:12], 16) / 16**12


def _documents_of(parts: list[Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents in pairs of one text, in order, and their tokens."""
    documents, tokens = [], []
    for part in parts:
        for table in arrow_batches(part.select_columns(["document", "first", "second"])):
            lengths = sum(pc.list_value_length(table[name]).to_numpy() for name in ("first", "second"))  # pyright: ignore
            numbers, rows = np.unique(table["document"].to_numpy(), return_inverse=True)
            documents.append(numbers)
            tokens.append(np.bincount(rows, weights=lengths))
    numbers, rows = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *documents]), return_inverse=True)
    return numbers, np.bincount(rows, weights=np.concatenate([np.empty(0), *tokens]), minlength=len(numbers))


def _rows_of(pairs: Dataset, documents: np.ndarray) -> np.ndarray:
    """Which rows are of these documents."""
    tables = arrow_batches(pairs.select_columns(["document"]))
    return np.concatenate([np.isin(table["document"].to_numpy(), documents) for table in tables])


def _selected(pairs: Dataset, rows: np.ndarray) -> Dataset:
    return pairs.select(np.flatnonzero(rows))
