"""Tables on disk: written once, mapped, complete or not there, and one line where they cannot be written."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Features, Value
from datasets import config as datasets_config

from cottention.data.arrow_cache import cached_dataset, fingerprint_of, using_cache
from cottention.errors import DataError
from tests.damage import HARMS
from tests.data.helpers import ordinary_user, refusal
from tests.subprocesses import run_python

FEATURES = Features({"number": Value("int32")})


def tables(num_tables: int = 3, log: list[int] | None = None) -> Iterator[pa.Table]:
    """Tables of 100 rows; `log` gets the number of each when it is made."""
    for index in range(num_tables):
        if log is not None:
            log.append(index)
        yield pa.table({"number": list(range(100 * index, 100 * index + 100))})  # int64, to be cast


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_what_was_written_comes_back_memory_mapped(cache):
    dataset = cached_dataset(tables(), FEATURES, key=["a"])
    assert dataset["number"][:] == list(range(300))
    assert dataset.features == FEATURES
    assert [Path(file["filename"]).parent for file in dataset.cache_files] == [cache / "cottention"]
    assert type(dataset.data).__name__ == "MemoryMappedTable"


def test_no_table_gives_no_row(cache):
    dataset = cached_dataset(tables(0), FEATURES, key=["a"])
    assert len(dataset) == 0
    assert dataset.features == FEATURES


def test_a_key_is_written_once():
    log = []
    first = cached_dataset(tables(log=log), FEATURES, key=["a", 1])
    again = cached_dataset(tables(log=log), FEATURES, key=["a", 1])
    assert log == [0, 1, 2]
    assert first.cache_files == again.cache_files
    assert fingerprint_of(first) == fingerprint_of(again)


def test_the_fingerprint_follows_from_the_key_alone(cache, tmp_path, monkeypatch):
    first = fingerprint_of(cached_dataset(tables(), FEATURES, key=["a", 1]))
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "elsewhere")
    assert fingerprint_of(cached_dataset(tables(), FEATURES, key=["a", 1])) == first


@pytest.mark.parametrize("other", [["a", 2], ["b", 1], ["a", "1"], ["a", 1, None], [("a", 1)]])
def test_another_key_is_another_file(other):
    first = cached_dataset(tables(1), FEATURES, key=["a", 1])
    second = cached_dataset(tables(2), FEATURES, key=other)
    assert (len(first), len(second)) == (100, 200)
    assert fingerprint_of(first) != fingerprint_of(second)


def test_tables_are_written_one_by_one(cache):
    sizes = []

    def watched():
        for table in tables(20):
            yield table
            sizes.append(sum(path.stat().st_size for path in cache.rglob("*.partial")))

    cached_dataset(watched(), FEATURES, key=["a"])
    assert sizes == sorted(set(sizes))  # the file has grown with every table
    assert files_in(cache)[0].endswith(".arrow")


def test_a_file_gets_its_name_when_it_is_whole(cache):
    inodes = []

    def watched():
        for table in tables():
            yield table
            (partial,) = (cache / "cottention").iterdir()
            inodes.append(partial.stat().st_ino)
            assert partial.suffix == ".partial"

    cached_dataset(watched(), FEATURES, key=["a"])
    (file,) = (cache / "cottention").iterdir()
    assert file.suffix == ".arrow"
    assert inodes == [file.stat().st_ino] * 3  # renamed, not copied


def test_an_error_of_the_producer_passes_and_leaves_nothing(cache):
    def failing():
        yield from tables(2)
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        cached_dataset(failing(), FEATURES, key=["a"])
    assert files_in(cache) == []
    assert len(cached_dataset(tables(), FEATURES, key=["a"])) == 300


def test_an_interruption_leaves_nothing(cache):
    def interrupted():
        yield from tables(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_dataset(interrupted(), FEATURES, key=["a"])
    assert files_in(cache) == []


def test_whom_files_are_open_to_follows_the_umask(cache):
    before = os.umask(0o027)
    try:
        cached_dataset(tables(), FEATURES, key=["a"])
    finally:
        os.umask(before)
    (file,) = (cache / "cottention").iterdir()
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("kept", [0, 3, 200, 0.5, 0.99])
def test_a_damaged_file_is_written_anew(cache, caplog, kept):
    cached_dataset(tables(), FEATURES, key=["a"])
    (file,) = (cache / "cottention").iterdir()
    content = file.read_bytes()
    file.unlink()  # a mapped file must not shrink
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with caplog.at_level(logging.WARNING, "cottention"):
        assert cached_dataset(tables(), FEATURES, key=["a"])["number"][:] == list(range(300))
    assert "damaged" in caplog.text
    assert file.read_bytes() == content


def test_a_cache_that_may_not_be_written_is_one_line(public_path):
    folder = public_path / "cache"
    folder.mkdir()
    folder.chmod(0o555)
    with ordinary_user(), pytest.raises(DataError) as error:
        cached_dataset(tables(), FEATURES, key=["a"])
    message = refusal(error)
    assert "Permission denied" in message
    assert str(folder) in message
    assert "HF_DATASETS_CACHE" in message


def test_a_written_cache_is_read_without_the_right_to_write(public_path):
    cached_dataset(tables(), FEATURES, key=["a"])
    for path in [*(public_path / "cache").rglob("*"), public_path / "cache"]:
        path.chmod(0o555)
    with ordinary_user():
        assert len(cached_dataset(tables(), FEATURES, key=["a"])) == 300


def test_a_file_of_the_cache_that_may_not_be_read_is_left_alone(public_path):
    cached_dataset(tables(), FEATURES, key=["a"])
    (file,) = (public_path / "cache" / "cottention").iterdir()
    file.parent.chmod(0o777)
    file.chmod(0)
    inode = file.stat().st_ino
    with ordinary_user(), pytest.raises(DataError) as error:
        cached_dataset(tables(), FEATURES, key=["a"])
    assert "Permission denied" in refusal(error)
    assert file.stat().st_ino == inode


def test_a_cache_that_may_not_be_entered_is_one_line(public_path):
    folder = public_path / "cache"
    folder.mkdir()
    folder.chmod(0)
    with ordinary_user(), pytest.raises(DataError) as error:
        cached_dataset(tables(), FEATURES, key=["a"])
    assert "Permission denied" in refusal(error)


def test_a_file_where_the_cache_should_be_is_one_line(cache):
    cache.write_text("")
    with pytest.raises(DataError) as error:
        cached_dataset(tables(), FEATURES, key=["a"])
    assert "Not a directory" in refusal(error) or "File exists" in refusal(error)


def test_a_full_disk_is_one_line_wherever_it_fills_up(cache):
    # A limit on the size of files acts like a full disk; in a process of its own, because it holds for all its files.
    ran = run_python(
        f"""
        import resource, signal
        from pathlib import Path
        from datasets import config
        config.HF_DATASETS_CACHE = Path({str(cache)!r})
        from cottention.data.arrow_cache import cached_dataset
        from cottention.errors import DataError
        from tests.data.test_arrow_cache import FEATURES, files_in, tables
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for limit in range(0, 1500, 50):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                cached_dataset(tables(2), FEATURES, key=["a"])
            except DataError as error:
                assert "File too large; HF_DATASETS_CACHE chooses another" in str(error), error
                assert files_in(config.HF_DATASETS_CACHE) == [], limit
                print("refused")
            else:
                print("written")
        """
    )
    outcomes = ran.stdout.split()
    assert outcomes.count("refused") > 15
    assert outcomes[-1] == "written"
    assert len(cached_dataset(tables(2, log := []), FEATURES, key=["a"])) == 200
    assert log == []


def test_what_killed_runs_left_is_removed_a_day_later(cache):
    folder = cache / "cottention"
    folder.mkdir(parents=True)
    old, fresh = folder / "old.partial", folder / "fresh.partial"
    old.write_text("half")
    fresh.write_text("half")
    os.utime(old, times=(0, time.time() - 90_000))
    cached_dataset(tables(), FEATURES, key=["a"])
    assert not old.exists()
    assert fresh.exists()  # its writer may be alive


def test_other_errors_pass_through_using_cache():
    with pytest.raises(KeyError), using_cache():
        raise KeyError
    with pytest.raises(DataError, match="no space at all; HF_DATASETS_CACHE chooses another"), using_cache():
        raise OSError("no space at all")


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("seed", range(8))
def test_one_bit_or_some_zeros_are_noticed_and_the_file_written_anew(cache, harm, seed, caplog):
    cached_dataset(tables(), FEATURES, key=["a"])
    (file,) = (cache / "cottention").iterdir()
    content = file.read_bytes()
    file.unlink()  # a mapped file keeps what was mapped
    file.write_bytes(content)
    harm(file, random.Random(seed))
    with caplog.at_level(logging.WARNING, "cottention"):
        assert cached_dataset(tables(), FEATURES, key=["a"])["number"][:] == list(range(300))
    assert "is written anew" in caplog.text
    assert file.read_bytes() == content
