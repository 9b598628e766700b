"""From a recipe's data section to examples: corpus, held-out part, tokenizer, windows or sentence pairs, collators.

All of it is memory-mapped Arrow that `cottention.data` caches by content and settings, so that a second run on the same
text starts at once. A tokenizer trained for the run lies in its directory.

    text = prepare_text(recipe, run_dir)
    text.stream(recipe)[0], text.tokenizer, text.held_out
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from cottention.data.collators import MaskedLMCollator
from cottention.data.documents import DocumentWindows
from cottention.data.packing import pack_mlm_windows
from cottention.data.pair_collator import PairCollator
from cottention.data.pair_examples import PairExamples
from cottention.data.tokenization import tokenize_documents
from cottention.errors import SettingsError
from cottention.logging import get_logger
from cottention.training.corpora import corpus_tokens, token_corpus
from cottention.training.documents import check_tokenizer, open_documents, open_tokenizer
from cottention.training.gpt_text import gpt_examples, gpt_stream, spread
from cottention.training.held_out import HeldOut
from cottention.training.held_out_carried import CarriedHeldOut
from cottention.training.lanes import LaneStream
from cottention.training.pair_text import open_pairs
from cottention.training.recipe import BertRecipe, GPTRecipe, Recipe
from cottention.training.stream import ExampleStream, FallingShares, PassCollator, PhasedStream

_IN_FINGERPRINT = 64

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreparedText:
    """Everything that training needs to know about text."""

    tokenizer: PreTrainedTokenizerBase
    """Trained for this run, or the recipe's."""
    train: Dataset | PairExamples | DocumentWindows
    """Windows, sentence pairs or documents to train on."""
    long: Dataset | PairExamples | None
    """Those of the last part of the run, where they are longer."""
    collator: Any
    """Turns examples of the stream into a batch."""
    held_out: HeldOut | CarriedHeldOut
    """Measures a model on the held-out text, data.eval_tokens at most."""

    def stream(self, recipe: Recipe) -> ExampleStream | PhasedStream | FallingShares | LaneStream:
        """All examples of a run, in their order."""
        if isinstance(recipe, GPTRecipe):
            assert not isinstance(self.train, PairExamples)
            return gpt_stream(recipe, self.train)
        assert isinstance(recipe, BertRecipe)
        stream = self._bert_stream(recipe)
        first, last = recipe.data.mlm_probability_start, recipe.data.mlm_probability
        if first is None:
            return stream
        return FallingShares(stream, first=first, last=last, examples_per_step=recipe.training.global_batch_size)

    def _bert_stream(self, recipe: BertRecipe) -> ExampleStream | PhasedStream:
        training = recipe.training
        num_examples = training.max_steps * training.global_batch_size
        if self.long is None:
            return ExampleStream(self.train, num_examples=num_examples, seed=training.seed)
        num_long = recipe.num_long_steps * training.global_batch_size
        return PhasedStream(
            [
                ExampleStream(self.train, num_examples=num_examples - num_long, seed=training.seed),
                ExampleStream(self.long, num_examples=num_long, seed=training.seed),
            ]
        )

    def training_collator(self, recipe: Recipe) -> Any:
        """Turns a micro batch of the stream into one batch, or into as many as its longer examples need."""
        if self.long is None:
            return self.collator
        assert isinstance(recipe, BertRecipe)
        return PassCollator(self.collator, [1, recipe.data.long_ratio])

    def epochs_after(self, step: int, recipe: Recipe) -> float:
        """How often so many steps have read the text."""
        num_long = 0
        if self.long is not None:
            assert isinstance(recipe, BertRecipe)
            num_long = max(0, step - (recipe.training.max_steps - recipe.num_long_steps))
        epochs = (step - num_long) / len(self.train) + (num_long / len(self.long) if self.long is not None else 0)
        return epochs * recipe.training.global_batch_size

    def fingerprint(self) -> str:
        """Name the examples to train on by their number and a sample of them: a run may go on with no others."""
        digest = hashlib.blake2b(digest_size=16)
        for examples in (self.train, self.long):
            if examples is not None:
                digest.update(str(len(examples)).encode())
                for ids in _sample(examples, _IN_FINGERPRINT):
                    digest.update(np.asarray(ids, dtype=np.int64).tobytes())
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
    check_tokenizer(recipe)
    if isinstance(recipe, GPTRecipe) and (corpus := token_corpus(recipe.data.source)) is not None:
        return _prepare_gpt(recipe, *corpus_tokens(corpus, recipe.data, seed=recipe.training.seed))
    if isinstance(recipe, BertRecipe) and recipe.data.next_sentence:
        pairs = open_pairs(recipe, run_dir)
        return _prepared_bert(recipe, pairs.tokenizer, pairs.train, pairs.long, pairs.held_out)
    train, validation = open_documents(recipe.data, seed=recipe.training.seed)
    tokenizer = open_tokenizer(recipe, train, run_dir)
    if isinstance(recipe, GPTRecipe):
        return _prepare_gpt(
            recipe, tokenize_documents(train, tokenizer), tokenize_documents(validation, tokenizer), tokenizer
        )
    assert isinstance(recipe, BertRecipe)
    length, long_length = recipe.data.sequence_length, recipe.data.long_sequence_length
    windows = _windows(train, tokenizer, length, tail="drop")
    long = None if long_length is None else _windows(train, tokenizer, long_length, tail="drop")
    return _prepared_bert(recipe, tokenizer, windows, long, _windows(validation, tokenizer, length, tail="pad"))


def _prepare_gpt(
    recipe: GPTRecipe, train: Dataset, validation: Dataset, tokenizer: PreTrainedTokenizerBase
) -> PreparedText:
    """From tokens on."""
    examples = gpt_examples(recipe, train, validation, tokenizer)
    what = "documents, at most" if recipe.data.mode == "document" else "windows of"
    length = recipe.data.sequence_length
    logger.info("%d %s %d tokens to train on, %d held out", len(examples.train), what, length, examples.num_held_out)
    return PreparedText(
        tokenizer=tokenizer,
        train=examples.train,
        long=None,
        collator=examples.collator,
        held_out=examples.held_out,
    )


def _prepared_bert(
    recipe: BertRecipe,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset | PairExamples,
    long: Dataset | PairExamples | None,
    held_out: Dataset | PairExamples,
) -> PreparedText:
    length = recipe.data.sequence_length
    what = "sentence pairs" if recipe.data.next_sentence else "windows"
    logger.info("%d %s of %d tokens to train on, %d held out", len(examples), what, length, len(held_out))
    if long is not None:
        logger.info("%d longer %s for the last part of the run", len(long), what)
    return PreparedText(
        tokenizer=tokenizer,
        train=examples,
        long=long,
        collator=_collator(recipe, tokenizer, seed=recipe.training.seed),
        held_out=HeldOut(
            spread(held_out, recipe.data.eval_tokens // length),
            collator=_collator(recipe, tokenizer, seed=recipe.training.seed + 1),
            arch=recipe.arch,
            batch_size=recipe.training.micro_batch_size,
            targets_per_byte=None,
        ),
    )


def _windows(documents: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, *, tail: str) -> Dataset:
    special: Any = tokenizer  # its ids are made at run time, which a type checker reads as anything at all
    return pack_mlm_windows(
        tokenize_documents(documents, tokenizer),
        length,
        cls_token_id=special.cls_token_id,
        sep_token_id=special.sep_token_id,
        pad_token_id=special.pad_token_id,
        tail=tail,
    )


def _sample(examples: Dataset | PairExamples | DocumentWindows, most: int) -> Iterator[Any]:
    """Tokens of some examples."""
    some = spread(examples, most)
    if isinstance(some, PairExamples):
        for first, second in some.raw(np.arange(len(some))):
            yield from (first, second)
    else:
        for index in range(len(some)):
            yield some[index]["input_ids"]


def _collator(recipe: BertRecipe, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Any:
    if tokenizer.mask_token_id is None:
        raise SettingsError(f"a BERT needs a tokenizer with a mask token; {recipe.data.tokenizer!r} has none")
    whole_words = recipe.data.whole_word_masking
    if recipe.data.next_sentence:
        return PairCollator(
            tokenizer,
            mlm_probability=recipe.data.mlm_probability,
            seed=seed,
            whole_words=whole_words,
            unpadded=recipe.training.unpadded,
        )
    return MaskedLMCollator(tokenizer, recipe.data.mlm_probability, seed, whole_words=whole_words)
