"""Damage to what is finished is found where it is opened: one bit, 4 KB of zeros, a missing piece, 8 of 8 times."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cottention import seals
from cottention.errors import CheckpointError
from cottention.seals import MANIFEST, check_model, damage, file_damage, model_files, seal, sha256
from tests.damage import HARMS


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(50_000))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    (folder / "generation_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("somebody's")
    seal(folder, model_files(folder, tokenizer=True))
    return folder


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("seed", range(8))
def test_damaged_weights_are_refused_by_name(harm: Callable, seed: int, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    check_model(folder, tokenizer=True)
    harm(folder / "model.safetensors", random.Random(seed))
    with pytest.raises(CheckpointError) as caught:
        check_model(folder)
    assert str(caught.value) == (
        f"{folder}/model.safetensors was changed after it was written: it is damaged, or another program wrote it; if "
        f"that was meant, remove {folder}/{MANIFEST}"
    )
    (folder / MANIFEST).unlink()
    check_model(folder)


def test_what_users_add_and_change_is_theirs(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    for name in ("README.md", "generation_config.json", "adapter_model.safetensors", "new.txt"):
        (folder / name).write_text("other")
    check_model(folder, tokenizer=True)
    (folder / "tokenizer.json").write_text("[]")
    check_model(folder)  # weights alone
    with pytest.raises(CheckpointError, match=r"tokenizer\.json was changed"):
        check_model(folder, tokenizer=True)


def test_an_edited_config_is_a_warning_but_not_where_nobody_edits(tmp_path: Path, log_lines: list[str]) -> None:
    folder = model(tmp_path / "model")
    (folder / "config.json").write_text('{"n_head": 4}')
    check_model(folder)
    assert [line for line in log_lines if "config.json has" in line]
    with pytest.raises(CheckpointError, match=r"config\.json has"):
        check_model(folder, edits=False)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        check_model(folder)


def test_a_directory_without_a_seal_opens_as_before(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / MANIFEST).unlink()
    check_model(folder, tokenizer=True)
    assert damage(folder) == "MANIFEST.json is missing"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "MANIFEST.json cannot be read"),
        ("[1]", "MANIFEST.json cannot be read"),
        ("[" * 100_000, "MANIFEST.json cannot be read"),
        ('{"config.json": {"bytes": 2}}', "MANIFEST.json cannot be read"),
        ('{"../a": {"bytes": 0, "sha256": ""}}', "MANIFEST.json names a file outside, ../a"),
        ('{"/dev/zero": {"bytes": 0, "sha256": ""}}', "MANIFEST.json names a file outside, /dev/zero"),
        ('{"pipe": {"bytes": 0, "sha256": ""}}', "pipe is no file"),
        ('{"config.json/x": {"bytes": 0, "sha256": ""}}', "config.json/x is missing"),
    ],
)
def test_a_seal_that_is_none_is_one_line(content: str, problem: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    os.mkfifo(folder / "pipe")
    (folder / MANIFEST).write_text(content)
    assert damage(folder) == problem
    if problem.startswith(MANIFEST):
        with pytest.raises(CheckpointError, match=MANIFEST):
            check_model(folder)


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, notes = tmp_path / "a", tmp_path / "notes"
    path.write_bytes(b"x" * 1000)
    digest, reads = sha256(path), []
    monkeypatch.setattr(seals, "sha256", lambda *args: reads.append(args) or sha256(*args))
    monkeypatch.setattr(seals, "_SETTLED_S", -1.0)
    for process in range(3):
        assert file_damage(path, 1000, digest, remember=notes) is None
        assert file_damage(path, 1000, digest, remember=notes) is None
        assert len(reads) == 1, process
        seals._intact.clear()
    before = path.stat()
    path.write_bytes(b"x" * 999 + b"y")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # which hides nothing
    assert file_damage(path, 1000, digest, remember=notes) == "was changed after it was written"


def test_a_file_that_has_just_changed_is_not_taken_as_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    assert time.time() - path.stat().st_ctime < seals._SETTLED_S
    assert file_damage(path, 1, sha256(path), remember=tmp_path / "notes") is None
    assert not (tmp_path / "notes").exists()


def test_a_seal_does_not_name_itself(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    seal(folder)
    seal(folder)
    assert damage(folder) is None
    assert MANIFEST not in json.loads((folder / MANIFEST).read_text())
