"""Text to ids with the tokenizers library alone, for worker processes: they start without transformers and datasets.

A tokenizer travels to them as the text of its tokenizer.json. Special tokens are not added, and text that spells one
stays text. `TokenTask` gives the columns of `tokenize_documents`.

    ids = encoded(["Some text."], plain_tokenizer(described))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

TOKENS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("num_bytes", pa.int64()),
        ("num_words", pa.int64()),
        ("ends_document", pa.bool_()),
    ]
)

_GROUP_CHARACTERS = 1 << 18  # while it works, a tokenizer holds a hundred bytes and more per token


class TokenTask:
    """Turns rows of text into rows of ids, here or in another process.

    Args:
        described: the tokenizer, as a tokenizer.json.
    """

    def __init__(self, described: str) -> None:
        self.described = described
        self.tokenizer: Tokenizer | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "tokenizer": None}

    def __call__(self, rows: Sequence[tuple[int, str, bool]]) -> tuple[pa.Table, Counter[str]]:
        """Encode (document, text, ends_document) rows."""
        if self.tokenizer is None:
            self.tokenizer = plain_tokenizer(self.described)
        texts = [text for _, text, _ in rows]
        ids = encoded(texts, self.tokenizer)
        num_bytes = [len(text.encode()) for text in texts]
        columns = [
            list_array(ids),
            pa.array(num_bytes, pa.int64()),
            pa.array([len(text.split()) for text in texts], pa.int64()),
            pa.array([ends for _, _, ends in rows], pa.bool_()),
        ]
        counts: Counter[str] = Counter(tokens=sum(map(len, ids)))
        return pa.table(columns, schema=TOKENS), counts


def plain_tokenizer(described: str) -> Tokenizer:
    """Open a tokenizer.json given as text; text that spells a special token stays text."""
    tokenizer = Tokenizer.from_str(described)
    tokenizer.encode_special_tokens = True
    return tokenizer


def encoded(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of each text, int32, without special tokens around them."""
    found: list[np.ndarray] = []
    for group in _groups(texts):
        encodings = tokenizer.encode_batch_fast(group, add_special_tokens=False)
        found += [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]
    return found


def list_array(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """Join arrays of ids to a column of lists."""
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(ids) for ids in arrays], out=offsets[1:])
    flat = np.concatenate([np.empty(0, dtype=np.int32), *arrays])
    return pa.ListArray.from_arrays(offsets, pa.array(flat, pa.int32()))


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    group: list[str] = []
    num_characters = 0
    for text in texts:
        group.append(text)
        num_characters += len(text)
        if num_characters > _GROUP_CHARACTERS:
            yield group
            group, num_characters = [], 0
    if group:
        yield group
