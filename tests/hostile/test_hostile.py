"""Whatever a stranger's file holds, a command does its work or says in one line why not, within time and memory.

No code of the file runs, no network is asked, no traceback is shown. One test a kind, since a fork takes a hundredth of
the time that pytest needs for a test of its own; a failure lists the cases with what came.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from cottention.training.pretraining import pretrain
from cottention.training.recipe_files import recipe_text
from tests import tiny
from tests.hostile.cases import all_cases
from tests.hostile.warm import run, warm_up
from tests.training.helpers import tiny_recipe, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

CASES = all_cases()
KINDS = list(dict.fromkeys(name.partition(":")[0] for name in CASES))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where every command works: models, a stopped run, a text."""
    warm_up()
    folder = tmp_path_factory.mktemp("honest") / "folder"
    tiny.save(folder / "gpt", tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer())
    tiny.save(folder / "bert", tiny.bert(dtype=torch.float32), tiny.wordpiece_tokenizer())
    (folder / "gpt" / "evil.py").write_text("import pathlib; pathlib.Path('canary').touch()\n")
    for manifest in folder.glob("*/MANIFEST.json"):
        manifest.unlink()  # a stranger writes hashes that fit, or none
    write_corpus(folder / "text.txt", num_paragraphs=120)
    before = Path.cwd()
    os.chdir(folder)  # the run's recipe names its text from here
    try:
        recipe = tiny_recipe("gpt", Path("text.txt"), training__max_steps=3, training__save_every=1)
        (folder / "run.yaml").write_text(recipe_text(recipe))
        pretrain(recipe, output_dir="run")
    finally:
        os.chdir(before)
    shutil.rmtree(folder / "run" / "model")
    return folder


def test_there_are_more_kinds_than_were_found_by_hand() -> None:
    assert len(CASES) >= 174


def test_the_honest_folder_works(honest: Path, tmp_path: Path) -> None:
    """Without this, every case might fail for another reason than its own."""
    shutil.copytree(honest, tmp_path / "folder")
    for words in (
        ["generate", "--model", "gpt", "--prompt", "The people", "--max-new-tokens", "2"],
        ["fill-mask", "--model", "bert", "The [MASK]"],
        ["pretrain", "gpt", "--config", "run.yaml", "--output-dir", "run"],
        ["data", "build", "gpt", "text.txt", "--output-dir", "corpus"],
    ):
        outcome = run(words, tmp_path / "folder")
        assert (outcome.code, outcome.canary) == (0, False), outcome.err


@pytest.mark.parametrize("kind", KINDS)
def test_hostile(kind: str, honest: Path, tmp_path: Path) -> None:
    failures = []
    for number, (name, case) in enumerate(CASES.items()):
        if name.partition(":")[0] != kind:
            continue
        folder = tmp_path / str(number)
        shutil.copytree(honest, folder)
        outcome = run(case(folder), folder)
        if problem := outcome.problem():
            failures.append(f"{name}: {problem} after {outcome.seconds:.1f} s: {outcome.err[-700:]}")
        shutil.rmtree(folder)
    assert not failures, "\n\n".join([f"{len(failures)} failures", *failures])
