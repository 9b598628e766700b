"""A corpus directory as a recipe's text: the same windows as from the raw text, with its own tokenizer and no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cottention.data import load_tokenizer
from cottention.data.building import build_documents, tokenize_text
from cottention.data.sources import ReadSettings
from cottention.errors import DataError, SettingsError
from cottention.training.pretraining import pretrain
from cottention.training.text import prepare_text
from tests.training.helpers import metrics_of, tiny_recipe, write_corpus

PARAGRAPHS = ReadSettings(split_by="paragraph")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file."""
    return write_corpus(tmp_path_factory.mktemp("raw") / "text.txt", num_paragraphs=40)


@pytest.fixture(scope="module")
def tokens(raw: Path) -> Path:
    """A corpus of its tokens, with a tokenizer trained on it."""
    path = raw.parent / "tokens"
    tokenize_text([raw], path, None, vocab_size=290, reading=PARAGRAPHS, num_proc=1)
    return path


def windows_of(recipe: Any) -> list[list[int]]:
    """All windows to train on."""
    return np.asarray(prepare_text(recipe, None).train["input_ids"]).tolist()  # type: ignore[index]


def test_tokens_of_a_corpus_give_the_windows_of_its_text(raw: Path, tokens: Path) -> None:
    from_text = tiny_recipe("gpt", raw, data__tokenizer=str(tokens / "tokenizer"))
    assert windows_of(tiny_recipe("gpt", tokens)) == windows_of(from_text)
    assert windows_of(tiny_recipe("gpt", tokens, data__tokenizer=str(tokens / "tokenizer"))) == windows_of(from_text)


def test_a_corpus_of_text_is_read_like_its_files(raw: Path, tokens: Path, tmp_path: Path) -> None:
    build_documents([raw], tmp_path / "text", reading=PARAGRAPHS)
    tokenizer = str(tokens / "tokenizer")
    from_corpus = tiny_recipe("gpt", tmp_path / "text", data__tokenizer=tokenizer)
    assert windows_of(from_corpus) == windows_of(tiny_recipe("gpt", raw, data__tokenizer=tokenizer))


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_held_out_text_is_named_as_text_or_as_tokens(kind: str, raw: Path, tokens: Path, tmp_path: Path) -> None:
    named = raw
    if kind == "tokens":
        named = tmp_path / "held-out"
        tokenize_text([raw], named, load_tokenizer(tokens / "tokenizer"), reading=PARAGRAPHS, num_proc=1)
    found: Any = prepare_text(tiny_recipe("gpt", tokens, data__validation=str(named)), None)
    assert found.held_out._windows[0]["input_ids"].tolist() == found.train[0]["input_ids"].tolist()


def test_a_run_on_tokens_leaves_its_tokenizer_beside_the_model(tokens: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("gpt", tokens, data__mode="document", training__max_steps=2, training__eval_every=2)
    result = pretrain(recipe, output_dir=tmp_path / "run")
    for folder in (tmp_path / "run" / "tokenizer", result.model_dir):
        assert folder is not None
        assert load_tokenizer(folder).get_vocab() == load_tokenizer(tokens / "tokenizer").get_vocab()
    assert "val_nats_per_byte" in metrics_of(tmp_path / "run")[-1]


def test_another_tokenizer_is_refused(raw: Path, tokens: Path, tmp_path: Path) -> None:
    tokenize_text([raw], tmp_path / "other", None, vocab_size=280, reading=PARAGRAPHS, num_proc=1)
    with pytest.raises(SettingsError, match=r"tokens was made with another tokenizer than data\.tokenizer=.*other"):
        prepare_text(tiny_recipe("gpt", tokens, data__tokenizer=str(tmp_path / "other" / "tokenizer")), None)
    with pytest.raises(SettingsError, match=r"other was made with another tokenizer than .*tokens; tokenise it again"):
        prepare_text(tiny_recipe("gpt", tokens, data__validation=str(tmp_path / "other")), None)
    shutil.copytree(tokens, tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "tokenizer")
    with pytest.raises(DataError, match=r"mixed has no tokenizer/; tokenise the text again"):
        prepare_text(tiny_recipe("gpt", tmp_path / "mixed"), None)
    shutil.copytree(tmp_path / "other" / "tokenizer", tmp_path / "mixed" / "tokenizer")
    with pytest.raises(DataError, match="is not the tokenizer that the tokens beside it were made with"):
        prepare_text(tiny_recipe("gpt", tmp_path / "mixed"), None)


def test_a_corpus_of_another_kind_is_refused(tokens: Path, tmp_path: Path) -> None:
    shutil.copytree(tokens, tmp_path / "pairs")
    manifest = json.loads((tmp_path / "pairs" / "manifest.json").read_text())
    (tmp_path / "pairs" / "manifest.json").write_text(json.dumps({**manifest, "kind": "bert-pairs"}))
    with pytest.raises(DataError, match=r"pairs holds bert-pairs, made by .*; gpt-tokens is needed here"):
        prepare_text(tiny_recipe("gpt", tmp_path / "pairs"), None)
