"""What `cottention data` does: text to corpus directories, with all cores, constant memory, and nothing lost to a kill.

A reader cuts the source into tasks of about a megabyte, the same for any number of processes; they come back in order
and are appended to shards. An interrupted build reads its source again up to the task behind the last finished shard,
which costs the reading alone, and goes on there.

    build_sentences(["wiki.jsonl.gz"], "corpora/sentences")                            # BERT
    tokenize_pairs("corpora/sentences", "corpora/pairs", tokenizer, max_length=128)
    build_documents(["pile/*.jsonl.zst"], "corpora/text")                              # GPT
    tokenize_text("corpora/text", "corpora/tokens", tokenizer)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from cottention.data.build_run import BuildReport, processes_for, run_build
from cottention.data.corpus import load_corpus
from cottention.data.encoding import TokenTask
from cottention.data.malformed import described_malformed
from cottention.data.pairing import PairTask
from cottention.data.sentences import (
    PAIR_FEATURES,
    PAIRS_VERSION,
    SENTENCE_FEATURES,
    SENTENCES_VERSION,
    described_tokenizer,
    hash_of,
    new_pairing,
    new_splitting,
    numbered,
    tasks_of,
)
from cottention.data.shards import SHARD_BYTES, CorpusWriter, is_corpus, open_corpus
from cottention.data.sources import ReadSettings, TextSource
from cottention.data.splitting import MIN_SENTENCES, SPLITTER, pieces_of
from cottention.data.tokenization import TOKEN_FEATURES, arrow_batches
from cottention.data.tokenizer import train_tokenizer
from cottention.errors import SettingsError
from cottention.logging import get_logger

MAX_DOCUMENT_CHARS = 500_000
"""Longer documents are left out of a GPT's text, as for the published models."""
VOCAB_SIZE = 32_768
"""Of a tokenizer that is trained on the corpus."""

TEXT_FEATURES = Features({"document": Value("int64"), "text": Value("string"), "ends_document": Value("bool")})

_TEXT_VERSION = 1
_TASK_CHARACTERS = 1 << 20
_TRAINING_BYTES = 1 << 30  # what a tokenizer is trained on at most; more text changes it little

Names = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Row = tuple[int, str, bool]

logger = get_logger(__name__)


def build_sentences(
    sources: Names,
    output_dir: str | os.PathLike[str],
    *,
    reading: ReadSettings | None = None,
    language: str = "en",
    min_sentences: int = MIN_SENTENCES,
    num_proc: int | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> BuildReport:
    """Write a corpus of sentences by document, for `tokenize_pairs`.

    Args:
        sources: see `TextSource`.
        output_dir: the corpus to write, or to go on with.
        reading: how rows become documents.
        language: of the text, for the sentence splitter.
        min_sentences: documents with fewer are left out.
        num_proc: processes; None takes all cores, or one where there is little to do.
        overwrite: remove what is there first.
        shard_bytes: size of a shard.

    Raises:
        DataError: a source cannot be read, the directory cannot be written, or nothing is left.
        SettingsError: a setting makes no sense, or is not that of the build which is there.
    """
    reading = reading or ReadSettings()
    work = new_splitting(language=language, rows=reading.rows, min_sentences=min_sentences)
    source = TextSource(_names(sources), reading)
    settings = {
        "sources": source.described(),
        **_described_reading(reading),
        "language": language,
        "min_sentences": min_sentences,
        "splitter": SPLITTER if reading.rows == "documents" else None,
        "version": SENTENCES_VERSION,
    }

    def tasks(counts: Counter[str]) -> Iterator[Any]:
        yield from tasks_of(pieces_of(source.rows(counts)))
        yield []  # carries what the reader counted behind the last task

    with CorpusWriter(
        output_dir,
        kind="bert-sentences",
        features=SENTENCE_FEATURES,
        settings=settings,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
    ) as writer:
        return _reported(run_build(writer, tasks, work, processes_for(num_proc, source.num_bytes), "Splitting"))


def tokenize_pairs(
    corpus_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    segments: str = "filled",
    seed: int = 0,
    num_proc: int | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> BuildReport:
    """Write a corpus of tokenised pairs; see `sentence_pairs` for what they are.

    Args:
        corpus_dir: what `build_sentences` wrote.
        output_dir: the corpus to write, or to go on with; the tokenizer is saved beside the pairs.
        tokenizer: a fast one with BERT's special tokens.
        max_length: tokens of a pair at most, with [CLS] and two [SEP].
        segments: "filled" or "sentence".
        seed: of lengths and boundaries.
        num_proc: processes; None takes all cores, or one where there is little to do.
        overwrite: remove what is there first.
        shard_bytes: size of a shard.

    Raises:
        DataError: the corpus is none, or of another kind; the directory cannot be written; there are no pairs.
        SettingsError: a setting makes no sense, or is not that of the build which is there.
    """
    pairing = new_pairing(max_length, segments, seed)
    described = described_tokenizer(tokenizer, ("cls_token", "sep_token", "mask_token", "pad_token"))
    corpus = open_corpus(corpus_dir, kind="bert-sentences")
    settings = {
        "corpus": _described_corpus(corpus.manifest),
        "tokenizer": _described_tokenizer(tokenizer, described),
        "max_length": max_length,
        "segments": segments,
        "seed": seed,
        "version": PAIRS_VERSION,
    }

    def tasks(_counts: Counter[str]) -> Iterator[Any]:
        return numbered(arrow_batches(corpus.dataset))

    with CorpusWriter(
        output_dir,
        kind="bert-pairs",
        features=PAIR_FEATURES,
        settings=settings,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
    ) as writer:
        work, processes = PairTask(described, pairing), processes_for(num_proc, corpus.dataset.data.nbytes)
        return run_build(
            writer, tasks, work, processes, "Tokenising", num_rows=len(corpus.dataset), tokenizer=tokenizer
        )


def build_documents(
    sources: Names,
    output_dir: str | os.PathLike[str],
    *,
    reading: ReadSettings | None = None,
    max_document_chars: int | None = MAX_DOCUMENT_CHARS,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> BuildReport:
    """Write a corpus of documents, for `tokenize_text`; reading is all the work, so one process does it.

    Args:
        sources: see `TextSource`.
        output_dir: the corpus to write, or to go on with.
        reading: how rows become documents.
        max_document_chars: longer documents are left out; None keeps all.
        overwrite: remove what is there first.
        shard_bytes: size of a shard.

    Raises:
        DataError: a source cannot be read, the directory cannot be written, or nothing is left.
        SettingsError: a setting makes no sense, or is not that of the build which is there.
    """
    reading = reading or ReadSettings()
    source = TextSource(_names(sources), reading)
    settings = _text_settings(source, reading, max_document_chars)
    with CorpusWriter(
        output_dir,
        kind="gpt-text",
        features=TEXT_FEATURES,
        settings=settings,
        overwrite=overwrite,
        shard_bytes=shard_bytes,
    ) as writer:
        tasks = _text_tasks(source, max_document_chars)
        return _reported(run_build(writer, tasks, _document_table, 1, "Reading"))


def tokenize_text(
    source: Names,
    output_dir: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int = VOCAB_SIZE,
    reading: ReadSettings | None = None,
    max_document_chars: int | None = MAX_DOCUMENT_CHARS,
    num_proc: int | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> BuildReport:
    """Write a corpus of tokens with the ends of documents, from which `pack_windows` cuts windows of any length.

    Args:
        source: what `build_documents` wrote, or sources of text (see `TextSource`), read and tokenised in one.
        output_dir: the corpus to write, or to go on with; the tokenizer is saved beside the tokens.
        tokenizer: a fast one with an end-of-text token; None trains byte-level BPE on the text.
        vocab_size: of a tokenizer that is trained.
        reading: how rows of sources become documents; of no meaning for a corpus.
        max_document_chars: longer documents of sources are left out; None keeps all.
        num_proc: processes; None takes all cores, or one where there is little to do.
        overwrite: remove what is there first.
        shard_bytes: size of a shard.

    Raises:
        DataError: the corpus is of another kind, a source cannot be read, the directory cannot be written.
        SettingsError: a setting makes no sense, or is not that of the build which is there.
    """
    names = _names(source)
    if tokenizer is not None:
        described_tokenizer(tokenizer, ("eos_token",))  # before text is read and hashed
    if len(names) == 1 and Path(names[0]).expanduser().is_dir() and is_corpus(names[0]):
        corpus = open_corpus(names[0], kind="gpt-text")
        origin: dict[str, Any] = {"corpus": _described_corpus(corpus.manifest)}
        tasks, num_bytes, num_rows = _corpus_tasks(corpus.dataset), corpus.dataset.data.nbytes, len(corpus.dataset)
        trained_on = corpus.dataset
    else:
        reading = reading or ReadSettings()
        text = TextSource(names, reading)
        origin = _text_settings(text, reading, max_document_chars)
        tasks, num_bytes, num_rows = _text_tasks(text, max_document_chars), text.num_bytes, None
        if tokenizer is None:
            trained_on = _for_training(text, reading, max_document_chars)
    if tokenizer is None:
        tokenizer = _trained(trained_on, vocab_size)
    described = described_tokenizer(tokenizer, ("eos_token",))
    with CorpusWriter(
        output_dir,
        kind="gpt-tokens",
        features=TOKEN_FEATURES,
        settings={**origin, "tokenizer": _described_tokenizer(tokenizer, described)},
        overwrite=overwrite,
        shard_bytes=shard_bytes,
    ) as writer:
        work, processes = TokenTask(described), processes_for(num_proc, num_bytes)
        return _reported(
            run_build(writer, tasks, work, processes, "Tokenising", num_rows=num_rows, tokenizer=tokenizer)
        )


def _text_tasks(source: TextSource, max_document_chars: int | None) -> Callable[[Counter[str]], Iterator[list[Row]]]:
    if max_document_chars is not None and max_document_chars < 1:
        raise SettingsError(f"max_document_chars must be at least 1; got {max_document_chars}")

    def tasks(counts: Counter[str]) -> Iterator[list[Row]]:
        task: list[Row] = []
        num_characters = 0
        for row in _kept(source.rows(counts), max_document_chars, counts):
            task.append(row)
            num_characters += len(row[1])
            if num_characters >= _TASK_CHARACTERS:
                yield task
                task, num_characters = [], 0
        yield task

    return tasks


def _kept(rows: Iterable[tuple[str, bool]], limit: int | None, counts: Counter[str]) -> Iterator[Row]:
    """Number the documents, and leave out those above the limit, holding no more than that of one in memory."""
    held: list[Row] = []
    document = num_characters = num_bytes = 0
    for text, ends in rows:
        num_characters += len(text)
        num_bytes += len(text.encode())
        if limit is None or num_characters <= limit:
            held.append((document, text, ends))
        else:
            held.clear()
        if ends or limit is None:
            yield from held
            held.clear()
        if ends:
            is_kept = limit is None or num_characters <= limit
            counts.update(documents=1, documents_kept=int(is_kept), documents_dropped_too_long=int(not is_kept))
            counts.update(bytes=num_bytes, bytes_dropped_too_long=0 if is_kept else num_bytes)
            document, num_characters, num_bytes = document + 1, 0, 0


def _document_table(rows: Sequence[Row]) -> tuple[pa.Table, Counter[str]]:
    documents, texts, ends = zip(*rows, strict=True) if rows else ((), (), ())
    columns = [pa.array(documents, pa.int64()), pa.array(texts, pa.string()), pa.array(ends, pa.bool_())]
    return pa.table(columns, schema=TEXT_FEATURES.arrow_schema), Counter()


def _corpus_tasks(dataset: Dataset) -> Callable[[Counter[str]], Iterator[list[Row]]]:
    def tasks(counts: Counter[str]) -> Iterator[list[Row]]:
        for table in arrow_batches(dataset):
            rows = list(zip(*(table[name].to_pylist() for name in TEXT_FEATURES), strict=True))
            counts.update(
                rows=len(rows),
                documents=sum(ends for _, _, ends in rows),
                bytes=sum(len(text.encode()) for _, text, _ in rows),
            )
            yield rows

    return tasks


def _for_training(text: TextSource, reading: ReadSettings, max_document_chars: int | None) -> Dataset:
    if not text.is_local or reading.rows != "documents":
        raise SettingsError(
            "a tokenizer is trained on a corpus or on local documents; run `cottention data build gpt` first"
        )
    return load_corpus(
        [os.fspath(name) for name in text.names] if len(text.names) > 1 else os.fspath(text.names[0]),
        split_by=reading.split_by,
        text_column=reading.text_column,
        max_document_chars=max_document_chars,
        skip_malformed=reading.skip_malformed,
    )


def _trained(documents: Dataset, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train byte-level BPE on all of the text, or on rows spread evenly over it where it is very large."""
    most = max(1, len(documents) * _TRAINING_BYTES // max(documents.data.nbytes, 1))
    if most < len(documents):
        logger.info("training the tokenizer on %d of %d rows", most, len(documents))
        documents = documents.select(np.linspace(0, len(documents) - 1, most).round().astype(int))
    return train_tokenizer(documents, kind="bpe", vocab_size=vocab_size)


def _names(sources: Names) -> list[str]:
    if isinstance(sources, (str, os.PathLike)):
        return [os.fspath(sources)]
    return [os.fspath(name) for name in sources]


def _described_reading(reading: ReadSettings) -> dict[str, Any]:
    described = asdict(reading)
    del described["split_by" if reading.rows == "sentences" else "documents_by"]
    if not reading.skip_malformed:  # which corpora that were built before there was such a thing do not say
        del described["skip_malformed"]
    return described


def _reported(report: BuildReport) -> BuildReport:
    """Say in one line what was left out as malformed; the manifest has the counts."""
    if left_out := described_malformed(report.counts):
        logger.warning("%s: %s", report.directory, left_out)
    return report


def _text_settings(source: TextSource, reading: ReadSettings, max_document_chars: int | None) -> dict[str, Any]:
    return {
        "sources": source.described(),
        **_described_reading(reading),
        "max_document_chars": max_document_chars,
        "version": _TEXT_VERSION,
    }


def _described_corpus(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a corpus was made of, and what came of it: its shards follow from this."""
    return {name: manifest[name] for name in ("kind", "settings", "rows", "counts")}


def _described_tokenizer(tokenizer: PreTrainedTokenizerBase, described: str) -> dict[str, Any]:
    return {"sha256": hash_of(described), "vocab_size": len(tokenizer)}
