"""The rows of a file, labelled by a model, to another file or stdout: row after row, written whole or not at all.

label_file("runs/stars/model", "new.csv", text_column="review", output="stars.jsonl")
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cottention.data.tables import LeftOut, read_table
from cottention.data.word_files import is_tagged_file, read_words
from cottention.errors import SettingsError
from cottention.files import written_file
from cottention.generation.counting import Cuts, counted, num_of
from cottention.generation.labelling import label_kind, label_texts, label_words
from cottention.generation.loading import load_model_and_tokenizer
from cottention.logging import get_logger

JOINED_BY = ";"
"""Between the labels of one cell."""

logger = get_logger(__name__)


def label_file(
    model: str | Path,
    path: str | Path,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    output: str | Path | None = None,
    all_scores: bool = False,
    max_length: int | None = None,
    skip_malformed: bool = False,
    batch_size: int = 32,
    device: str | None = None,
) -> int:
    """Label every row of a file.

    Args:
        model: directory of a fine-tuned model, or its name on the Hub.
        path: see `tables.py` and `word_files.py`; "-" is lines of stdin.
        text_column: column of the text; None: text, of lists of words tokens.
        text_pair_column: column of the second text, for pairs.
        output: a .jsonl, .csv or .conll (of tags); None prints JSON lines.
        all_scores: add the scores of all labels.
        max_length: tokens of a row at most; None: as the model was trained.
        skip_malformed: leave out rows that cannot be read, and say how many.
        batch_size: rows read together; the result does not depend on it.
        device: where to run.

    Returns:
        How many rows there were.

    Raises:
        CheckpointError: the model cannot be used.
        DataError: the file, or a row of it, cannot be used; nothing is written then.
        SettingsError: the choices do not go together.
        OSError: the output cannot be written.
    """
    kind = label_kind(model)
    for_words = kind == "word-labels"
    left_out = LeftOut() if skip_malformed else None
    ending = "" if output is None else Path(output).suffix
    if for_words and (text_pair_column is not None or all_scores or ending == ".csv"):
        raise SettingsError("a model of word tags takes one text a row, and writes .jsonl or .conll without all scores")
    if not for_words and (ending == ".conll" or is_tagged_file(path)):
        raise SettingsError(f"{model} labels texts, not words; .conll is for those")
    if all_scores and ending == ".csv":
        raise SettingsError("--all-scores needs .jsonl")
    rows: Iterator[Any]
    if for_words:
        rows = _words(path, text_column or "tokens", left_out)
    else:
        columns = [text_column or "text", *([] if text_pair_column is None else [text_pair_column])]
        rows = _texts(path, columns, left_out)
    rows = itertools.chain(list(itertools.islice(rows, 1)), rows)  # a missing column is told before the model is opened
    opened, tokenizer = load_model_and_tokenizer(model, kind, device=device)
    cuts = Cuts()
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "cuts": cuts}
    write = {".csv": _csv_line, ".conll": _conll_lines}.get(ending, _json_line)
    if for_words:
        found = label_words(opened, tokenizer, rows, **options)
        lines = (write({"tokens": list(words), **said}) for words, said in found)
    else:
        found = label_texts(opened, tokenizer, rows, all_scores=all_scores, **options)
        lines = (write({**_named(row, text_pair_column is not None), **said}) for row, said in found)
    head = ["text", *(["text_pair"] if text_pair_column is not None else []), "label", "score"]
    count = _write(lines, output, head=_csv_line({name: name for name in head}) if ending == ".csv" else None)
    _report(path, left_out, cuts, count)
    logger.info("%s labelled%s", num_of(count, "row"), "" if output is None else f": {output}")
    return count


def _texts(path: str | Path, columns: list[str], left_out: LeftOut | None) -> Iterator[tuple[str | None, str]]:
    """Texts and pairs; None where a row has none, which is said at the end."""
    missing, first = 0, ""
    for row in read_table(path, texts=columns, left_out=left_out):
        if any(text is None or not text.strip() for text in row.cells):
            missing, first = missing + 1, first or row.where
            yield None, ""
        else:
            yield row.cells[0], [*row.cells, ""][1]
    if missing:
        logger.warning("%d rows have no text and get no label; the first is %s", missing, first)


def _words(path: str | Path, column: str, left_out: LeftOut | None) -> Iterator[list[str]]:
    for _number, _where, words, _tags in read_words(path, words=column, tags=None, left_out=left_out):
        yield words or []


def _named(row: tuple[str | None, str], paired: bool) -> dict[str, Any]:
    return {"text": row[0], "text_pair": row[1]} if paired else {"text": row[0]}


def _json_line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _csv_line(values: dict[str, Any]) -> str:
    cells = [JOINED_BY.join(map(str, value)) if isinstance(value, list) else value for value in values.values()]
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _conll_lines(values: dict[str, Any]) -> str:
    pairs = zip(values["tokens"], values["label"], strict=True)
    return "".join(f"{word}\t{tag or '_'}\n" for word, tag in pairs) + "\n"


def _write(lines: Iterable[str], output: str | Path | None, *, head: str | None) -> int:
    """Write or print lines, each when it is there; return how many."""
    count = 0
    with contextlib.ExitStack() as held:
        put: Callable[[str], Any] = sys.stdout.write
        if output is not None:
            file = io.BufferedWriter(held.enter_context(written_file(output)), 1 << 20)
            # The file gets its name when the block ends well, so what is held must be in it by then.
            held.callback(file.detach)
            held.callback(file.flush)
            put = lambda line: file.write(line.encode("utf-8", "replace"))  # noqa: E731
        if head is not None:
            put(head)
        for line in counted(lines, "rows"):
            put(line)
            count += 1
    return count


def _report(path: str | Path, left_out: LeftOut | None, cuts: Cuts, count: int) -> None:
    if left_out is not None:
        left_out.report(path)
    if cuts.count:
        logger.warning("%d of %d rows are longer than %d tokens and were cut", cuts.count, count, cuts.limit)
