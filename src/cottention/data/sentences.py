"""Documents to sentences, and sentences to pairs of segments: BERT's text, cached like every other step.

    corpus = load_corpus("wiki.jsonl.gz")
    sentences = sentence_documents(corpus, num_proc=2)                  # columns document, sentences
    pairs = sentence_pairs(sentences, tokenizer, max_length=128)        # columns first, second, document

`first` and `second` are neighbours in one document and hold no special tokens; a collator that wants strangers takes
the second of another document. A document of more than some hundred thousand characters comes as several rows of
sentences with the same number; no pair takes text of two rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from cottention.data.arrow_cache import cached_dataset, fingerprint_of
from cottention.data.pairing import SPECIAL_TOKENS, Pairing, PairTask
from cottention.data.parallel import ordered_map
from cottention.data.splitting import MIN_SENTENCES, SPLITTER, Piece, SplitTask, check_language, pieces_of
from cottention.data.tokenization import arrow_batches, check_has_text
from cottention.errors import DataError, SettingsError, did_you_mean
from cottention.logging import get_logger

SENTENCES_VERSION = 1
"""Part of every key: raise it when the same text shall give other sentences."""
PAIRS_VERSION = 1
"""Part of every key: raise it when the same sentences shall give other pairs."""

SENTENCE_FEATURES = Features({"document": Value("int64"), "sentences": List(Value("string"))})
PAIR_FEATURES = Features({"first": List(Value("int32")), "second": List(Value("int32")), "document": Value("int64")})
SEGMENTS = ("filled", "sentence")

_TASK_CHARACTERS = 1 << 20
_SHORTEST_PAIR = 2 * SPECIAL_TOKENS + 2

logger = get_logger(__name__)


def sentence_documents(
    documents: Dataset,
    *,
    num_proc: int | None = None,
    language: str = "en",
    min_sentences: int = MIN_SENTENCES,
) -> Dataset:
    """Split documents into sentences, cached on disk.

    Args:
        documents: rows with the columns text and, where a document has several rows, ends_document.
        num_proc: processes; None works in this one. With more, a script must guard its main, as for every spawned
            process.
        language: of the text, a code such as "en".
        min_sentences: documents with fewer are left out.

    Returns:
        Dataset with columns document (the document's position in the source) and sentences.

    Raises:
        DataError: there is no text, or none with sentences.
    """
    check_has_text(documents)
    work = new_splitting(language=language, rows="documents", min_sentences=min_sentences)
    counts: Counter[str] = Counter()
    results = ordered_map(work, tasks_of(pieces_of(_text_rows(documents))), num_proc=num_proc)
    key = ["sentences", SENTENCES_VERSION, SPLITTER, fingerprint_of(documents), language, min_sentences]
    dataset = cached_dataset(_counted(results, counts), SENTENCE_FEATURES, key=key)
    _log_sentences(counts)
    if not len(dataset):
        raise DataError(f"the corpus has no document of at least {min_sentences} sentences")
    return dataset


def sentence_pairs(
    sentences: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    segments: str = "filled",
    seed: int = 0,
    num_proc: int | None = None,
) -> Dataset:
    """Turn sentences into pairs of neighbouring segments, cached on disk.

    Args:
        sentences: what `sentence_documents` returns, or the dataset of a corpus that `cottention data build bert` made.
        tokenizer: a fast one with BERT's special tokens, which it does not add here.
        max_length: tokens of a pair at most, with [CLS] and two [SEP].
        segments: "filled" (whole sentences up to the length, cut between two of them) or "sentence" (one each).
        seed: of lengths and boundaries.
        num_proc: processes; None works in this one, where a fast tokenizer uses all cores by itself.

    Returns:
        Dataset with columns first, second, document; len(first) + len(second) + 3 <= max_length.

    Raises:
        SettingsError: a setting that makes no sense, or a tokenizer that cannot make pairs.
        DataError: there are no sentences, or none with a neighbour.
    """
    check_has_sentences(sentences)
    pairing = new_pairing(max_length, segments, seed)
    described = described_tokenizer(tokenizer, ("cls_token", "sep_token", "mask_token", "pad_token"))
    counts: Counter[str] = Counter()
    results = ordered_map(PairTask(described, pairing), numbered(arrow_batches(sentences)), num_proc=num_proc)
    key = ["pairs", PAIRS_VERSION, fingerprint_of(sentences), hash_of(described), max_length, segments, seed]
    dataset = cached_dataset(_counted(results, counts), PAIR_FEATURES, key=key)
    _log_pairs(counts)
    if not len(dataset):
        raise DataError("the corpus has no two neighbouring sentences, so there are no pairs")
    return dataset


def new_splitting(*, language: str, rows: str, min_sentences: int) -> SplitTask:
    """Check the settings of sentences.

    Raises:
        SettingsError: one of them makes no sense.
    """
    if min_sentences < 1:
        raise SettingsError(f"min_sentences must be at least 1; got {min_sentences}")
    check_language(language)
    return SplitTask(language=language, rows=rows, min_sentences=min_sentences)


def new_pairing(max_length: int, segments: str, seed: int) -> Pairing:
    """Check the settings of pairs.

    Raises:
        SettingsError: one of them makes no sense.
    """
    if segments not in SEGMENTS:
        raise SettingsError(
            f"segments must be {' or '.join(SEGMENTS)}; got {segments!r}{did_you_mean(segments, SEGMENTS)}"
        )
    if max_length < _SHORTEST_PAIR:
        raise SettingsError(f"max_length must be at least {_SHORTEST_PAIR}; got {max_length}")
    if seed < 0:
        raise SettingsError(f"seed must be 0 or more; got {seed}")
    return Pairing(max_length=max_length, segments=segments, seed=seed)


def described_tokenizer(tokenizer: PreTrainedTokenizerBase, needed: tuple[str, ...]) -> str:
    """Describe a fast tokenizer in full, as text: all that decides its ids.

    Args:
        tokenizer: any; padding and truncation, which earlier calls leave behind, are left out.
        needed: the special tokens it must have, e.g. "cls_token".

    Raises:
        SettingsError: it is not a fast one, or lacks a special token.
    """
    if missing := [name for name in needed if getattr(tokenizer, name) is None]:
        raise SettingsError(f"the tokenizer has no {', '.join(missing)}, which this kind of training needs")
    if not tokenizer.is_fast:
        raise SettingsError(f"a fast tokenizer is needed (one with a tokenizer.json); got {type(tokenizer).__name__}")
    described = json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    return json.dumps({**described, "truncation": None, "padding": None}, sort_keys=True)


def hash_of(text: str) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def check_has_sentences(dataset: Dataset) -> None:
    """Refuse a dataset that is not one of sentences.

    Raises:
        DataError: a column is missing, or there are no rows.
    """
    names = dataset.column_names
    if missing := [name for name in SENTENCE_FEATURES if name not in names]:
        what = ", ".join(map(repr, names)) or "none"
        raise DataError(f"pairs are made of the columns 'document' and 'sentences'; {missing[0]!r} is not in {what}")
    if not len(dataset):
        raise DataError("the dataset has no rows, so there are no sentences to pair")


def tasks_of(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Gather pieces into tasks of about a million characters."""
    task: list[Piece] = []
    num_characters = 0
    for piece in pieces:
        task.append(piece)
        num_characters += len(piece.text)
        if num_characters >= _TASK_CHARACTERS:
            yield task
            task, num_characters = [], 0
    if task:
        yield task


def numbered(tables: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """Yield each table with the position of its first row; a slice of a mapped file is copied, as a task must be."""
    first_row = 0
    for table in tables:
        yield first_row, table
        first_row += len(table)


def _text_rows(documents: Dataset) -> Iterator[tuple[str, bool]]:
    for table in arrow_batches(documents):
        ends = table["ends_document"].to_pylist() if "ends_document" in table.column_names else [True] * len(table)
        yield from zip(table["text"].to_pylist(), ends, strict=True)


def _counted(results: Iterable[tuple[pa.Table, Counter[str]]], counts: Counter[str]) -> Iterator[pa.Table]:
    for table, more in results:
        counts.update(more)
        yield table


def _log_sentences(counts: Counter[str]) -> None:
    if not counts:  # the cache had it all
        return
    left_out = _left_out(
        counts,
        documents_dropped_empty="empty document",
        documents_dropped_no_sentence="document without a sentence",
        documents_dropped_too_short="document of too few sentences",
        paragraphs_dropped_heading="heading",
        paragraphs_dropped_list="list",
        sentences_dropped_no_letter="sentence without a letter",
    )
    sentences, documents = (_of(counts[f"{name}s_kept"], name) for name in ("sentence", "document"))
    logger.info("%s of %s%s", sentences, documents, left_out)


def _log_pairs(counts: Counter[str]) -> None:
    if not counts:
        return
    left_out = _left_out(
        counts,
        sentences_dropped_no_partner="sentence without a neighbour",
        tokens_dropped_trimmed="token beyond a pair's length",
    )
    pairs, sentences = (_of(counts[f"{name}s"], name) for name in ("pair", "sentence"))
    logger.info("%s of %s, %s%s", pairs, sentences, _of(counts["tokens_kept"], "token"), left_out)


def _left_out(counts: Counter[str], **names: str) -> str:
    parts = [_of(counts[count], name) for count, name in names.items() if counts[count]]
    return f"; left out: {', '.join(parts)}" if parts else ""


def _of(count: int, name: str) -> str:
    """`1 list without end`, `2 lists without end`: the first noun in the plural."""
    several = re.sub(r"\b(document|sentence|heading|list|pair|token)\b", r"\1s", name, count=1)
    return f"{count:,} {name if count == 1 else several}"
