"""`cottention slurm`: the script that it writes, and what it refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cottention.cli.main import main

_JOB = ["slurm", "--config", "gpt_300m_cosine", "--output-dir", "runs/a b"]


def _script(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main([*_JOB, *more, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_the_script_is_bash_and_says_what_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    script = _script(capsys, "--nodes", "2", "--gpus-per-node", "4", "--partition", "long", "--flags", "--seed 3")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    options = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    for option in ("nodes=2", "gpus-per-node=4", "cpus-per-task=32", "partition=long", "signal=B:TERM@120", "requeue"):
        assert option in options
    assert "--nproc-per-node=4" in script
    assert "--rdzv-backend=c10d" in script
    where = Path("runs/a b").absolute()
    assert f"-m cottention pretrain gpt --config gpt_300m_cosine --seed 3 --output-dir '{where}' &" in script


def test_without_gpus_there_are_processes(capsys: pytest.CaptureFixture[str]) -> None:
    script = _script(capsys, "--gpus-per-node", "0", "--processes-per-node", "2", "--cpus-per-process", "3")
    assert "gpus-per-node" not in script
    assert "--nproc-per-node=2" in script
    assert "#SBATCH --cpus-per-task=6" in script


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "0"], "nodes must be at least 1; got 0"),
        (["--partition", "a b"], "partition must be a word as sbatch takes it; got 'a b'"),
        (["--flags", "'"], "flags must be words as a shell takes them"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*_JOB, *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_without_sbatch_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(_JOB) == 2
    assert "sbatch is not to be found" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
