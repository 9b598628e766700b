"""What the training tests share: a corpus of nonsense, a cache of their own, one finished run of each architecture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import datasets.config
import pytest

from cottention.training.pretraining import pretrain
from tests.distributed.ranks import Ranks
from tests.training.helpers import Run, tiny_recipe, write_corpus


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Arrow files of the tests go away with them; processes started by a test get the folder from the environment."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of short paragraphs."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text.txt", num_paragraphs=40)


@pytest.fixture(scope="session")
def finished_gpt(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of a GPT. Tests copy it before they change anything."""
    return _run("gpt", corpus, tmp_path_factory)


@pytest.fixture(scope="session")
def finished_bert(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same of a BERT."""
    return _run("bert", corpus, tmp_path_factory)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes for runs of several."""
    with Ranks(4, ("tests.training.parallel_checks", "matplotlib.figure")) as started:
        yield started


@pytest.fixture(params=["gpt", "bert"])
def finished(request: pytest.FixtureRequest) -> Run:
    """Each of the two."""
    return request.getfixturevalue(f"finished_{request.param}")


def _run(arch: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = tiny_recipe(arch, corpus)
    run_dir = tmp_path_factory.mktemp(arch) / "run"
    return Run(recipe, run_dir, pretrain(recipe, output_dir=run_dir))
