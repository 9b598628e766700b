"""The counting baselines are proper distributions, equal to fractions by hand, and score what models are scored on."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cottention.data import tokenize_documents
from cottention.errors import DataError
from cottention.evaluation import BigramModel, TrigramModel, UnigramModel, evaluate_perplexity
from tests import tiny

EOS, V = 0, 5
TRAIN = [[1, 2, 1], [1, 3]]  # 0 1 2 1 0 1 3 0; 4 never occurs
documents = st.lists(st.lists(st.integers(1, V - 1), max_size=8), min_size=1, max_size=6)


def corpus(rows: list[list[int]], num_bytes: int = 1) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [np.array(row, dtype=np.int32) for row in rows], "num_bytes": [num_bytes] * len(rows)}
    ).add_column("ends_document", [True] * len(rows))


def sequence(rows: list[list[int]]) -> list[int]:
    return [EOS, *(token for row in rows for token in [*row, EOS])]


def fitted(rows: list[list[int]]) -> BigramModel:
    return BigramModel.fit(corpus(rows), vocab_size=V, eos_token_id=EOS)


def kneser_ney(rows: list[list[int]]) -> dict[tuple[int, int], Fraction]:
    """Interpolated Kneser-Ney by dictionaries and fractions."""
    ids = sequence(rows)
    counts = Counter(itertools.pairwise(ids))
    followers, leaders, totals = defaultdict(set), defaultdict(set), Counter()
    for (v, w), count in counts.items():
        followers[v].add(w)
        leaders[w].add(v)
        totals[v] += count

    def discount(values: list[int]) -> Fraction:
        once, twice = values.count(1), values.count(2)
        return Fraction(once, once + 2 * twice) if once else Fraction(1, 2)

    continuations = [len(leaders[w]) for w in range(V)]
    D, E = discount(list(counts.values())), discount(continuations)
    num_seen = sum(each > 0 for each in continuations)
    lower = [(max(each - E, 0) + E * Fraction(num_seen, V)) / len(counts) for each in continuations]
    return {
        (v, w): (max(counts[v, w] - D, 0) + D * len(followers[v]) * lower[w]) / totals[v] if totals[v] else lower[w]
        for v in range(V)
        for w in range(V)
    }


def trigram_truth(rows: list[list[int]]) -> dict[tuple[int, int, int], Fraction]:
    """Interpolated Kneser-Ney of three orders by dictionaries and fractions."""
    counts: Counter[tuple[int, int, int]] = Counter()
    for row in rows:  # a document's first token stands behind two ends of text
        ids = [EOS, EOS, *row, EOS]
        counts.update(zip(ids, ids[1:], ids[2:], strict=False))

    def discount(values: list[int]) -> Fraction:
        once, twice = values.count(1), values.count(2)
        return Fraction(once, once + 2 * twice) if once else Fraction(1, 2)

    def interpolated(counts: dict, lower: dict) -> dict:
        """p of every context that `lower` knows the shorter of; counts and results by (*context, token)."""
        D, table = discount(list(counts.values())), {}
        for context in itertools.product(range(V), repeat=len(next(iter(counts))) - 1):
            seen = {w: counts.get((*context, w), 0) for w in range(V)}
            total, kinds = sum(seen.values()), sum(count > 0 for count in seen.values())
            for w in range(V):
                below = lower[(*context[1:], w)]
                table[(*context, w)] = (max(seen[w] - D, 0) + D * kinds * below) / total if total else below
        return table

    kinds_before = Counter((v, w) for _, v, w in counts)
    continuations = Counter(w for _, w in kinds_before)
    unigrams = interpolated({(w,): continuations[w] for w in continuations}, {(w,): Fraction(1, V) for w in range(V)})
    return interpolated(counts, interpolated(kinds_before, unigrams))


@settings(deadline=None, max_examples=40)
@given(documents)
def test_every_pair_of_tokens_has_a_proper_distribution_that_equals_fractions(rows):
    truth = trigram_truth(rows)
    model = TrigramModel.fit(corpus(rows), vocab_size=V, eos_token_id=EOS)
    contexts, targets = np.divmod(np.arange(V**3), V)
    probabilities = model.probability(contexts, targets)
    np.testing.assert_allclose(probabilities, [float(truth[key]) for key in sorted(truth)], rtol=1e-12)
    np.testing.assert_allclose(probabilities.reshape(V * V, V).sum(1), 1, rtol=1e-12)


def test_a_trigram_score_begins_each_document_anew():
    rows = np.random.default_rng(1).integers(1, V, (20, 7)).tolist()
    truth = trigram_truth(rows)
    model = TrigramModel.fit(corpus(rows), vocab_size=V, eos_token_id=EOS)
    held_out = [[3, 1], [2]]
    keys = [(0, 0, 3), (0, 3, 1), (3, 1, 0), (0, 0, 2), (0, 2, 0)]
    expected = -sum(math.log(truth[key]) for key in keys)
    assert model.score(corpus(held_out)).nats == pytest.approx(expected, rel=1e-12)


def test_unigram_by_hand():
    model = UnigramModel.fit(corpus(TRAIN), vocab_size=V, eos_token_id=EOS)
    # 7 targets: 0 twice, 1 three times, 2 and 3 once; one more for each of the 5 tokens.
    np.testing.assert_allclose(np.exp(model.log_probs), np.array([3, 4, 2, 2, 1]) / 12, rtol=1e-15)
    score = model.score(corpus([[4], [1, 1]], num_bytes=10))
    assert score.nats == pytest.approx(-math.log(1 / 12) - 2 * math.log(4 / 12) - 2 * math.log(3 / 12), rel=1e-14)
    assert (score.num_tokens, score.num_bytes) == (5, 20)


def test_bigram_by_hand():
    model = fitted(TRAIN)
    # Bigrams 01 twice, 12 21 10 13 30 once: B = 6, D = 5 / (5 + 2). Leaders: 2 of 0, 2 of 1, 1 of 2, 1 of 3;
    # two ones and two twos: D' = 2 / (2 + 4), and 4 of 5 tokens have leaders.
    assert model.discount == pytest.approx(5 / 7, rel=1e-15)
    uniform = 1 / 3 * 4 / 5
    lower = np.array([2 - 1 / 3 + uniform, 2 - 1 / 3 + uniform, 1 - 1 / 3 + uniform, 1 - 1 / 3 + uniform, uniform]) / 6
    np.testing.assert_allclose(model.lower, lower, rtol=1e-15)

    def p(v: int, w: int) -> float:
        return float(model.probability(np.array([v]), np.array([w]))[0])

    assert p(0, 1) == pytest.approx((2 - 5 / 7 + 5 / 7 * 1 * lower[1]) / 2, rel=1e-14)
    assert p(1, 2) == pytest.approx((1 - 5 / 7 + 5 / 7 * 3 * lower[2]) / 3, rel=1e-14)
    assert p(1, 4) == pytest.approx((5 / 7 * 3 * lower[4]) / 3, rel=1e-14)
    assert p(4, 3) == pytest.approx(lower[3], rel=1e-14)
    score = model.score(corpus([[1, 2], [4]], num_bytes=3))
    expected = [p(0, 1), p(1, 2), p(2, 0), p(0, 4), p(4, 0)]
    assert score.nats == pytest.approx(-sum(map(math.log, expected)), rel=1e-14)
    assert (score.num_tokens, score.num_bytes) == (5, 6)


@settings(deadline=None, max_examples=60)
@given(documents)
def test_every_context_has_a_proper_distribution_that_equals_fractions(rows):
    model, truth = fitted(rows), kneser_ney(rows)
    contexts, targets = np.divmod(np.arange(V * V), V)
    probabilities = model.probability(contexts, targets)
    np.testing.assert_allclose(probabilities, [float(truth[v, w]) for v in range(V) for w in range(V)], rtol=1e-12)
    assert (probabilities > 0).all()
    np.testing.assert_allclose(probabilities.reshape(V, V).sum(1), 1, rtol=1e-12)
    unigram = UnigramModel.fit(corpus(rows), vocab_size=V, eos_token_id=EOS)
    assert np.exp(unigram.log_probs).sum() == pytest.approx(1, rel=1e-12)


def test_counts_where_nothing_occurs_once_still_leave_something_for_the_unseen():
    model = fitted([[1], [1]])  # 0 1 0 1 0: both bigrams twice
    assert model.discount == 0.5
    assert model.probability(np.array([1]), np.array([2]))[0] > 0


def test_how_the_corpus_falls_into_pieces_does_not_matter(monkeypatch: pytest.MonkeyPatch):
    rows = np.random.default_rng(0).integers(1, V, (20, 7)).tolist()
    whole, whole_score = fitted(rows), fitted(rows).score(corpus(rows))
    import cottention.data.packing as packing

    def one_row_at_a_time(dataset: Dataset):
        yield from dataset.with_format("arrow").iter(1)

    monkeypatch.setattr(packing, "arrow_batches", one_row_at_a_time)
    monkeypatch.setattr("cottention.evaluation.ngram._MERGED_AT_ONCE", 3)
    pieces = fitted(rows)
    for name in ("keys", "counts", "context_counts", "context_types", "lower"):
        np.testing.assert_array_equal(getattr(pieces, name), getattr(whole, name))
    assert pieces.score(corpus(rows)).nats == pytest.approx(whole_score.nats, rel=1e-12)


def test_baselines_score_the_tokens_that_a_model_is_scored_on():
    tokenizer = tiny.bpe_tokenizer()
    tokens = tokenize_documents(Dataset.from_dict({"text": tiny.TEXTS}), tokenizer)
    scored = evaluate_perplexity(tiny.gpt(), tokenizer, tokens, context=16)
    for kind in (UnigramModel, BigramModel, TrigramModel):
        score = kind.fit(tokens, vocab_size=len(tokenizer), eos_token_id=0).score(tokens)
        assert (score.num_tokens, score.num_bytes) == (scored.num_tokens, scored.num_bytes)


@pytest.mark.parametrize("kind", [UnigramModel, BigramModel])
def test_what_cannot_be_counted_is_one_line(kind):
    model = kind.fit(corpus(TRAIN), vocab_size=V, eos_token_id=EOS)
    nothing = corpus(TRAIN).select([])
    with pytest.raises(DataError, match="cannot score an empty text"):
        model.score(nothing)
    for use in (model.score, lambda tokens: kind.fit(tokens, vocab_size=V, eos_token_id=EOS)):
        with pytest.raises(DataError, match=r"a token id 7 lies outside the vocabulary of 5; other tokenizer\?"):
            use(corpus([[1, 7]]))
    with pytest.raises(DataError, match="empty corpus"):
        BigramModel.fit(nothing, vocab_size=V, eos_token_id=EOS)
