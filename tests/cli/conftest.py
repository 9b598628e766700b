"""What the tests of commands share: saved models to run them on, and a log that is left as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    root = logging.getLogger("cottention")
    before = (root.handlers[:], root.level, root.propagate)
    yield
    root.handlers[:], root.level, root.propagate = before


@pytest.fixture(scope="session")
def gpt_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved cosine GPT."""
    directory = tmp_path_factory.mktemp("models") / "gpt"
    return tiny.save(directory, tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer())


@pytest.fixture(scope="session")
def softmax_gpt_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved softmax GPT of 64 positions."""
    directory = tmp_path_factory.mktemp("models") / "softmax-gpt"
    return tiny.save(directory, tiny.gpt("softmax", torch.float32), tiny.bpe_tokenizer())


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved cosine BERT."""
    directory = tmp_path_factory.mktemp("models") / "bert"
    return tiny.save(directory, tiny.bert(dtype=torch.float32), tiny.wordpiece_tokenizer())
