"""Files and folders are there whole or not at all, readable as the umask says, and what fails says why in one line."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cottention import files
from cottention.errors import CottentionError
from cottention.files import (
    IGNORE_INDEX,
    check_writable,
    one_line,
    usable_cores,
    write_text,
    written_directory,
    written_file,
)
from tests.subprocesses import run_python


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_a_file(folder: Path) -> None:
    write_text(folder / "a", "new")


def write_an_array(folder: Path) -> None:
    with written_file(folder / "a") as file:
        np.save(file, np.zeros(300_000))  # more than the system takes at once


def write_a_folder(folder: Path) -> None:
    with written_directory(folder / "d") as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "b").write_text("new")


WRITERS = (write_a_file, write_an_array, write_a_folder)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EACCES, errno.ENAMETOOLONG])
def test_an_error_at_any_call_leaves_what_was_there(
    write: Callable[[Path], None], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th call of the system fails, for every n until none does any more; nothing half is left, none is hidden."""
    (tmp_path / "d" / "inner").mkdir(parents=True)
    (tmp_path / "d" / "inner" / "b").write_text("old")
    (tmp_path / "a").write_text("old")
    before, failures = content(tmp_path), 0
    while (caught := _error_of(write, tmp_path, monkeypatch, failures + 1, code)) is not None:
        assert caught.errno == code
        assert write is write_a_folder or caught.filename == str(tmp_path / "a")
        failures += 1
        now = content(tmp_path)
        if now != before:  # only the folder around it was not flushed any more: the new content is there, whole
            with monkeypatch.context() as patch:
                assert _error_of(write, tmp_path, patch, failures + 1, code) is None
            assert now == content(tmp_path)
            break
    assert failures >= 4
    assert content(tmp_path) != before


def _error_of(
    write: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch, which: int, code: int
) -> OSError | None:
    with monkeypatch.context() as patch:
        _failing(patch, which, code)
        try:
            write(folder)
        except OSError as error:
            return error
    return None


def _failing(patch: pytest.MonkeyPatch, which: int, code: int) -> None:
    """Let the `which`-th call of the system fail."""
    calls = [0]

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == which:
                raise OSError(code, os.strerror(code))
            return original(*args, **options)

        return call

    for name in ("fsync", "replace", "rename", "mkdir", "chmod"):
        patch.setattr(os, name, wrapped(getattr(os, name)))
    patch.setattr(Path, "open", wrapped(Path.open))


@pytest.mark.parametrize("write", [write_a_file, write_a_folder])
def test_tidying_up_hides_no_error_when_it_fails_too(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_args: object, **_options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("unlink", "rmdir", "remove"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path)


@pytest.mark.parametrize("write", [write_a_file, write_a_folder])
def test_who_may_read_follows_the_umask(write: Callable[[Path], None], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path)
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [stat.S_IMODE(path.stat().st_mode) for path in written] == [0o640]


def test_files_that_a_library_made_for_its_owner_alone_are_opened(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with written_directory(tmp_path / "model") as staging:
            (staging / "weights").touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model" / "weights").stat().st_mode) == 0o644


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_a_killed_writer_left_is_cleared_by_the_next(what: str, tmp_path: Path) -> None:
    write = {
        "file": "files.write_text(folder / 'a', 'x')",
        "folder": "with files.written_directory(folder / 'a'): pass",
    }
    ran = run_python(
        f"""
        import os, signal
        from pathlib import Path
        from cottention import files
        folder = Path({str(tmp_path)!r})
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        {write[what]}
        """,
        succeed=False,
    )
    assert ran.returncode == -9
    (left,) = tmp_path.iterdir()
    assert "partial" in left.name
    (write_a_file if what == "file" else _folder_a)(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def _folder_a(folder: Path) -> None:
    with written_directory(folder / "a"):
        pass


def test_a_folder_that_was_killed_between_its_two_renames_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_a_folder(tmp_path)
    (tmp_path / "d").rename(tmp_path / f".d.replaced-{files.platform.node()}-{2**22 + 1}")
    files.settle(tmp_path / "d")
    assert content(tmp_path) == {"d/inner/b": b"new"}


def test_a_link_is_followed_and_a_device_is_written_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "x"
    write_text("/dev/null", "x")
    assert not Path("/dev/null").is_file()
    with pytest.raises(OSError, match="No space left") as caught:
        write_text("/dev/full", "x")
    assert caught.value.filename == "/dev/full"


def test_names_that_are_not_utf8_can_be_written_into_json(tmp_path: Path) -> None:
    import json

    name = os.fsdecode(b"caf\xe9.txt")
    write_text(tmp_path / "manifest.json", json.dumps({"name": name}, ensure_ascii=False))
    assert json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8")) == {"name": name}


@pytest.mark.parametrize("length", [200, 250, 255])
def test_long_names_are_no_longer_on_the_way(length: int, tmp_path: Path) -> None:
    name = "é" * (length // 2) + "x" * (length % 2)
    write_text(tmp_path / name, "x")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "--output must have a name; got ''"),
        ("a\0b", "--output must be a file name, which holds no zero byte; got 'a\\x00b'"),
        ("{}/no/file", "--output: cannot write {}/no/file: No such file or directory"),
        ("{}", "--output: cannot write {}: Is a directory"),
        ("{}/a/b", "--output: cannot write {}/a/b: Not a directory"),
        ("{}/" + "x" * 256, "--output: cannot write {}/" + "x" * 256 + ": File name too long"),
        ("/proc/version/x", "--output: cannot write /proc/version/x: Not a directory"),
        ("/proc/x", "--output: cannot write /proc/x: No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(CottentionError) as caught:
        check_writable(name.format(tmp_path), "--output")
    assert str(caught.value) == reason.format(tmp_path)
    assert content(tmp_path) == {"a": b"old"}


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    for name in (tmp_path / "a", tmp_path / "new", "/dev/null"):
        check_writable(name, "--output")
    assert content(tmp_path) == {"a": b"old"}


def test_a_reason_is_one_line() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line(OSError(28, "No space left on device", "x")) == "No space left on device"
    assert one_line(ValueError("\n first\nsecond")) == "first"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(RuntimeError("x" * 300)) == "x" * 197 + "..."


def test_a_file_is_hashed_as_it_is_written(tmp_path: Path) -> None:
    import hashlib

    with written_file(tmp_path / "a") as file:
        np.save(file, np.arange(100_000))
    assert file.sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert file.num_bytes == (tmp_path / "a").stat().st_size
    assert isinstance(file, io.RawIOBase)


def test_every_part_counts_cores_and_ignored_labels_alike() -> None:
    from cottention.benchmarks.environment import describe_environment
    from cottention.data.masking import IGNORED
    from cottention.models import losses

    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == describe_environment("cpu")["cores"] == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert IGNORE_INDEX == IGNORED == losses.IGNORE_INDEX == -100
