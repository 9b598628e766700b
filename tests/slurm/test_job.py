"""A pretraining job in a real SLURM: two processes, pre-empted, put back into the queue, finished.

Needs Debian's slurm-wlm and munge, and root: `make test-slurm`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]

_PATIENCE_S = 900


def _submit(cluster: Cluster, run: Path) -> str:
    command = [sys.executable, "-m", "cottention", "slurm", "--config", str(Path(__file__).with_name("tiny.yaml"))]
    command += ["--output-dir", str(run), "--gpus-per-node=0", "--processes-per-node=2", "--cpus-per-process=1"]
    command += ["--time-limit=1:00:00", "--partition=low"]
    ran = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()[1].rstrip(":")


def _saved_steps(run: Path) -> list[int]:
    return sorted(int(found[1]) for file in run.rglob("*") if (found := re.fullmatch(r"checkpoint-(\d+)", file.name)))


def _failed(cluster: Cluster, number: str) -> bool:
    return cluster.job(number).get("JobState") == "FAILED"


def test_a_job_is_preempted_requeued_and_finishes(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "run.slurm"
    with Cluster(tmp_path / "cluster") as cluster:
        number = _submit(cluster, run)
        cluster.wait(lambda: _saved_steps(run) or _failed(cluster, number), "a checkpoint", _PATIENCE_S)
        urgent = ["sbatch", "--parsable", "--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap", "sleep 1"]
        other = cluster.run(*urgent, check=True).stdout.strip()
        cluster.wait(lambda: cluster.job(other).get("JobState") == "COMPLETED", "the urgent job", _PATIENCE_S)
        before = _saved_steps(run)[-1]
        end = ("COMPLETED", "FAILED")
        cluster.wait(lambda: cluster.job(number).get("JobState") in end, "the job to finish", _PATIENCE_S)
        assert not _failed(cluster, number), (folder / f"job-{number}.log").read_text()
        assert int(cluster.job(number)["Restarts"]) >= 1
    assert 0 < before < 400
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [each["step"] for each in metrics if "loss" in each]
    assert steps[-1] == 400
    log = (folder / f"job-{number}.log").read_text()
    assert "back into the queue" in log
    for attempt in (0, 1):
        logs = list((folder).glob(f"{number}.{attempt}/**/std*.log"))
        assert {file.parent.name for file in logs} == {"0", "1"}, logs
