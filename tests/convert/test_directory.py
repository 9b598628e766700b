"""A conversion writes a whole directory or nothing, and replaces a model only when it is asked to."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cottention.convert import convert_official
from tests.convert.helpers import (
    BIN,
    change_tensors,
    message_of,
)
from tests.forks import run_fork

Published = Callable[[str], Path]


def test_an_existing_destination_is_replaced_only_when_asked(published: Published, tmp_path: Path) -> None:
    source, destination = published("gpt_rot8"), tmp_path / "converted"
    convert_official(source, destination)
    (destination / "mark").touch()
    assert "exists already; pass --overwrite" in message_of(source, destination)
    assert (destination / "mark").exists()
    convert_official(source, destination, overwrite=True)
    assert not (destination / "mark").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["converted", "published-gpt_rot8"]


def test_overwrite_replaces_models_only(published: Published, tmp_path: Path) -> None:
    source = published("gpt_rot8")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    assert "not a model directory" in message_of(source, precious, overwrite=True)
    assert "holds the source itself" in message_of(source, source, overwrite=True)
    assert (precious / "thesis.tex").exists()
    assert (source / BIN).exists()


def test_a_failed_replacement_leaves_the_old_model(published: Published, tmp_path: Path) -> None:
    source, destination = published("gpt_rot8"), tmp_path / "converted"
    convert_official(source, destination)
    change_tensors(source, lambda tensors: tensors.pop("lm_head.bias"))
    message_of(source, destination, overwrite=True)
    assert (destination / "model.safetensors").is_file()


def test_a_full_disk_leaves_nothing(published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerBase

    def fails(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    source = published("gpt_rot8")
    # The weights are on disk by then, the tokenizer is not.
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fails)
    assert "No space left on device" in message_of(source, tmp_path / "converted")


def test_a_written_tensor_that_reads_back_differently_is_noticed(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerBase

    save = PreTrainedTokenizerBase.save_pretrained

    def save_and_spoil(self: PreTrainedTokenizerBase, directory: Path, **options: Any) -> object:
        weights = load_file(Path(directory) / "model.safetensors")
        weights["lm_head.bias"][0] += 1
        save_file(weights, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        return save(self, directory, **options)

    source = published("gpt_rot8")
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_and_spoil)
    assert "reads back differently: lm_head.bias" in message_of(source, tmp_path / "converted")


def test_a_killed_conversion_leaves_no_destination_and_is_cleared_up(published: Published, tmp_path: Path) -> None:
    source, destination = published("gpt_rot8"), tmp_path / "converted"
    script = textwrap.dedent(
        """
        import os, signal, sys
        from transformers import PreTrainedTokenizerBase
        from cottention.convert import convert_official
        PreTrainedTokenizerBase.save_pretrained = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
        convert_official(sys.argv[1], sys.argv[2])
        """
    )
    killed = run_fork("-c", script, source, destination)
    assert killed.returncode == -signal.SIGKILL
    assert not destination.exists()
    leftovers = [entry for entry in tmp_path.iterdir() if entry.name.startswith(".converted.partial-")]
    assert len(leftovers) == 1
    convert_official(source, destination)
    assert destination.is_dir()
    assert not leftovers[0].exists()
