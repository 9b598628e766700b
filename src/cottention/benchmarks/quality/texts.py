"""Text for the study: three splits by whole documents, as streams of tokens on disk.

The mix is nine novels, "War and Peace" and the beginnings of ten thousand Wikipedia articles: some 14 MB. One novel is
scored, one chooses learning rates, the others are trained on; of the articles every twentieth is scored and every
twentieth chooses. Any other corpus that `load_corpus` opens serves too: of its documents one in a thousand is scored
and one chooses. The tokenizer is trained on the text to train on alone.

    train.bin  choose-books.bin  choose-articles.bin  score-books.bin  score-articles.bin  tokenizer/  text.json

A stream is int32: an end-of-text before each document, and one at the end.

    text = open_text(Path("../shared/data/lm"), vocab_size=4096, work=Path("runs/quality"))
    text.train[:257], text.held_out("score")["books"], text.num_bytes(ids)
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from cottention.data.corpus import load_corpus
from cottention.data.tokenization import arrow_batches, tokenize_documents
from cottention.data.tokenizer import load_tokenizer, train_tokenizer
from cottention.errors import DataError
from cottention.files import write_text
from cottention.locks import InUseError, sole_writer

_VERSION = 1  # part of the folder's name: raise it when the same text shall give other streams
_NOVELS = {"score": "frankenstein.txt", "choose": "time_machine.txt"}
_ARTICLES = "wiki_vital/wiki_vital_en.jsonl.gz"
_OTHERS = ("warandpeace/warandpeace.txt.gz",)
_PERIOD = 20  # of the articles one in so many is scored, and one chooses
_LONG_PERIOD = 1000  # of another corpus's documents
_LOOK_AGAIN_S = 1.0
_TOKENIZER_DOCUMENTS = 200_000  # of a large corpus: more change no merge that matters


class Text:
    """The streams of a folder that `open_text` has filled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        about = json.loads((folder / "text.json").read_text(encoding="utf-8"))
        self.digest: str = about["digest"]
        self.vocab_size: int = about["vocab_size"]
        self._border: int = about["border"]
        self._bytes_of_token = np.array(about["bytes_of_token"])

    @property
    def train(self) -> np.ndarray:
        """`[N]` to train on."""
        return self._stream("train")

    def held_out(self, split: str) -> dict[str, np.ndarray]:
        """`[N]` of each kind of text, of "choose" or "score"."""
        paths = sorted(self._folder.glob(f"{split}-*.bin"))
        return {path.stem.partition("-")[2]: self._stream(path.stem) for path in paths}

    def num_bytes(self, ids: np.ndarray) -> int:
        """UTF-8 bytes that these tokens stand for; end-of-text stands for none."""
        return int(self._bytes_of_token[ids].sum())

    def document_length(self, stream: np.ndarray) -> float:
        """Mean tokens of a stream's documents."""
        return len(stream) / max(1, int((stream == self._border).sum()) - 1)

    def _stream(self, name: str) -> np.ndarray:
        return np.memmap(self._folder / f"{name}.bin", dtype=np.int32, mode="r")


def open_text(source: Path, *, vocab_size: int, work: Path) -> Text:
    """The streams of a source, made where they are not there yet.

    Args:
        source: the folder with `books/` and the rest of the mix, or anything that `load_corpus` opens.
        vocab_size: of the tokenizer.
        work: the folder to keep them in.

    Raises:
        DataError: there is no such text.
    """
    files = _files_of(source)
    digest = _digest(files, vocab_size)
    folder = work / f"text-{digest}"
    if not (folder / "text.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_once(folder, source, vocab_size, digest)
    return Text(folder)


def _write_once(folder: Path, source: Path, vocab_size: int, digest: str) -> None:
    """Write the streams, or wait for another process that does."""
    while not (folder / "text.json").exists():
        try:
            with sole_writer(folder):
                if not (folder / "text.json").exists():  # else others read it already
                    _write(folder, source, vocab_size, digest)
        except InUseError:
            time.sleep(_LOOK_AGAIN_S)


def _files_of(source: Path) -> list[Path]:
    if not source.exists():
        raise DataError(f"there is no text at {source}: name a folder or a file with --texts")
    if not (source / "books").is_dir():
        return sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    return [*sorted((source / "books").glob("*.txt")), *(source / name for name in (*_OTHERS, _ARTICLES))]


def _digest(files: list[Path], vocab_size: int) -> str:
    """Of what decides the streams: of each file its name and size, and the first megabyte."""
    hashed = hashlib.sha256(f"{_VERSION} {vocab_size}".encode())
    for path in files:
        try:
            with path.open("rb") as file:
                hashed.update(f"{path.name} {path.stat().st_size}".encode() + file.read(1 << 20))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
    return hashed.hexdigest()[:12]


def _write(folder: Path, source: Path, vocab_size: int, digest: str) -> None:
    splits = _mix(source) if (source / "books").is_dir() else _documents(source)
    to_learn = splits["train"].select(range(min(len(splits["train"]), _TOKENIZER_DOCUMENTS)))
    tokenizer = train_tokenizer(to_learn, kind="bpe", vocab_size=vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    for name, documents in splits.items():
        _write_stream(folder / f"{name}.bin", documents, tokenizer)
    # In byte-level BPE each character of a token stands for one byte.
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    lengths = [0 if i == tokenizer.eos_token_id else len(piece) for i, piece in enumerate(pieces)]
    border = tokenizer.eos_token_id
    about = {"digest": digest, "vocab_size": len(tokenizer), "border": border, "bytes_of_token": lengths}
    write_text(folder / "text.json", json.dumps(about))


def _mix(source: Path) -> Mapping[str, Dataset]:
    novels = sorted((source / "books").glob("*.txt"))
    held_out = {split: source / "books" / name for split, name in _NOVELS.items()}
    articles = load_corpus(source / _ARTICLES)
    if not articles["ends_document"] or not all(articles["ends_document"]):
        raise DataError(f"each article of {source / _ARTICLES} must be one row")
    number = np.arange(len(articles)) % _PERIOD
    rows = {"score": number == 0, "choose": number == _PERIOD // 2}
    is_trained = ~(rows["score"] | rows["choose"])
    trained = [load_corpus(path) for path in novels if path not in held_out.values()]
    trained += [load_corpus(source / name) for name in _OTHERS]
    trained.append(articles.select(np.flatnonzero(is_trained)))
    splits: dict[str, Dataset] = {"train": concatenate_datasets(trained)}
    for split, path in held_out.items():
        splits[f"{split}-books"] = load_corpus(path)
        splits[f"{split}-articles"] = articles.select(np.flatnonzero(rows[split]))
    return splits


def _documents(source: Path) -> Mapping[str, Dataset]:
    corpus = load_corpus(source)
    ends = np.asarray(corpus.with_format("numpy")["ends_document"][:], dtype=bool)
    number = np.cumsum(ends) - ends
    period = min(_LONG_PERIOD, max(4, int(number[-1]) // 10))
    if number[-1] < period:
        raise DataError(f"{source} must have at least {period + 1} documents, to hold some out; got {number[-1] + 1}")
    rows = {"score-documents": number % period == 0, "choose-documents": number % period == period // 2}
    rows["train"] = ~(rows["score-documents"] | rows["choose-documents"])
    return {name: corpus.select(np.flatnonzero(chosen)) for name, chosen in rows.items()}


def _write_stream(path: Path, documents: Dataset, tokenizer: Any) -> None:
    tokens = tokenize_documents(documents, tokenizer)
    border = np.array([tokenizer.eos_token_id], dtype=np.int32)
    with path.open("wb") as file:
        border.tofile(file)
        for table in arrow_batches(tokens):
            for ids, ends in zip(table["input_ids"], table["ends_document"].to_pylist(), strict=True):
                ids.values.to_numpy().astype(np.int32).tofile(file)
                if ends:
                    border.tofile(file)
