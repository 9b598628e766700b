"""Which documents are held out: whole ones, at random, of about the share of the text that was asked for.

A share of the documents is the same share of the text only where documents are many, or alike. So the first choice,
that many documents in random order, is kept where it has at most twice the share; otherwise those are taken, in the
same order, that fit into it. What came of it is said, and a corpus whose documents are too large is refused.

    train, held_out = hold_out(documents, 0.01, seed=0)
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from cottention.data.tokenization import arrow_batches
from cottention.errors import DataError
from cottention.logging import get_logger

_NEAR = 2.0  # times the share: as near as random documents come
_FAR = 10.0  # times the share: so much was not meant
_SMALL = 0.05  # of the text: held out for nothing, it is no great loss
_REMEDY = "set data.split_by to paragraph or line, or name another text as data.validation"

logger = get_logger(__name__)


def hold_out(documents: Dataset, fraction: float, seed: int, least: int = 1) -> tuple[Dataset, Dataset]:
    """Split at random by whole documents.

    Args:
        documents: rows of text or tokens with the column ends_document; a long document has several.
        fraction: of the text, to hold out.
        seed: decides which.
        least: documents on each side, at least.

    Raises:
        DataError: there are too few documents, or all are far larger than the fraction.
    """
    numbers = _document_numbers(documents)
    num_documents = int(numbers[-1]) + 1
    if num_documents < 2 * least:
        has, none = ("one document", "nothing") if num_documents == 1 else (f"{num_documents} documents", "no two")
        raise DataError(f"the corpus is {has}, of which {none} can be held out: {_REMEDY}")
    sizes = np.bincount(numbers, weights=_row_bytes(documents), minlength=num_documents)
    order = np.random.default_rng(seed).permutation(num_documents)
    num_held_out = min(max(least, round(fraction * num_documents)), num_documents - least)
    chosen = choose(sizes, order, fraction, num_held_out=num_held_out, least=least)
    rows = chosen[numbers]
    return documents.select(np.flatnonzero(~rows)), documents.select(np.flatnonzero(rows))


def choose(sizes: np.ndarray, order: np.ndarray, fraction: float, *, num_held_out: int, least: int = 1) -> np.ndarray:
    """Choose the documents to hold out, and say which share of the text they are.

    Args:
        sizes: `[N]` of each document.
        order: `[N]` numbers of the documents, those to hold out first.
        fraction: of the sizes together, to hold out.
        num_held_out: documents of the first choice.
        least: documents to hold out, and to keep, at least.

    Returns:
        `[N]` bool: held out.

    Raises:
        DataError: what is held out is more than ten times the fraction, and no little of the text.
    """
    total = max(float(sizes.sum()), 1.0)
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[order[:num_held_out]] = True
    if sizes[chosen].sum() > _NEAR * fraction * total:
        chosen = _fitting(sizes, order, fraction * total, least)
    share = float(sizes[chosen].sum()) / total
    said = f"{chosen.sum():,} of {len(sizes):,} documents ({_percent(share)} of the text)"
    if share > _FAR * fraction and share > _SMALL:
        raise DataError(
            f"{said} would be held out, more than ten times data.validation = {fraction:g}: the documents are too "
            f"large for it; {_REMEDY}, or ask for as much"
        )
    is_far = share > _NEAR * fraction
    logger.info("%s %s held out%s", said, _verb(chosen), f"; {_REMEDY} to hold out {fraction:g}" if is_far else "")
    return chosen


def _fitting(sizes: np.ndarray, order: np.ndarray, most: float, least: int) -> np.ndarray:
    """Take documents in order as long as they fit; the smallest ones where too few do."""
    chosen = np.zeros(len(sizes), dtype=bool)
    room, num_chosen = most, 0
    for number in order:
        if sizes[number] <= room and num_chosen < len(sizes) - least:
            chosen[number] = True
            room -= sizes[number]
            num_chosen += 1
    if num_chosen < least:
        chosen[:] = False
        chosen[order[np.argsort(sizes[order], kind="stable")[:least]]] = True
    return chosen


def _verb(chosen: np.ndarray) -> str:
    return "is" if chosen.sum() == 1 else "are"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _document_numbers(documents: Dataset) -> np.ndarray:
    """To which document each row belongs."""
    ends = np.asarray(documents.with_format("numpy")["ends_document"][:], dtype=bool)
    return np.cumsum(ends) - ends


def _row_bytes(documents: Dataset) -> np.ndarray:
    """Bytes of text of each row; of text only where each begins is looked up, not the text itself."""
    is_text = "text" in documents.column_names
    tables = arrow_batches(documents.select_columns(["text" if is_text else "num_bytes"]))
    return np.concatenate([_lengths(table["text"]) if is_text else table["num_bytes"].to_numpy() for table in tables])


def _lengths(texts: pa.ChunkedArray) -> np.ndarray:
    return pc.binary_length(texts).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
