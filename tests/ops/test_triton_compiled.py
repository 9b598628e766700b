"""The Triton kernels compile for every architecture of the table without spills and within its shared memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

from cottention.ops.triton import config
from cottention.ops.triton.table import DECAY, DECAY_FOUR_WARPS, FOUR_WARPS, KINDS, TABLE, WIDTHS
from tests.ops.triton_compiled import (
    SHARED_LIMIT,
    calls_of,
    compile_for,
    launches_of,
    step_of,
)

_ARCHITECTURES = [*SHARED_LIMIT]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.fixture(autouse=True)
def _newest_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "has_race_of_warps", lambda: False)


def _check(call: Callable[[], None], arch: str, *, only: str = "", may_spill: int = 0) -> list[str]:
    """Compile what a call launches; the names of the kernels."""
    launched = [each for each in launches_of(call, arch) if only in each.name]
    for each in launched:
        found = compile_for(arch, each)
        assert found.spilled <= may_spill, f"{each.name} on {arch} spills: {found}"
        assert found.shared_bytes <= SHARED_LIMIT[arch], f"{each.name} on {arch} takes too much: {found}"
        assert found.registers > 0
    return [each.name for each in launched]


def test_the_table_has_every_entry() -> None:
    assert TABLE.keys() == DECAY.keys() == set(_ARCHITECTURES)
    assert FOUR_WARPS.keys() == DECAY_FOUR_WARPS.keys()
    for entries in TABLE.values():
        assert entries.keys() == {(kind, width) for kind in KINDS for width in WIDTHS}


@pytest.mark.parametrize("arch", _ARCHITECTURES)
def test_forward_at_the_commonest_head_dim_compiles_without_spills(arch: str) -> None:
    assert _check(calls_of("bf16", 64, 64, form="segments"), arch, only="linear forward") == ["linear forward"]


def test_a_whole_call_compiles_without_spills() -> None:
    names = _check(calls_of("bf16", 32, 32, form="segments"), "sm_90")
    assert names == ["state", "scan", "linear forward", "state", "scan", "linear dq, dk, dv"]


def test_forward_with_decay_compiles_without_spills() -> None:
    assert _check(calls_of("bf16", 64, 64, form="decay"), "sm_90", only="linear forward") == ["linear forward"]


@pytest.mark.parametrize("arch", _ARCHITECTURES)
def test_the_step_compiles_without_spills(arch: str) -> None:
    assert _check(step_of("bf16", 128, 128, is_gated=True), arch) == ["step"]


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", _ARCHITECTURES)
def test_the_whole_table_compiles_without_spills(arch: str, kind: str, width: int) -> None:
    for form in ("segments", "short"):
        _check(calls_of(kind, width, width, form=form), arch)
    for is_gated in (False, True):
        _check(step_of(kind, width, width, is_gated=is_gated), arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", _ARCHITECTURES)
@pytest.mark.parametrize("form", ["segments", "short"])
def test_bidirectional_and_uneven_head_dims_compile_without_spills(form: str, arch: str) -> None:
    _check(calls_of("bf16", 64, 64, form=form, causal=False), arch)
    _check(calls_of("bf16", 96, 64, form=form), arch)
    _check(calls_of("bf16", 64, 128, form=form), arch)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", _ARCHITECTURES)
def test_the_whole_table_compiles_without_spills_with_decay(arch: str, kind: str, width: int, causal: bool) -> None:
    _check(calls_of(kind, width, width, form="decay", causal=causal), arch)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "width"), FOUR_WARPS)
def test_four_warps_compile_without_spills(kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "has_race_of_warps", lambda: True)
    may_spill = 32 if (kind, width) == ("ieee", 256) else 0  # in the smallest tiles that there are
    for form in ("segments", "short"):
        _check(calls_of(kind, width, width, form=form), "sm_100", may_spill=may_spill)
    may_spill = 16 if (kind, width) == ("bf16", 256) else 0
    for causal in (True, False):
        _check(calls_of(kind, width, width, form="decay", causal=causal), "sm_100", may_spill=may_spill)
