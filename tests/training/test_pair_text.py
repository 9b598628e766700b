"""Sentence pairs of a recipe from corpora of sentences and of pairs; the same documents are held out at any length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from cottention.data import open_corpus, train_tokenizer
from cottention.data.building import build_sentences, tokenize_pairs
from cottention.data.sources import ReadSettings
from cottention.errors import CottentionError
from cottention.training.pair_text import open_pairs
from cottention.training.pretraining import pretrain
from tests.training.helpers import metrics_of
from tests.training.test_pair_training import pair_recipe, stories  # noqa: F401


@pytest.fixture(scope="session")
def corpora(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Directories `sentences`, `pairs-32`, `pairs-64` and `tokenizer`."""
    folder = tmp_path_factory.mktemp("corpora")
    build_sentences([str(stories)], folder / "sentences", reading=ReadSettings(split_by="paragraph"), num_proc=1)
    texts = [text for row in open_corpus(folder / "sentences").dataset["sentences"] for text in row]
    tokenizer = train_tokenizer(Dataset.from_dict({"text": texts}), kind="wordpiece", vocab_size=160)
    tokenizer.save_pretrained(folder / "tokenizer")
    for length in (32, 64):
        name = folder / f"pairs-{length}"
        tokenize_pairs(folder / "sentences", name, tokenizer, max_length=length, num_proc=1)
    return folder


def from_pairs(corpora: Path, *lengths: int, **changes: Any) -> Any:
    """A recipe for corpora of pairs."""
    names = [str(corpora / f"pairs-{length}") for length in lengths or (32, 64)]
    return pair_recipe(Path("unused"), data__source=names, **changes)


def documents_of(examples: Any) -> set[int]:
    """Numbers of the documents that examples come from."""
    return set(examples._pairs.with_format("numpy")["document"][:].tolist())


def test_tokenised_corpora_are_told_apart_by_their_length(corpora: Path) -> None:
    text = open_pairs(from_pairs(corpora), None)
    stored = {length: open_corpus(corpora / f"pairs-{length}").dataset for length in (32, 64)}
    assert text.long is not None
    assert len(text.train) + len(text.held_out) == len(stored[32])
    assert len(text.train) > len(text.long) > 0
    rows = np.arange(len(text.train))
    assert max(len(first) + len(second) + 3 for first, second in text.train.raw(rows)) <= 32
    longest = max(len(first) + len(second) + 3 for first, second in text.long.raw(np.arange(len(text.long))))
    assert 32 < longest <= 64
    assert len(text.tokenizer) == 160, "the corpus has its own"


def test_the_same_documents_are_held_out_at_both_lengths(corpora: Path) -> None:
    text = open_pairs(from_pairs(corpora, data__validation=0.3), None)
    assert text.long is not None
    held_out, train = documents_of(text.held_out), documents_of(text.train)
    assert 8 <= len(held_out) <= 30
    assert not held_out & (train | documents_of(text.long))
    assert train | held_out == documents_of_corpus(corpora / "pairs-32")
    again = documents_of(open_pairs(from_pairs(corpora, data__validation=0.3), None).held_out)
    other = documents_of(open_pairs(from_pairs(corpora, data__validation=0.3, training__seed=1), None).held_out)
    assert again == held_out != other


def documents_of_corpus(path: Path) -> set[int]:
    """Numbers of a corpus's documents."""
    return set(open_corpus(path).dataset["document"])


def test_sentences_give_the_pairs_of_the_tokenised_corpus(corpora: Path) -> None:
    changes = {"data__tokenizer": str(corpora / "tokenizer"), "data__validation": 0.3}
    sentences = pair_recipe(Path("unused"), data__source=str(corpora / "sentences"), **changes)
    made, stored = open_pairs(sentences, None), open_pairs(from_pairs(corpora, **changes), None)
    for name in ("train", "long", "held_out"):
        ours, theirs = getattr(made, name), getattr(stored, name)
        assert len(ours) == len(theirs)
        for one, other in zip(ours.raw(np.arange(len(ours))), theirs.raw(np.arange(len(theirs))), strict=True):
            np.testing.assert_array_equal(one[0], other[0])
            np.testing.assert_array_equal(one[1], other[1])


def test_held_out_corpora_can_be_named(corpora: Path) -> None:
    text = open_pairs(from_pairs(corpora, data__validation=str(corpora / "pairs-32")), None)
    stored = open_corpus(corpora / "pairs-32").dataset
    assert len(text.train) == len(text.held_out) == len(stored)


def test_a_run_reads_tokenised_corpora(corpora: Path, tmp_path: Path) -> None:
    recipe = from_pairs(corpora, training__max_steps=4, data__tokenizer=str(corpora / "tokenizer"))
    result = pretrain(recipe, output_dir=tmp_path / "run")
    assert result.step == 4
    assert "val_nsp_accuracy" in metrics_of(tmp_path / "run")[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__source": ["{}/pairs-32"]},
            "needs a corpus with pairs of 64 tokens; got 32; .*--max-length 64",
        ),
        ({"data__source": ["{}/pairs-32", "text.txt"]}, "data.source must be text or corpora, not both; "),
        ({"data__validation": "text.txt"}, "data.validation must be a fraction or corpora"),
        ({"data__validation": "{}/pairs-64"}, "data.validation needs a corpus with pairs of 32 tokens; got 64"),
        ({"data__tokenizer": "OTHER"}, "the pairs in .*pairs-32 were made with another tokenizer than data.tokenizer"),
        ({"data__source": "{}/sentences"}, "data.tokenizer must be named for a corpus of sentences; got 'train' and "),
        ({"data__validation": 0.0001}, "the held-out text holds no sentence pair"),
    ],
)
def test_corpora_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, corpora: Path, tmp_path: Path, finished_bert: Any
) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(one) for one in value]
        return value.replace("{}", str(corpora)) if isinstance(value, str) else value

    changes = {name: filled(value) for name, value in changes.items()}
    if changes.get("data__tokenizer") == "OTHER":
        changes["data__tokenizer"] = str(finished_bert.directory / "tokenizer")
    recipe = pair_recipe(
        Path("unused"), **{"data__source": [str(corpora / "pairs-32"), str(corpora / "pairs-64")], **changes}
    )
    with pytest.raises(CottentionError, match=message) as error:
        open_pairs(recipe, None)
    assert "\n" not in str(error.value)


def test_a_tokenizer_too_large_for_the_model_is_refused(corpora: Path, tmp_path: Path) -> None:
    with pytest.raises(CottentionError, match=r"model\.vocab_size must be at least the tokenizer's 160; got 100"):
        pretrain(from_pairs(corpora, model__vocab_size=100), output_dir=tmp_path / "run")


@pytest.fixture(scope="module")
def one_is_large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of 30 documents, of which one is two thirds of the text."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(30):
        text = " ".join(f"Sentence {row} of text {number} is here." for row in range(400 if number == 7 else 8))
        (folder / f"{number:02}.txt").write_text(text)
    build_sentences([str(folder)], folder / "sentences", num_proc=1)
    tokenizer = train_tokenizer(
        Dataset.from_dict({"text": ["Sentence of text is here. 0123456789"] * 9}), kind="wordpiece", vocab_size=90
    )
    for length in (32, 64):
        tokenize_pairs(folder / "sentences", folder / f"pairs-{length}", tokenizer, max_length=length, num_proc=1)
    return folder


@pytest.mark.parametrize("seed", range(6))
def test_a_large_document_is_not_the_share_of_thirty(one_is_large: Path, seed: int) -> None:
    text = open_pairs(from_pairs(one_is_large, data__validation=0.15, training__seed=seed), None)
    held_out = len(text.held_out) / (len(text.held_out) + len(text.train))
    assert 0 < held_out < 0.3
    assert text.long is not None
    assert not documents_of(text.held_out) & documents_of(text.long)
