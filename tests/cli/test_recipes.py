"""`cottention recipes` names every recipe and prints one that `--config` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cottention.cli.main import main
from cottention.training.recipe_files import load_recipe, packaged_recipes


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "list"]])
def test_it_lists_every_recipe_with_what_it_is_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == packaged_recipes()
    assert all(20 < len(line) <= 120 for line in lines), lines


@pytest.mark.parametrize("name", packaged_recipes())
def test_what_it_shows_is_a_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", name]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe(name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show"], "recipes show needs a name, one of bert_base_cosine, "),
        (["show", "gpt_smal_cosine"], "no recipe is named 'gpt_smal_cosine'; did you mean 'gpt_small_cosine'?"),
        (["show", __file__], "no recipe is named '/"),
        (["list", "quickstart_gpt"], "did you mean `recipes show quickstart_gpt`?"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
