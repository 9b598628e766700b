"""An interrupted run is gone on with, and only the same one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cottention.benchmarks import attention, roofline
from cottention.benchmarks.attention import benchmark_attention, open_journal
from cottention.benchmarks.journal import Journal, write_texts
from cottention.benchmarks.settings import AttentionSettings

SETTINGS = AttentionSettings(
    lengths=(64, 128),
    head_dims=(16,),
    batch_heads=((1, 2),),
    passes=("forward",),
    implementations=("chunk",),
    peers=(),
    repeats=2,
)
WHO = {"settings": {"lengths": [64]}}


def test_pieces_are_found_again_by_kind_until_the_run_is_finished(tmp_path: Path):
    with Journal.open(tmp_path, WHO) as journal:
        journal.add("time", {"T": 64})
        journal.add("memory", {"T": 64})
        (path,) = tmp_path.iterdir()
        assert len(path.read_text().splitlines()) == 2  # on disk already
    with Journal.open(tmp_path, WHO) as journal:
        journal.add("time", {"T": 128})
        assert journal.pieces("time") == [{"T": 64}, {"T": 128}]
    with Journal.open(tmp_path, WHO) as journal:
        assert journal.pieces("time") == [{"T": 64}, {"T": 128}]
        journal.finish()
    assert list(tmp_path.iterdir()) == []


def test_another_run_finds_nothing_and_loses_nothing(tmp_path: Path):
    with Journal.open(tmp_path, WHO) as journal:
        journal.add("time", {"T": 64})
    with Journal.open(tmp_path, {"settings": {"lengths": [128]}}) as other:
        assert other.pieces("time") == []
    with Journal.open(tmp_path, WHO) as journal:
        assert journal.pieces("time") == [{"T": 64}]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path):
    with Journal.open(tmp_path, WHO) as journal:
        journal.add("time", {"T": 64})
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text() + '["time", {"T": 1')
    with Journal.open(tmp_path, WHO) as journal:
        assert journal.pieces("time") == [{"T": 64}]
        journal.add("time", {"T": 128})
    with Journal.open(tmp_path, WHO) as journal:
        assert journal.pieces("time") == [{"T": 64}, {"T": 128}]


def test_files_are_replaced_whole(tmp_path: Path):
    assert write_texts({"a.txt": "1"}, tmp_path / "new") == [tmp_path / "new/a.txt"]
    write_texts({"a.txt": "2"}, tmp_path / "new")
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["a.txt"]
    assert (tmp_path / "new/a.txt").read_text() == "2\n"


def test_an_interrupted_benchmark_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roofline, "_MATRIX", 32)
    monkeypatch.setattr(roofline, "_COPIED_BYTES", 1 << 12)
    monkeypatch.setattr(roofline, "_SAMPLE_S", 0.0)
    here = attention.describe_environment("cpu")
    monkeypatch.setattr(attention, "describe_environment", lambda device: here)  # no compiler at work changes it
    timed: list[int] = []
    real_time = attention._time

    def interrupted_at_128(candidates, *others):
        (length,) = {workload.length for workload in candidates}
        if length == 128 and len(timed) == 1:
            raise KeyboardInterrupt
        timed.append(length)
        return real_time(candidates, *others)

    monkeypatch.setattr(attention, "_time", interrupted_at_128)
    with open_journal(SETTINGS, tmp_path) as journal:
        first = benchmark_attention(SETTINGS, journal)
    assert first.interrupted
    assert timed == [64]

    timed += [0]
    monkeypatch.setattr(
        attention, "measure_memory", lambda name, groups, *others: pytest.fail("again") if groups else []
    )
    with open_journal(SETTINGS, tmp_path) as journal:
        second = benchmark_attention(SETTINGS, journal)
        journal.finish()
    assert timed == [64, 0, 128]
    (group,), (earlier,) = second.groups, first.groups
    assert [point.timing is not None and point.memory is not None for point in group] == [True, True]
    assert (group[0].timing, group[0].memory, group[0].limits) == (
        earlier[0].timing,
        earlier[0].memory,
        earlier[0].limits,
    )
    assert not second.interrupted
    assert list(tmp_path.iterdir()) == []


def test_other_settings_begin_anew(tmp_path: Path):
    with open_journal(SETTINGS, tmp_path) as journal:
        journal.add("time", {})
    with open_journal(replace(SETTINGS, repeats=3), tmp_path) as journal:
        assert journal.pieces("time") == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda line: line.replace(b"128", b"129"),  # one digit
        lambda line: b"\xff" + line,
        lambda line: b"[" * 100_000 + b"\n",
        lambda line: b'["time"]\n',
        lambda line: b"null\n",
        lambda line: b'["time", {"T": 128}]\n',
    ],
)
def test_a_damaged_line_is_measured_again(harm, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with Journal.open(tmp_path, WHO) as journal:
        for T in (64, 128, 256):
            journal.add("time", {"T": T})
    (path,) = tmp_path.iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + harm(lines[1]) + lines[2])
    with Journal.open(tmp_path, WHO) as journal:
        assert journal.pieces("time") == [{"T": 64}, {"T": 256}]
    assert "1 damaged pieces are measured again" in caplog.text
    assert path.read_bytes() == lines[0] + lines[2]
