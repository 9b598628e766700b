"""Small things that several tests of the data package need."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from datasets import Dataset

from cottention.data import load_corpus
from cottention.errors import CottentionError


def documents_of(dataset: Dataset) -> list[str]:
    """The documents of a corpus, long ones joined again."""
    return joined(zip(dataset["text"], dataset["ends_document"], strict=True))


def joined(rows: Iterable[tuple[str, bool]]) -> list[str]:
    """Join (text, ends_document) rows to documents; the last row must end one."""
    documents, blocks, ends = [], [], True
    for text, ends in rows:
        blocks.append(text)
        if ends:
            documents.append("".join(blocks))
            blocks = []
    assert ends, "the last document has no end"
    return documents


def write(path: Path, content: str | bytes) -> Path:
    """Write a file, and the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(error: pytest.ExceptionInfo[CottentionError]) -> str:
    """The message of a mistake, which must be one line."""
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def refused(source, **options) -> str:
    """What `load_corpus` says to a source that it must refuse."""
    with pytest.raises(CottentionError) as error:
        load_corpus(source, **options)
    return refusal(error)


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Be somebody to whom permissions apply: root, who may do everything, becomes nobody meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
