r"""Counting models: what a trained model has to beat, in numpy.

`UnigramModel` knows how often each token occurs, `BigramModel` which token follows which, `TrigramModel` which follows
which two. All are proper distributions over the whole vocabulary in every context, and score exactly the tokens that
`evaluate_perplexity` scores.

Unigram, add-one over V tokens, N seen:

    p(w) = (c(w) + 1) / (N + V)

Bigram, interpolated Kneser-Ney; t(v) = kinds of token that follow v, c'(w) = kinds of token that w follows, B = number
of different bigrams; a discount is n1 / (n1 + 2 n2), from how many counts are one and two:

    p(w | v) = (max(c(v, w) - D, 0) + D t(v) p'(w)) / c(v)          p(w | v) = p'(w) where v was never seen
    p'(w)    = (max(c'(w) - D', 0) + D' |{w: c'(w) > 0}| / V) / B

Trigram: the same once more, p(w | u, v) from the counts of (u, v, w), in whose place at the second order stands how
many kinds of token u come before (v, w), and below it p' as it stands here.

Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1999, section 3. Differs:
the lowest order is the uniform distribution rather than nothing, so that no token has probability 0.

    score = BigramModel.fit(train_tokens, vocab_size=4096, eos_token_id=0).score(held_out_tokens)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from cottention.data.packing import join_documents
from cottention.data.tokenization import arrow_batches
from cottention.errors import DataError
from cottention.evaluation.score import TextScore

_MERGED_AT_ONCE = 1 << 22  # bigrams, 32 MB

_LogProb = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class UnigramModel:
    """Relative frequencies with add-one smoothing."""

    log_probs: np.ndarray
    """[V] float64."""
    eos_token_id: int
    """End-of-text, the last token of each document."""

    @classmethod
    def fit(cls, tokens: Dataset, *, vocab_size: int, eos_token_id: int) -> UnigramModel:
        """Count tokens.

        Args:
            tokens: what `tokenize_documents` returns.
            vocab_size: number of tokens that can occur.
            eos_token_id: end-of-text.
        """
        counts = np.zeros(vocab_size, dtype=np.int64)
        for _, targets in _bigrams(tokens, eos_token_id, vocab_size):
            counts += np.bincount(targets, minlength=vocab_size)
        return cls(log_probs=np.log((counts + 1) / (counts.sum() + vocab_size)), eos_token_id=eos_token_id)

    def score(self, tokens: Dataset) -> TextScore:
        """Score held-out text, every token and each document's end-of-text once."""
        events = _bigrams(tokens, self.eos_token_id, len(self.log_probs))
        return _score(tokens, events, lambda _, targets: self.log_probs[targets])


@dataclass(frozen=True, kw_only=True)
class BigramModel:
    """Interpolated Kneser-Ney."""

    keys: np.ndarray
    """Bigrams seen, as context * V + token, ascending."""
    counts: np.ndarray
    """How often, in the same order."""
    context_counts: np.ndarray
    """[V]: how often each token is a context."""
    context_types: np.ndarray
    """[V]: how many kinds of token follow it."""
    lower: np.ndarray
    """[V]: the probability of each token where the context says nothing."""
    discount: float
    """What every bigram count gives up for unseen ones."""
    eos_token_id: int
    """End-of-text: context of a document's first token, and its last token."""

    @classmethod
    def fit(cls, tokens: Dataset, *, vocab_size: int, eos_token_id: int) -> BigramModel:
        """Count bigrams; memory follows the number of different ones.

        Args:
            tokens: what `tokenize_documents` returns.
            vocab_size: number of tokens that can occur.
            eos_token_id: end-of-text.
        """
        keys, counts = _count(_bigrams(tokens, eos_token_id, vocab_size), vocab_size)
        return cls.of_counts(keys, counts, vocab_size=vocab_size, eos_token_id=eos_token_id)

    @classmethod
    def of_counts(cls, keys: np.ndarray, counts: np.ndarray, *, vocab_size: int, eos_token_id: int) -> BigramModel:
        """The model of counted bigrams, whatever was counted; keys are context * V + token, ascending."""
        contexts, targets = np.divmod(keys, vocab_size)
        continuations = np.bincount(targets, minlength=vocab_size)
        discount = _discount(continuations)
        kept = np.maximum(continuations - discount, 0)
        freed = discount * np.count_nonzero(continuations)
        return cls(
            keys=keys,
            counts=counts,
            context_counts=np.bincount(contexts, weights=counts, minlength=vocab_size),
            context_types=np.bincount(contexts, minlength=vocab_size),
            lower=(kept + freed / vocab_size) / len(keys),
            discount=_discount(counts),
            eos_token_id=eos_token_id,
        )

    def probability(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return p(target | context), elementwise."""
        counts = _looked_up(contexts.astype(np.int64) * len(self.lower) + targets, self.keys, self.counts)
        total = self.context_counts[contexts]
        freed = self.discount * self.context_types[contexts]
        seen = np.maximum(counts - self.discount, 0) + freed * self.lower[targets]
        return np.where(total > 0, seen / np.maximum(total, 1), self.lower[targets])

    def score(self, tokens: Dataset) -> TextScore:
        """Score held-out text, every token and each document's end-of-text once."""
        events = _bigrams(tokens, self.eos_token_id, len(self.lower))
        return _score(tokens, events, lambda contexts, targets: np.log(self.probability(contexts, targets)))


@dataclass(frozen=True, kw_only=True)
class TrigramModel:
    """Interpolated Kneser-Ney over two tokens of context."""

    keys: np.ndarray
    """Trigrams seen, as (u * V + v) * V + token, ascending."""
    counts: np.ndarray
    """How often, in the same order."""
    contexts: np.ndarray
    """Pairs seen before a token, as u * V + v, ascending."""
    context_counts: np.ndarray
    """How often, in the same order."""
    context_types: np.ndarray
    """How many kinds of token follow them."""
    lower: BigramModel
    """Of the kinds of token before each bigram: what is asked where the pair says nothing."""
    discount: float
    """What every trigram count gives up for unseen ones."""

    @classmethod
    def fit(cls, tokens: Dataset, *, vocab_size: int, eos_token_id: int) -> TrigramModel:
        """Count trigrams; memory follows the number of different ones.

        Args:
            tokens: what `tokenize_documents` returns.
            vocab_size: number of tokens that can occur.
            eos_token_id: end-of-text; a document's first token has no other before it.
        """
        keys, counts = _count(_trigrams(tokens, eos_token_id, vocab_size), vocab_size)
        contexts, first, types = np.unique(keys // vocab_size, return_index=True, return_counts=True)
        bigrams, kinds_before = np.unique(keys % vocab_size**2, return_counts=True)
        return cls(
            keys=keys,
            counts=counts,
            contexts=contexts,
            context_counts=np.add.reduceat(counts, first),
            context_types=types,
            lower=BigramModel.of_counts(bigrams, kinds_before, vocab_size=vocab_size, eos_token_id=eos_token_id),
            discount=_discount(counts),
        )

    def probability(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return p(target | context), elementwise; contexts are u * V + v."""
        vocab_size = len(self.lower.lower)
        counts = _looked_up(contexts * vocab_size + targets, self.keys, self.counts)
        total = _looked_up(contexts, self.contexts, self.context_counts)
        freed = self.discount * _looked_up(contexts, self.contexts, self.context_types)
        below = self.lower.probability(contexts % vocab_size, targets)
        return np.where(
            total > 0, (np.maximum(counts - self.discount, 0) + freed * below) / np.maximum(total, 1), below
        )

    def score(self, tokens: Dataset) -> TextScore:
        """Score held-out text, every token and each document's end-of-text once."""
        events = _trigrams(tokens, self.lower.eos_token_id, len(self.lower.lower))
        return _score(tokens, events, lambda contexts, targets: np.log(self.probability(contexts, targets)))


def _looked_up(keys: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each key, 0 of one that is not known; known keys ascend."""
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[at] == keys, values[at], 0)


def _discount(counts: np.ndarray) -> float:
    """Estimate n1 / (n1 + 2 n2); one half where nothing occurs once: without discount the unseen would get nothing."""
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return once / (once + 2 * twice) if once else 0.5


def _bigrams(tokens: Dataset, eos_token_id: int, vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (contexts, targets) of some megabytes; every token and each document's end-of-text is a target once."""
    last = np.array([], dtype=np.int32)
    for piece, _ in join_documents(tokens, eos_token_id, outer=True):
        if len(piece) and piece.max() >= vocab_size:
            raise DataError(f"a token id {piece.max()} lies outside the vocabulary of {vocab_size}; other tokenizer?")
        stream = np.concatenate([last, piece])
        yield stream[:-1], stream[1:]
        last = stream[-1:]


def _trigrams(tokens: Dataset, eos_token_id: int, vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same with two tokens as the context, u * V + v; behind an end-of-text what came before does not count."""
    last = np.array([eos_token_id], dtype=np.int64)
    for contexts, targets in _bigrams(tokens, eos_token_id, vocab_size):
        v = contexts.astype(np.int64)
        u = np.concatenate([last, v])[:-1]
        yield np.where(v == eos_token_id, eos_token_id, u) * vocab_size + v, targets
        last = v[-1:] if len(v) else last


def _count(events: Iterator[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Different (context, token), as context * V + token, ascending, and how often each occurs."""
    keys, counts = np.array([], dtype=np.int64), np.array([], dtype=np.int64)
    waiting: list[np.ndarray] = []
    num_waiting = 0
    for contexts, targets in events:
        waiting.append(contexts.astype(np.int64) * vocab_size + targets)
        num_waiting += len(targets)
        # Merging costs as much as what is there already, so it waits until as much again has come.
        if num_waiting > max(len(keys), _MERGED_AT_ONCE):
            keys, counts = _merge(keys, counts, waiting)
            waiting, num_waiting = [], 0
    keys, counts = _merge(keys, counts, waiting)
    if not len(keys):
        raise DataError("cannot count bigrams of an empty corpus")
    return keys, counts


def _merge(keys: np.ndarray, counts: np.ndarray, more: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    all_keys = np.concatenate([keys, *more])
    weights = np.concatenate([counts, np.ones(len(all_keys) - len(keys), dtype=np.int64)])
    merged, place = np.unique(all_keys, return_inverse=True)
    return merged, np.bincount(place, weights=weights, minlength=len(merged)).astype(np.int64)


def _score(tokens: Dataset, events: Iterator[tuple[np.ndarray, np.ndarray]], log_prob: _LogProb) -> TextScore:
    nats, num_tokens = 0.0, 0
    for contexts, targets in events:
        nats -= float(log_prob(contexts, targets).sum())
        num_tokens += len(targets)
    num_bytes = sum(int(table["num_bytes"].to_numpy().sum()) for table in arrow_batches(tokens))
    if not num_tokens:
        raise DataError("cannot score an empty text")
    return TextScore(nats=nats, num_tokens=num_tokens, num_bytes=num_bytes)
