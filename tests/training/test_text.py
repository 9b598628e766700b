"""From a recipe's data section to windows: nothing of the held-out text is trained on, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cottention.data import load_corpus
from cottention.data.building import build_documents, tokenize_text
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


def sized(folder: Path, sizes: list[int]) -> Path:
    """A folder of files with so many bytes."""
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        (folder / f"{number:03}.txt").write_text(f"{number:03} " + "words of it " * (size // 12))
    return folder


def num_bytes(texts: Any) -> int:
    return sum(len(row["text"]) for row in texts)


NOVELS = [150_000, 470_000, 440_000, 600_000, 1_200_000, 210_000, 700_000, 660_000, 900_000]


@pytest.mark.parametrize("seed", range(9))
def test_a_hundredth_of_a_few_large_files_is_no_quarter_of_them(
    tmp_path: Path, log_lines: list[str], seed: int
) -> None:
    source = sized(tmp_path / "novels", NOVELS)
    train, held_out = open_documents(settings(source, split_by="document", validation=0.01), seed=seed)
    share = num_bytes(held_out) / (num_bytes(train) + num_bytes(held_out))
    assert share < 0.03
    assert "1 of 9 documents (2.8 % of the text) is held out" in "\n".join(log_lines)
    assert "data.split_by" in log_lines[-1]


@pytest.mark.parametrize("seed", range(5))
def test_the_share_is_of_the_text_not_of_the_documents(tmp_path: Path, seed: int) -> None:
    source = sized(tmp_path / "mixed", [1000] * 90 + [100_000] * 10)
    train, held_out = open_documents(settings(source, split_by="document", validation=0.05), seed=seed)
    share = num_bytes(held_out) / (num_bytes(train) + num_bytes(held_out))
    assert share < 0.11
    assert len(documents(train)) + len(documents(held_out)) == 100


@pytest.mark.parametrize("least", [1, 2])
def test_documents_far_too_large_for_the_share_are_refused_with_the_remedy(tmp_path: Path, least: int) -> None:
    source = sized(tmp_path / "books", [2_000_000, 1_000_000, 1_000_000, 1_000_000])
    with pytest.raises(DataError) as error:
        open_documents(settings(source, split_by="document", validation=0.01), seed=0, least=least)
    message = str(error.value)
    share = {1: "1 of 4 documents (20 % of the text)", 2: "2 of 4 documents (40 % of the text)"}[least]
    assert message.startswith(f"{share} would be held out, more than ten times data.validation = 0.01")
    assert "data.split_by" in message
    train, held_out = open_documents(settings(source, split_by="document", validation=0.2), seed=0)
    assert num_bytes(held_out) == pytest.approx(0.2 * (num_bytes(train) + num_bytes(held_out)), rel=0.01)


def test_two_files_of_which_one_is_large_hold_the_small_one_out(tmp_path: Path, log_lines: list[str]) -> None:
    source = sized(tmp_path / "two", [2_000_000, 200_000])
    for seed in range(4):
        train, held_out = open_documents(settings(source, split_by="document", validation=0.01), seed=seed)
        assert num_bytes(held_out) < 250_000 < num_bytes(train)
    assert "1 of 2 documents (9.1 % of the text) is held out; set data.split_by" in log_lines[-1]


@pytest.mark.parametrize("seed", range(3))
def test_where_the_share_is_met_the_documents_are_those_of_before(corpus: Path, seed: int) -> None:
    whole = load_corpus(str(corpus), split_by="paragraph")
    for fraction in (0.05, 0.1, 0.3):
        _, held_out = open_documents(settings(corpus, validation=fraction), seed=seed)
        first = np.random.default_rng(seed).permutation(len(whole))[: round(fraction * len(whole))]
        assert documents(held_out) == [whole[int(row)]["text"] for row in sorted(first)]


def test_a_corpus_of_tokens_holds_out_a_share_of_its_text(tmp_path: Path, log_lines: list[str]) -> None:
    source = sized(tmp_path / "novels", [size // 10 for size in NOVELS])
    tokens = tmp_path / "tokens"
    tokenize_text(source, tokens, None, vocab_size=300)
    recipe = tiny_recipe("gpt", tokens, data__validation=0.01, data__tokenizer="train", data__split_by="document")
    prepare_text(recipe, None)
    assert any("1 of 9 documents (2.8 % of the text) is held out" in line for line in log_lines)
    build_documents(source, tmp_path / "text")
    log_lines.clear()
    prepare_text(tiny_recipe("gpt", tmp_path / "text", data__validation=0.01, data__split_by="document"), None)
    assert any("1 of 9 documents (2.8 % of the text) is held out" in line for line in log_lines)


@pytest.mark.parametrize("arch", ["gpt", "bert"])
def test_pretraining_leaves_out_malformed_lines_where_the_recipe_says_so(
    tmp_path: Path, log_lines: list[str], corpus: Path, arch: str
) -> None:
    lines = corpus.read_bytes().split(b"\n\n")
    (tmp_path / "text.txt").write_bytes(b"\n\n".join([*lines[:3], b"a b\xffd line", *lines[3:]]))
    with pytest.raises(DataError, match="not UTF-8"):
        prepare_text(tiny_recipe(arch, tmp_path / "text.txt"), None)
    good = prepare_text(tiny_recipe(arch, corpus), None)
    mended = prepare_text(tiny_recipe(arch, tmp_path / "text.txt", data__skip_malformed=True), None)
    assert mended.fingerprint() == good.fingerprint()
    assert "left out 1 malformed line or row: 1 with a byte that is not UTF-8" in log_lines
