"""Directories that appear whole or not at all, and how damage to them is found."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from cottention.errors import CheckpointError
from cottention.training import checkpoints
from cottention.training.checkpoints import (
    MANIFEST,
    atomic_directory,
    checkpoint_name,
    checkpoint_step,
    damage,
    list_checkpoints,
    newest_intact_checkpoint,
    rotate,
    staging_area,
    write_atomically,
    writing_to,
)


def save(folder: Path, step: int, content: str = "weights") -> Path:
    """A sealed checkpoint of two files."""
    target = folder / checkpoint_name(step)
    with atomic_directory(target, sealed=True) as staging:
        (staging / "model").write_text(content)
        (staging / "deep").mkdir()
        (staging / "deep" / "state").write_bytes(b"\0" * 100)
    return target


def test_a_directory_appears_when_its_block_ends_and_not_before(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a", sealed=False) as staging:
        assert staging.name == "a"
        assert staging.parent == staging_area(tmp_path)
        (staging / "file").write_text("x")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "file").read_text() == "x"
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    save(tmp_path, 1, "old")
    with pytest.raises(TypeError):
        save(tmp_path, 1, 7)  # type: ignore[arg-type]  # fails while it writes
    assert (tmp_path / "checkpoint-1" / "model").read_text() == "old"
    assert damage(tmp_path / "checkpoint-1") is None
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1"}


def test_a_directory_replaces_its_predecessor_whole(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    (first / "more").write_text("of the old one")
    save(tmp_path, 1, "new")
    assert (first / "model").read_text() == "new"
    assert not (first / "more").exists()
    assert damage(first) is None


def test_what_a_killed_save_left_is_swept_away(tmp_path: Path) -> None:
    left = staging_area(tmp_path) / "checkpoint-1"
    left.mkdir(parents=True)
    (left / "model").write_text("half")
    (left / "strange").write_text("of the killed one")
    target = save(tmp_path, 1)
    assert damage(target) is None
    assert not (target / "strange").exists()
    assert not staging_area(tmp_path).exists()


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noting_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noting_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "rename", noting_rename)
    save(tmp_path, 1)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert sorted(before) == sorted(["model", "state", "deep", MANIFEST, "checkpoint-1"])
    assert after == [tmp_path.name]


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda folder: (folder / "model").unlink(), "model is missing"),
        (lambda folder: os.truncate(folder / "model", 3), "model has 3 bytes instead of 7"),
        (lambda folder: (folder / "model").write_text("weighty"), "model was changed after it was written"),
        (lambda folder: (folder / "deep" / "state").write_bytes(b"1" * 100), "deep/state was changed after it was written"),  # noqa: E501
        (lambda folder: shutil.rmtree(folder / "deep"), "deep/state is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "MANIFEST.json is missing"),
        (lambda folder: os.truncate(folder / MANIFEST, 20), "MANIFEST.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "MANIFEST.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("[1]"), "MANIFEST.json cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"model": 7}'), "MANIFEST.json cannot be read"),
    ],
)  # fmt: skip
def test_damage_is_found_and_named(harm, problem: str, tmp_path: Path, log_lines: list[str]) -> None:
    good, bad = save(tmp_path, 9), save(tmp_path, 10)
    assert newest_intact_checkpoint(tmp_path) == bad
    harm(bad)
    assert damage(bad) == problem
    assert newest_intact_checkpoint(tmp_path) == good
    assert log_lines == [f"checkpoint {bad} is damaged ({problem}): trying the one before"]
    shutil.rmtree(good)
    with pytest.raises(CheckpointError, match=f"^every checkpoint in {tmp_path} is damaged; --overwrite starts again$"):
        newest_intact_checkpoint(tmp_path)


def test_checkpoints_are_listed_by_their_step(tmp_path: Path) -> None:
    for name in (
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-3",
        "checkpoint-x",
        "checkpoint-",
        "checkpoint-²",
        "other-7",
    ):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert checkpoint_step(tmp_path / "checkpoint-100") == 100
    assert list_checkpoints(tmp_path / "missing") == []
    assert newest_intact_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_rotation_keeps_the_newest(keep: int, tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    (staging_area(tmp_path) / "checkpoint-7").mkdir(parents=True)
    rotate(tmp_path, keep)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [8, 9, 10, 11][-keep:]
    assert not staging_area(tmp_path).exists()


def test_a_rotation_that_is_killed_leaves_no_checkpoint_that_looks_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def killed(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, 1)
    assert [damage(path) for path in list_checkpoints(tmp_path)] == [None]


def test_a_small_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    write_atomically(path, "first")
    assert path.read_text() == "first"

    def killed(_descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "second")
    assert path.read_text() == "first"
    write_atomically(path, "third")
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"recipe.yaml": "third"}


def test_only_errors_of_writing_are_reported_as_such(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    with pytest.raises(CheckpointError, match="No space left on device; what was saved before is intact") as caught:  # noqa: SIM117
        with writing_to(tmp_path):
            raise full
    assert caught.value.__cause__ is full
    with pytest.raises(RuntimeError, match="shapes do not fit"), writing_to(tmp_path):
        raise RuntimeError("shapes do not fit")


def test_a_manifest_names_every_file(tmp_path: Path) -> None:
    entries = json.loads((save(tmp_path, 1) / checkpoints.MANIFEST).read_text())
    assert {name: entry["bytes"] for name, entry in entries.items()} == {"model": 7, "deep/state": 100}


FORGED: dict[str, list[str]] = {
    "run_state.json": [
        "",
        "[]",
        "{}",
        "null",
        "[" * 100_000,
        '{"step": "3", "window_start": 0, "window_losses": [], "elapsed_s": 1, "text": "x"}',
        '{"step": 3, "window_start": 0, "window_losses": [["x"]], "elapsed_s": 1, "text": "x"}',
        '{"epochs": {}, "loss_sum": 0, "rows": "x"}',
    ],
    "trainer_state.json": [
        "[]",
        "{}",
        '{"global_step": "3", "epoch": 1.0}',
        '{"global_step": 3, "epoch": 1.0, "x": 1}',
    ],
    "tokenizer_config.json": ["[]", "{"],
    "optimizer.pt": ["", "cos\nsystem\n(S'touch canary'\ntR.", "PK"],
    "rng_state.pth": ["garbage"],
}


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, texts in FORGED.items() for text in texts])
def test_a_checkpoint_of_wrong_content_under_a_right_seal_is_passed_over(
    name: str, content: str, tmp_path: Path, log_lines: list[str]
) -> None:
    honest = save(tmp_path, 1)
    with atomic_directory(tmp_path / checkpoint_name(3), sealed=True) as staging:
        (staging / name).write_text(content)
    assert damage(tmp_path / "checkpoint-3") is None
    assert newest_intact_checkpoint(tmp_path) == honest
    assert len(log_lines) == 1
    assert "checkpoint-3 is damaged" in log_lines[0]
    assert name in log_lines[0]


def test_what_runs_write_is_taken(tmp_path: Path) -> None:
    states = (
        {"step": 3, "window_start": 2, "window_losses": [[1.5, 2]], "elapsed_s": 1, "text": "x"},
        {"epochs": [{}], "loss_sum": 0.0, "rows": "x"},
    )
    for step, state in enumerate(states, start=1):
        with atomic_directory(tmp_path / checkpoint_name(step), sealed=True) as staging:
            (staging / "run_state.json").write_text(json.dumps(state))
            TrainerState(global_step=step, epoch=0.5, max_steps=9).save_to_json(str(staging / "trainer_state.json"))
            torch.save({"a": torch.ones(2)}, staging / "optimizer.pt")
        assert newest_intact_checkpoint(tmp_path) == tmp_path / checkpoint_name(step)
