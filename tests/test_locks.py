"""One writer per directory, whatever becomes of it; a mistake leaves no directory behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cottention.errors import CottentionError
from cottention.locks import InUseError, sole_writer

_HOLD = """
import sys, time
from pathlib import Path
from cottention.locks import sole_writer
with sole_writer(Path(sys.argv[1]), beside=len(sys.argv) > 2):
    {first}
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(directory: Path, *options: str, first: str = "pass") -> Iterator[int]:
    """A process that holds the lock until it is killed, at the end of the block."""
    command = [sys.executable, "-c", _HOLD.format(first=first), directory, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid
        process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("options", [(), ("beside",)])
def test_a_second_writer_is_told_of_the_first_and_a_killed_one_is_in_nobodys_way(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    refused = pytest.raises(InUseError)
    with holder(directory, *options) as pid, refused as caught, sole_writer(directory, beside=bool(options)):
        pass
    assert re.fullmatch(
        rf"{directory} is being written by process {pid} on host {platform.node()} since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d; wait for it, or choose another",
        str(caught.value),
    )
    with sole_writer(directory, beside=bool(options)):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ([] if options else ["run"])
    assert not any(directory.glob("*"))


def test_a_worker_that_outlives_its_killed_parent_keeps_no_lock(tmp_path: Path) -> None:
    fork = "import os; os.fork() or (os.close(1), time.sleep(20), os._exit(0)); time.sleep(0.3)"
    with holder(tmp_path / "run", first=fork):
        pass
    with sole_writer(tmp_path / "run"):
        pass


def test_directories_that_stay_empty_are_taken_away_again(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "a" / "b"):
        assert [entry.name for entry in (tmp_path / "a" / "b").iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with sole_writer(tmp_path / "there"):
        pass
    with sole_writer(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", "a/b", "a/b/file", "there"]


def test_the_same_thread_may_nest_where_it_says_so_and_no_other(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with sole_writer(tmp_path, nested=True):
                pass
        except InUseError as error:
            refused.append(str(error))

    with sole_writer(tmp_path):
        with sole_writer(tmp_path, nested=True):
            pass
        with pytest.raises(InUseError), sole_writer(tmp_path):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(refused) == 1
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def test_processes_of_one_torchrun_are_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sole_writer(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with sole_writer(tmp_path):
            assert (tmp_path / ".lock").exists()
        assert (tmp_path / ".lock").exists()


def test_a_writer_of_another_machine_that_left_without_a_word_is_remarked_on(
    tmp_path: Path, log_lines: list[str]
) -> None:
    (tmp_path / ".lock").write_text(json.dumps({"pid": 7, "host": "node17", "since": "2026-01-02 03:04:05"}))
    with sole_writer(tmp_path):
        pass
    assert len(log_lines) == 1
    assert log_lines[0].startswith(
        f"{tmp_path} was being written by process 7 on host node17 since 2026-01-02 03:04:05"
    )


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b'{"pid": 3}', b"\xff"])
def test_a_damaged_lock_file_is_no_obstacle(left: bytes, tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(left)
    with sole_writer(tmp_path), pytest.raises(InUseError, match="by process"), sole_writer(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with sole_writer(tmp_path / "run"):
        pass
    assert ["has no locks" in line for line in log_lines] == [True]


def test_a_name_that_no_directory_has_is_refused() -> None:
    with pytest.raises(CottentionError, match="holds no zero byte"), sole_writer(Path("a\0b")):
        pass
