"""Prompts from files: what is not text is one line with its remedy, what has no end is not waited for."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from cottention.cli import _inputs
from cottention.cli._inputs import read_json_lines, read_lines, read_text
from cottention.errors import DataError

GERMAN = "Das Mädchen kam über die Brücke.\n" * 9


@pytest.mark.parametrize(
    ("content", "advised"),
    [
        (GERMAN.encode() + b"\xff" + GERMAN.encode(), "iconv -c -f utf-8 -t utf-8"),
        (GERMAN.encode("latin1"), "iconv -f latin1 -t utf-8"),
        (GERMAN.encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        (GERMAN.encode("utf-16-le"), "iconv -f utf-16le -t utf-8"),
    ],
)
def test_a_prompt_that_is_not_utf8_gets_its_remedy(tmp_path: Path, content: bytes, advised: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_lines(str(tmp_path / "a.txt"))
    assert advised in str(error.value)
    assert "\n" not in str(error.value)
    assert "skip" not in str(error.value)


def test_a_device_has_an_end_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_inputs, "_MOST_BYTES", 1 << 20)
    with pytest.raises(DataError, match="/dev/zero is larger than 1 MiB"):
        read_text("/dev/zero")


def test_a_pipe_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("one\ntwo\n",))
    writer.start()
    assert read_lines(str(tmp_path / "pipe")) == ["one", "two"]
    writer.join()


def test_json_nested_by_thousands_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match="line 1: not JSON"):
        read_json_lines(str(tmp_path / "a.jsonl"), "text")
