"""Pickled weights that would unpack to more than they hold are refused in one line, before anything is unpacked."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cottention.convert.weights import load_pickle_of_primitives, read_weights
from cottention.errors import CheckpointError
from tests.convert.helpers import BIN, message_of

Published = Callable[[str], Path]
STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(3)}


def rewritten(path: Path, compression: int, **contents: bytes) -> Path:
    """A torch archive with the same entries, packed anew; `data` replaces the pickle."""
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, contents.get("data", content) if name.endswith("data.pkl") else content)
    return path


def refused(path: Path) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as error:
        load_pickle_of_primitives(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_archive_is_refused(tmp_path: Path, compression: int) -> None:
    path = rewritten(tmp_path / BIN, compression, data=b"\0" * (32 << 20))
    assert path.stat().st_size < 1 << 20
    assert "is compressed, which torch never does" in refused(path)
    assert "is compressed" in refused(rewritten(tmp_path / BIN, compression))


def test_a_large_pickle_is_refused(tmp_path: Path) -> None:
    path = rewritten(tmp_path / BIN, zipfile.ZIP_STORED, data=b"0" * (17 << 20))
    assert "its pickle is larger than 16 MiB" in refused(path)


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / BIN
    torch.save({"weight": torch.zeros(200_000)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        (data,) = (entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
        for number in range(1, 9):
            again = zipfile.ZipInfo(data.filename[:-1] + str(number))
            again.file_size = again.compress_size = data.file_size
            again.header_offset, again.CRC = data.header_offset, data.CRC
            archive.filelist.append(again)
            archive._didModify = True  # pyright: ignore[reportAttributeAccessIssue]
    assert "more than the file's" in refused(path)


BYTEARRAYS = {
    "protocol 2": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "protocol 0": b"c__builtin__\nbytearray\n(I2147483647\ntR.",
    "by the stack": b"\x80\x04\x8c\x08builtins\x8c\x09bytearray\x93J\xff\xff\xff\x7f\x85R.",
}


@pytest.mark.parametrize("case", BYTEARRAYS)
def test_a_pickle_that_asks_for_two_gigabytes_is_refused(tmp_path: Path, case: str) -> None:
    assert "calls bytearray" in refused(rewritten(tmp_path / "a.bin", zipfile.ZIP_STORED, data=BYTEARRAYS[case]))
    (tmp_path / "b.bin").write_bytes(BYTEARRAYS[case])
    assert "calls bytearray" in refused(tmp_path / "b.bin")
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    (tmp_path / "c.bin").write_bytes(magic + BYTEARRAYS[case])
    assert "calls bytearray" in refused(tmp_path / "c.bin")


def test_a_legacy_pickle_that_says_it_is_endless_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x" * 99)
    assert "its pickle is larger than" in refused(tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(b"I" + b"9" * (17 << 20) + b"\n.")
    refused(tmp_path / "b.bin")


def test_a_tensor_whose_shape_is_larger_than_what_is_stored_is_refused(tmp_path: Path) -> None:
    for name, tensor in {
        "expanded": torch.zeros(1).expand(1 << 40),
        "strided": torch.zeros(4).as_strided((1 << 20, 1 << 20), (0, 0)),
        "meta": torch.zeros(1 << 40, device="meta"),
    }.items():
        torch.save({"weight": tensor}, tmp_path / BIN)
        with pytest.raises(CheckpointError) as error:
            read_weights(tmp_path)
        assert "weight" in str(error.value), name
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_writes_is_read(tmp_path: Path, legacy: bool) -> None:
    half = torch.arange(12.0).half().reshape(3, 4)
    state = {**STATE, "half": half, "view": half[:, 1:3], "turned": half.T, "empty": torch.zeros(0, 3)}
    torch.save(state, tmp_path / BIN, _use_new_zipfile_serialization=not legacy)
    read = read_weights(tmp_path).tensors
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_the_command_refuses_in_one_line(published: Published, tmp_path: Path) -> None:
    source = published("gpt_rot8")
    rewritten(source / BIN, zipfile.ZIP_DEFLATED, data=b"\0" * (32 << 20))
    assert "is compressed" in message_of(source, tmp_path / "converted")


@pytest.mark.slow
def test_three_gigabytes_of_zeros_take_no_memory(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / BIN)
    with zipfile.ZipFile(tmp_path / BIN, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(3 << 10):
                entry.write(bytes(1 << 20))
        archive.writestr("archive/version", "3\n")
    script = (
        "import sys; from pathlib import Path; from cottention.convert.weights import read_weights\n"
        "try: read_weights(Path(sys.argv[1]))\nexcept ValueError as error: print(error)"
    )
    command = f"ulimit -v 4000000; exec {sys.executable} -c '{script}' {tmp_path}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, check=True)
    assert "would become 3,221,225,472" in done.stdout
