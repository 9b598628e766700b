"""The texts of a file as vectors in another, text after text, and the nearest of them to a question.

A .parquet of vectors is an index: it holds texts or their ids, whether the vectors have length 1, and which model made
them, by the hash of its weights, so that a question is never put to vectors of another model.

    embed_file("runs/bert/model", "notes.txt", output="notes.parquet", normalize=True)
    for hit in search_file("notes.parquet", "a question", top_k=5): hit.score, hit.text
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cottention.data.tables import STDIN, read_lines_of, read_table, table_kind
from cottention.errors import CheckpointError, DataError, SettingsError
from cottention.files import one_line, written_file
from cottention.generation.counting import Cuts, counted, num_of
from cottention.generation.loading import load_model_and_tokenizer
from cottention.generation.sentences import embed_sentences
from cottention.generation.source import resolve_directory
from cottention.logging import get_logger
from cottention.seals import WEIGHTS, sha256

_INDEX = b"cottention.index"  # key in a parquet file's metadata
_WINDOW_BATCHES = 8
_WINDOW_CHARACTERS = 1 << 22
_ROWS_PER_READ = 4096
_COPIED = 1 << 20
_TABLES = (".csv", ".tsv", ".parquet", ".json", ".gz", ".zst")  # of other names lines of text are read

logger = get_logger(__name__)


@dataclass(frozen=True)
class Hit:
    """A text of an index."""

    score: float
    """Cosine with the question."""
    row: int
    """From 1."""
    text: str | None
    """None where the index holds ids alone."""
    key: Any
    """What the column of ids says; None where there is none."""


def embed_file(
    model: str | Path,
    path: str | Path,
    *,
    output: str | Path | None = None,
    text_column: str = "text",
    id_column: str | None = None,
    normalize: bool = False,
    keep_texts: bool = True,
    max_length: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
) -> int:
    """Turn every text of a file into a vector, in constant memory.

    Args:
        model: directory of a BERT, or its name on the Hub.
        path: lines of text, or a table; "-" is stdin.
        output: .npy, .jsonl or .parquet; None prints JSON lines.
        text_column: column of the text in a table.
        id_column: column that is kept beside the vector.
        normalize: whether every vector is scaled to length 1.
        keep_texts: whether .jsonl and .parquet hold the texts too.
        max_length: tokens of a text at most; None: all that the model has positions for.
        batch_size: texts read together; the result does not depend on it.
        device: where to run.

    Returns:
        How many texts there were.

    Raises:
        CheckpointError: the model cannot be used.
        DataError: the file holds no text, or a row that is none; nothing is written then.
        OSError: the output cannot be written.
    """
    rows = _texts(path, text_column, id_column)
    rows = itertools.chain(list(itertools.islice(rows, 1)), rows)  # a wrong file is told before the model is opened
    opened, tokenizer = load_model_and_tokenizer(model, "encoder", device=device)
    limit = opened.config.longest_text
    if max_length is not None and limit is not None and max_length > limit:
        raise SettingsError(f"max_length must be at most the model's {limit} positions; got {max_length}")
    cuts, count = Cuts(limit=max_length or limit or 0), 0
    about = {"model": str(model), "weights": weights_of(model), "normalized": normalize, "max_length": max_length}
    with _writer(output, opened.config.hidden_size, about, id_column, keep_texts) as write:
        for window in _windows(counted(rows, "texts"), batch_size):
            texts = [text for text, _ in window]
            vectors = embed_sentences(
                opened, tokenizer, texts, normalize=normalize, batch_size=batch_size, max_length=max_length, cuts=cuts
            )
            write(window, vectors.numpy())
            count += len(window)
    if cuts.count:
        logger.warning("%d of %d texts are longer than %d tokens and were cut", cuts.count, count, cuts.limit)
    logger.info("%s embedded%s", num_of(count, "text"), "" if output is None else f": {output}")
    return count


def search_file(
    index: str | Path, question: str, *, model: str | Path | None = None, top_k: int = 5, device: str | None = None
) -> list[Hit]:
    """The texts of an index whose vectors are nearest to that of a question, by their cosine, in constant memory.

    Args:
        index: a .parquet of `embed_file`.
        question: a text.
        model: where the model is now; None: where it was.
        top_k: texts to find.
        device: where to run.

    Raises:
        SettingsError: top_k makes no sense.
        DataError: it is no index, or damaged.
        CheckpointError: the model is not the one that made it.
    """
    if top_k < 1:
        raise SettingsError(f"top_k must be at least 1; got {top_k}")
    about = read_index(index)
    source = about["model"] if model is None else model
    if weights_of(source) != about["weights"]:
        raise CheckpointError(f"{index} was made by another model than {source}: its vectors say nothing to this one")
    opened, tokenizer = load_model_and_tokenizer(source, "encoder", device=device)
    asked = embed_sentences(opened, tokenizer, [question], normalize=True, max_length=about["max_length"])[0].numpy()
    best: list[tuple[float, int, str | None, Any]] = []
    for start, names, vectors, texts, keys in _read_vectors(index, len(asked)):
        lengths = np.linalg.norm(vectors, axis=1)
        scores = vectors @ asked / np.maximum(lengths, 1e-12)
        for at in np.argsort(-scores, kind="stable")[:top_k]:
            entry = (float(scores[at]), -(start + int(at)), texts[at] if "text" in names else None, keys[at])
            if len(best) < top_k:
                heapq.heappush(best, entry)
            elif entry[:2] > best[0][:2]:
                heapq.heapreplace(best, entry)
    ordered = sorted(best, key=lambda entry: entry[:2], reverse=True)
    return [Hit(score=score, row=1 - row, text=text, key=key) for score, row, text, key in ordered]


def read_index(index: str | Path) -> dict[str, Any]:
    """What an index says of itself: model, weights, normalized, max_length.

    Raises:
        DataError: it is none.
    """
    path = Path(index).expanduser()
    if not path.exists():
        raise DataError(f"no such index: {index}")
    how = "write one with: cottention embed --output NAME.parquet"
    if path.suffix != ".parquet" or not path.is_file():
        raise DataError(f"{index} is no index, which is a .parquet file; {how}")
    try:
        with pa.OSFile(os.fsencode(path)) as file:
            metadata = pq.read_schema(file).metadata or {}
        about = json.loads(metadata.get(_INDEX, b"null"))
    except (OSError, pa.ArrowException, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {index}: it is not a whole parquet file ({one_line(error)})") from error
    if not isinstance(about, dict) or not {"model", "weights", "max_length"} <= about.keys():
        raise DataError(f"{index} does not say which model made its vectors; {how}")
    return about


def weights_of(model: str | Path) -> str:
    """A name for a model's weights, the same wherever they lie: the hash of their files' hashes.

    Raises:
        CheckpointError: there is no such directory.
    """
    directory = resolve_directory(model, file_patterns=("*.json", "model*.safetensors"))
    files = sorted({path for pattern in WEIGHTS for path in directory.glob(pattern) if path.suffix == ".safetensors"})
    return "-".join(sha256(path)[:32] for path in files)


def _texts(path: str | Path, column: str, id_column: str | None) -> Iterator[tuple[str, Any]]:
    shown = "stdin" if str(path) == STDIN else str(path)
    found = False
    if str(path).endswith(".jsonl"):
        rows = _json_texts(path, column, id_column)
    else:
        is_table = str(path) == STDIN or Path(path).suffix.lower() in _TABLES
        rows = _table_texts(path, column, id_column) if is_table else ((line, None) for _, line in _lines(path))
    for text, key in rows:
        if text is not None and text.strip():
            found = True
            yield text, key
    if not found:
        raise DataError(f"{shown} holds no text")


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    if not Path(path).expanduser().exists():
        raise DataError(f"{path} cannot be read: No such file or directory")
    yield from read_lines_of(path)


def _json_texts(path: str | Path, column: str, id_column: str | None) -> Iterator[tuple[str, Any]]:
    number = 0
    for _, line in _lines(path):
        if not line.strip():
            continue
        number += 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path}, row {number}: not JSON") from None
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{path}, row {number}: needs a text {column!r}")
        yield text, row.get(id_column) if id_column is not None else None


def _table_texts(path: str | Path, column: str, id_column: str | None) -> Iterator[tuple[str | None, Any]]:
    values = [] if id_column is None or table_kind(path)[0] == "text" else [id_column]
    for row in read_table(path, texts=[column], values=values):
        yield row.cells[0], row.cells[1] if values else None


def _windows(rows: Iterable[tuple[str, Any]], batch_size: int) -> Iterator[list[tuple[str, Any]]]:
    held: list[tuple[str, Any]] = []
    num_characters = 0
    for row in rows:
        held.append(row)
        num_characters += len(row[0])
        if len(held) == max(batch_size, 1) * _WINDOW_BATCHES or num_characters > _WINDOW_CHARACTERS:
            yield held
            held, num_characters = [], 0
    if held:
        yield held


_Write = Callable[[list[tuple[str, Any]], np.ndarray], None]


@contextlib.contextmanager
def _writer(
    output: str | Path | None, width: int, about: dict[str, Any], id_column: str | None, keep_texts: bool
) -> Iterator[_Write]:
    """What takes texts and their vectors; the file is there when the block ends well."""
    ending = ".jsonl" if output is None else Path(output).suffix
    if output is None:
        yield lambda window, vectors: _json_lines(sys.stdout.write, window, vectors, id_column, keep_texts)
        return
    with written_file(output) as file:
        if ending == ".jsonl":
            put: Callable[[str], Any] = lambda line: file.write(line.encode("utf-8", "replace"))  # noqa: E731
            yield lambda window, vectors: _json_lines(put, window, vectors, id_column, keep_texts)
        elif ending == ".parquet":
            with _parquet(file, width, about, id_column, keep_texts) as write:
                yield write
        else:
            with _array(file, Path(file.path).parent, width) as write:
                yield write


def _json_lines(
    put: Callable[[str], Any], window: list[tuple[str, Any]], vectors: np.ndarray, id_column: str | None, texts: bool
) -> None:
    for (text, key), vector in zip(window, vectors.tolist(), strict=True):
        row = {**({"id": key} if id_column else {}), **({"text": text} if texts else {}), "embedding": vector}
        put(json.dumps(row, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _array(file: Any, folder: Path, width: int) -> Iterator[_Write]:
    """An .npy, whose head says how many rows there are: they wait in a file without a name."""
    with tempfile.TemporaryFile(dir=folder) as held:
        count = 0

        def write(_window: list[tuple[str, Any]], vectors: np.ndarray) -> None:
            nonlocal count
            held.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
            count += len(vectors)

        yield write
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(file, header)
        held.seek(0)
        while part := held.read(_COPIED):
            file.write(part)


@contextlib.contextmanager
def _parquet(file: Any, width: int, about: dict[str, Any], id_column: str | None, texts: bool) -> Iterator[_Write]:
    """A parquet file of id (as text), text, embedding."""
    kept = [name for name, wanted in (("id", id_column), ("text", texts)) if wanted]
    fields = [*(pa.field(name, pa.string()) for name in kept), pa.field("embedding", pa.list_(pa.float32(), width))]
    schema = pa.schema(fields, metadata={_INDEX: json.dumps(about).encode()})
    writer = pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False)

    def write(window: list[tuple[str, Any]], vectors: np.ndarray) -> None:
        flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
        columns: dict[str, Any] = {"embedding": pa.FixedSizeListArray.from_arrays(flat, width)}
        if id_column:
            columns["id"] = pa.array([None if key is None else str(key) for _, key in window], pa.string())
        if texts:
            columns["text"] = pa.array([text for text, _ in window], pa.string())
        writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))

    try:
        yield write
    except BaseException:
        with contextlib.suppress(OSError, pa.ArrowException):  # what is half written vanishes; the first error counts
            writer.close()
        raise
    writer.close()


def _read_vectors(index: str | Path, width: int) -> Iterator[tuple[int, list[str], np.ndarray, list[Any], list[Any]]]:
    """First row, columns, vectors `[N, width]`, texts and ids of some thousand rows at a time."""
    path = Path(index).expanduser()
    try:
        with pa.OSFile(os.fsencode(path)) as source, pq.ParquetFile(source, pre_buffer=False) as file:
            names = file.schema_arrow.names
            kind = file.schema_arrow.field("embedding").type if "embedding" in names else None
            if kind is None or not pa.types.is_fixed_size_list(kind) or kind.list_size != width:
                raise DataError(f"{index} has no vectors of {width} numbers in a column 'embedding'")
            start = 0
            for batch in file.iter_batches(batch_size=_ROWS_PER_READ):
                vectors = np.asarray(batch.column("embedding").flatten()).reshape(len(batch), width)
                texts = batch.column("text").to_pylist() if "text" in names else [None] * len(batch)
                keys = batch.column("id").to_pylist() if "id" in names else [None] * len(batch)
                yield start, names, vectors, texts, keys
                start += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {index}: {one_line(error)}") from error
