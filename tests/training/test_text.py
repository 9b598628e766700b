"""From a recipe's data section to windows: nothing of the held-out text is trained on, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cottention.data import load_corpus
from cottention.errors import DataError, SettingsError
from cottention.training.documents import open_documents
from cottention.training.recipe_sections import DataSettings
from cottention.training.text import prepare_text
from tests.training.helpers import Run, tiny_recipe


def documents(texts: Any) -> list[str]:
    """Documents of a corpus, joined where they take several rows."""
    whole, part = [], ""
    for row in texts:
        part += row["text"]
        if row["ends_document"]:
            whole.append(part)
            part = ""
    return whole


def settings(source: Path, **changes: Any) -> DataSettings:
    """Paragraphs of a file."""
    return DataSettings(**{"source": str(source), "split_by": "paragraph", "validation": 0.1, **changes})


@pytest.mark.parametrize(("fraction", "num_held_out"), [(0.1, 4), (0.5, 20), (0.001, 1), (0.999, 39)])
def test_whole_documents_are_held_out(fraction: float, num_held_out: int, corpus: Path) -> None:
    train, held_out = open_documents(settings(corpus, validation=fraction), seed=0)
    everything = documents(load_corpus(str(corpus), split_by="paragraph"))
    assert len(documents(held_out)) == num_held_out
    assert sorted([*documents(train), *documents(held_out)]) == sorted(everything)
    assert [text for text in everything if text in set(documents(train))] == documents(train), "in their order"


def test_the_seed_decides_what_is_held_out(corpus: Path) -> None:
    first, again, other = (documents(open_documents(settings(corpus), seed=seed)[1]) for seed in (0, 0, 1))
    assert first == again
    assert set(first) != set(other)


def test_a_document_of_many_rows_is_not_torn_apart(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"{'abc def ' * 100_000}{number}")  # 800 kB: several rows each
    train, held_out = open_documents(settings(tmp_path, split_by="document", validation=0.3), seed=0)
    assert len(held_out) > 2
    assert sorted(text[-1] for text in documents(train) + documents(held_out)) == list("012345")
    assert {len(text) for text in documents(train) + documents(held_out)} == {800_001}
    assert len(documents(held_out)) == 2


def test_one_document_cannot_be_split(corpus: Path) -> None:
    with pytest.raises(
        DataError, match=r"the corpus is one document, .*set data\.split_by to paragraph or line, or name"
    ):
        open_documents(settings(corpus, split_by="document"), seed=0)


def test_held_out_text_can_be_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "held_out.txt").write_text("one\n\ntwo\n")
    train, held_out = open_documents(settings(corpus, validation=str(tmp_path / "held_out.txt")), seed=0)
    assert len(documents(train)) == 40
    assert documents(held_out) == ["one", "two"]


def test_long_documents_are_left_out_of_training(corpus: Path) -> None:
    everything = documents(load_corpus(str(corpus), split_by="paragraph"))
    limit = sorted(map(len, everything))[20]
    train, held_out = open_documents(settings(corpus, max_document_chars=limit), seed=0)
    kept = documents(train) + documents(held_out)
    assert sorted(kept) == sorted(text for text in everything if len(text) <= limit)
    with pytest.raises(DataError, match="at most 1 characters"):
        open_documents(settings(corpus, max_document_chars=1), seed=0)


def test_the_default_corpus_holds_its_own_years_out() -> None:
    train, held_out = open_documents(DataSettings(), seed=0)
    assert max(train["year"]) < 1990 <= min(held_out["year"]) <= max(held_out["year"]) < 2010


@pytest.mark.parametrize("arch", ["gpt", "bert"])
def test_an_evaluation_reads_a_spread_of_the_held_out_windows(arch: str, corpus: Path) -> None:
    few = prepare_text(tiny_recipe(arch, corpus, data__validation=0.5, data__eval_tokens=128), None).held_out
    every = prepare_text(tiny_recipe(arch, corpus, data__validation=0.5, data__eval_tokens=10**9), None).held_out
    assert len(few._windows) == 4
    rows = np.linspace(0, len(every._windows) - 1, 4).round().astype(int)
    for row, window in zip(rows, few._windows, strict=True):
        np.testing.assert_array_equal(window["input_ids"], every._windows[int(row)]["input_ids"])
    assert prepare_text(tiny_recipe(arch, corpus, data__eval_tokens=1), None).held_out._windows.num_rows == 1


@pytest.mark.parametrize("arch", ["gpt", "bert"])
def test_a_tokenizer_is_trained_on_the_training_text_alone(arch: str, corpus: Path, tmp_path: Path) -> None:
    train, held_out = open_documents(settings(corpus), seed=0)
    text = prepare_text(tiny_recipe(arch, corpus), None)
    (tmp_path / "train.txt").write_text("\n\n".join(documents(train)))
    (tmp_path / "held_out.txt").write_text("\n\n".join(documents(held_out)))
    named = tiny_recipe(arch, tmp_path / "train.txt", data__validation=str(tmp_path / "held_out.txt"))
    assert prepare_text(named, None).tokenizer.get_vocab() == text.tokenizer.get_vocab()


def test_the_fingerprint_names_the_windows(finished: Run, corpus: Path) -> None:
    text = prepare_text(finished.recipe, finished.directory)
    assert text.fingerprint() == prepare_text(finished.recipe, None).fingerprint(), "trained again, the same tokenizer"
    arch = finished.recipe.arch
    others = [
        prepare_text(tiny_recipe(arch, corpus, **changes), None).fingerprint()
        for changes in ({"training__seed": 1}, {"data__sequence_length": 31}, {"data__validation": 0.2})
    ]
    assert len({text.fingerprint(), *others}) == 4


def test_a_gpt_tokenizer_does_not_train_a_bert(finished_gpt: Run, corpus: Path) -> None:
    recipe = tiny_recipe("bert", corpus, data__tokenizer=str(finished_gpt.directory / "tokenizer"))
    with pytest.raises(SettingsError, match="the tokenizer has no cls_token, sep_token"):
        prepare_text(recipe, None)
