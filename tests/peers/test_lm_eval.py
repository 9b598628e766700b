"""lm-evaluation-harness's own command opens our directories and finds what our command finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cottention.evaluation import evaluate_harness
from tests.evaluation.test_harness import LAMBADA, PASSAGES, task_folder
from tests.peers import clients

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("kind", ["cosine", "softmax"])
def test_its_command_scores_as_ours_does(kind: str, tmp_path: Path):
    pytest.importorskip("lm_eval")
    directory = clients.saved(tmp_path / "model", clients.gpt(kind), clients.tokenizer())
    tasks = task_folder(tmp_path / "tasks", [{"text": text} for text in PASSAGES], LAMBADA)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "lambada_local", "--batch_size", "3"]
    command += ["--model_args", f"pretrained={directory},trust_remote_code=True,add_bos_token=True,dtype=float32"]
    command += ["--include_path", str(tasks), "--device", "cpu", "--output_path", str(tmp_path / "out")]
    # The directory has to open in a process that never imported cottention.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["lambada_local"]["perplexity,none"]
    ours = evaluate_harness(clients.gpt(kind), clients.tokenizer(), ["lambada_local"], include_path=tasks)
    (perplexity,) = (score.value for score in ours.scores if score.metric == "perplexity")
    assert found == pytest.approx(perplexity, rel=1e-4)
