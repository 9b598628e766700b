"""Sentences to pairs of segments: where the text of a document is cut, in numpy.

A pair is a stretch of one document's tokens with a boundary in it: `first` before, `second` behind, so the two are
always neighbours. With "filled", whole sentences are gathered up to the length (a tenth of the pairs aim at a random
shorter one, so that a model knows short input too) and the boundary is the one between sentences that is nearest to a
random point. With "sentence", each side is one sentence, as in the paper. Sentences that cannot fit are trimmed at the
outer ends, where nothing is missed by the neighbour. The draws follow from seed, document and row alone.

It imports neither datasets nor transformers: worker processes start with it alone.

    pairs, counts = pair_rows(batch, tokenizer, first_row=0, pairing=pairing)
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from cottention.data.encoding import encoded, list_array, plain_tokenizer

PAIRS = pa.schema([("first", pa.list_(pa.int32())), ("second", pa.list_(pa.int32())), ("document", pa.int64())])

SPECIAL_TOKENS = 3
"""[CLS] first [SEP] second [SEP]."""

_COUNTS: tuple[str, ...] = (
    "bytes",
    "rows",
    "sentences",
    "sentences_cut",
    "sentences_dropped_no_partner",
    "pairs",
    "pairs_trimmed",
    "tokens",
    "tokens_kept",
    "tokens_dropped_trimmed",
    "tokens_dropped_no_partner",
)
_SHORTER = 0.1  # share of the pairs that aim at a shorter length, as BERT's did


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """How sentences become pairs."""

    max_length: int
    """Tokens of a pair at most, the three special ones included."""
    segments: str
    """"filled" or "sentence"."""
    seed: int
    """Of lengths and boundaries."""


class PairTask:
    """`pair_rows` with its tokenizer, which travels to other processes as text.

    Args:
        described: the tokenizer, as a tokenizer.json.
        pairing: the settings.
    """

    def __init__(self, described: str, pairing: Pairing) -> None:
        self.described, self.pairing = described, pairing
        self.tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "tokenizer": None}

    def __call__(self, task: tuple[int, pa.Table]) -> tuple[pa.Table, Counter[str]]:
        """Pair rows, given with the position in the corpus of the first of them."""
        if self.tokenizer is None:
            self.tokenizer = plain_tokenizer(self.described)
        first_row, rows = task
        return pair_rows(rows, self.tokenizer, first_row=first_row, pairing=self.pairing)


def pair_rows(
    rows: pa.Table, tokenizer: Tokenizer, *, first_row: int, pairing: Pairing
) -> tuple[pa.Table, Counter[str]]:
    """Turn rows of sentences into pairs; no pair takes text of two rows.

    Args:
        rows: columns document, sentences.
        tokenizer: adds no special tokens here.
        first_row: position in the corpus of the first of the rows.
        pairing: the settings.

    Returns:
        Columns first, second, document; and what was kept, cut and dropped.
    """
    counts = Counter(dict.fromkeys(_COUNTS, 0))
    firsts, seconds, documents = [], [], []
    for number, (document, sentences) in enumerate(_tokenised(rows, tokenizer), start=first_row):
        tokens = np.concatenate([np.empty(0, dtype=np.int32), *sentences])
        bounds = _bounds([len(sentence) for sentence in sentences], pairing, counts)
        spans = _spans(bounds, document, number, pairing, counts)
        for start, middle, end in spans:
            firsts.append(tokens[start:middle])
            seconds.append(tokens[middle:end])
        documents += [document] * len(spans)
        kept = sum(end - start for start, _, end in spans)
        counts.update(rows=1, sentences=len(sentences), tokens=len(tokens), tokens_kept=kept)
    counts.update(pairs=len(documents), bytes=_num_bytes(rows))
    return pa.table([list_array(firsts), list_array(seconds), pa.array(documents, pa.int64())], schema=PAIRS), counts


def _num_bytes(rows: pa.Table) -> int:
    flat = pc.list_flatten(rows["sentences"])  # pyright: ignore[reportAttributeAccessIssue]
    return pc.sum(pc.binary_length(flat)).as_py() or 0  # pyright: ignore[reportAttributeAccessIssue]


def _tokenised(rows: pa.Table, tokenizer: Tokenizer) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield each row's document and the ids of its sentences."""
    for document, sentences in zip(rows["document"].to_pylist(), rows["sentences"], strict=True):
        yield document, encoded(sentences.as_py(), tokenizer)


def _bounds(lengths: list[int], pairing: Pairing, counts: Counter[str]) -> list[int]:
    """Where sentences begin and end among the tokens of a row; one without a token is none."""
    room = pairing.max_length - SPECIAL_TOKENS
    bounds = [0]
    for length in lengths:
        # One that fills a pair alone has no room for a neighbour: it is cut evenly, and its parts are neighbours.
        parts = -(-length // (room // 2)) if length >= room and pairing.segments == "filled" else 1
        counts["sentences_cut"] += parts > 1
        start = bounds[-1]
        bounds += [start + length * part // parts for part in range(1, parts + 1)] if length else []
    return bounds


def _spans(
    bounds: list[int], document: int, row: int, pairing: Pairing, counts: Counter[str]
) -> list[tuple[int, int, int]]:
    """Choose the pairs of a row: where first begins, where second begins, where second ends."""
    room = pairing.max_length - SPECIAL_TOKENS
    rng = np.random.default_rng((pairing.seed, document, row))
    last = len(bounds) - 1
    spans: list[tuple[int, int, int]] = []
    begin = 0
    while begin + 2 <= last:
        middle, end = begin + 1, begin + 2
        if pairing.segments == "filled":
            end = _filled_to(bounds, begin, room, rng)
            middle = _boundary(bounds, begin, end, rng)
        spans.append(_trimmed(bounds[begin], bounds[middle], bounds[end], room, counts))
        begin = end
    if begin < last:
        counts["sentences_dropped_no_partner"] += 1
        counts["tokens_dropped_no_partner"] += bounds[last] - bounds[begin]
    return spans


def _filled_to(bounds: list[int], begin: int, room: int, rng: np.random.Generator) -> int:
    """The boundary up to which whole sentences fit; two at least, and never leaving a single one for the next pair."""
    target = int(rng.integers(2, room + 1)) if rng.random() < _SHORTER else room
    end = max(bisect_right(bounds, bounds[begin] + target) - 1, begin + 2)
    return end - 1 if end == len(bounds) - 2 and end - begin > 2 else end


def _boundary(bounds: list[int], begin: int, end: int, rng: np.random.Generator) -> int:
    point = bounds[begin] + rng.random() * (bounds[end] - bounds[begin])
    return min(range(begin + 1, end), key=lambda at: abs(bounds[at] - point))


def _trimmed(start: int, middle: int, end: int, room: int, counts: Counter[str]) -> tuple[int, int, int]:
    """Shorten the longer side to what the other leaves of the room, both to half of it at least."""
    before = min(middle - start, max(room - (end - middle), room // 2))
    behind = min(end - middle, room - before)
    dropped = (end - start) - (before + behind)
    counts["pairs_trimmed"] += dropped > 0
    counts["tokens_dropped_trimmed"] += dropped
    return middle - before, middle, middle + behind
