"""A library that cannot be used is told in a line, whatever is wrong with its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from cottention.ops.native import binding
from tests.forks import run_fork

pytestmark = pytest.mark.skipif(not binding.is_available(), reason="the native library was not built")


def _library() -> bytes:
    (found,) = (path for path in Path(binding.__file__).parent.glob("_kernels.*") if path.suffix in (".so", ".dylib"))
    return found.read_bytes()


@pytest.mark.parametrize("kept", [0, 3, 40, 64, 100_000, -1])
def test_a_library_that_was_cut_off_is_told_and_ends_nothing(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut.so"
    cut.write_bytes(_library()[:kept])
    monkeypatch.setenv("COTTENTION_NATIVE_LIBRARY", str(cut))
    library, reason = binding._load()
    assert library is None
    assert "cannot be loaded" in reason
    assert "COTTENTION_NATIVE_LIBRARY names it" in reason


def test_a_process_with_such_a_library_goes_on_with_another_implementation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cut.so").write_bytes(_library()[:100_000])
    monkeypatch.setenv("COTTENTION_NATIVE_LIBRARY", str(tmp_path / "cut.so"))
    code = """
import torch
from cottention import cosine_attention
x = torch.ones(1, 3, 1, 4)
print(cosine_attention(x, x, x, None, causal=True)[0].isfinite().all().item())
"""
    ran = run_fork("-c", code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "True"
