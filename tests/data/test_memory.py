"""From 250 MB of text to windows: memory does not grow with the corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.subprocesses import run_python

# Private memory is sampled from a thread: pages of mapped files, which the system takes back at will, do not count.
_PIPELINE = """
import json, threading, time
from pathlib import Path
from datasets import Dataset, config
config.HF_DATASETS_CACHE = Path({cache!r})
from cottention.data import load_corpus, pack_windows, tokenize_documents, train_tokenizer

def private_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

peak = 0.0
def watch():
    global peak
    while True:
        peak = max(peak, private_mb())
        time.sleep(0.01)

tokenizer = train_tokenizer(Dataset.from_dict({{"text": [Path({sample!r}).read_text()]}}), vocab_size=300)
tokenize_documents(Dataset.from_dict({{"text": ["warm up " * 300_000] * 4}}), tokenizer)
threading.Thread(target=watch, daemon=True).start()
before = private_mb()
peaks = {{}}
def stage(name, made):
    global peak
    peaks[name] = peak - before
    peak = 0.0
    return made
corpus = stage("read", load_corpus({path!r}, split_by={split_by!r}))
tokens = stage("tokenise", tokenize_documents(corpus, tokenizer))
windows = stage("pack", pack_windows(tokens, 1024, tokenizer.eos_token_id))
print(json.dumps({{**peaks, "rows": len(corpus), "windows": len(windows)}}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, which tells private memory")
@pytest.mark.parametrize("split_by", ["document", "line"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, split_by):
    line = "It is the duty of the Executive to lay before the Congress, in 1861, such information as is useful.\n"
    measured = {}
    sample = tmp_path / "sample.txt"
    sample.write_text(line * 10)
    for megabytes in (25, 250):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w") as file:
            for _ in range(megabytes):
                file.write(line * (1_000_000 // len(line)))
        program = _PIPELINE.format(cache=str(tmp_path / "cache"), sample=str(sample), path=str(path), split_by=split_by)
        measured[megabytes] = json.loads(run_python(program).stdout)
        path.unlink()
    small, large = measured[25], measured[250]
    assert large["windows"] > 9 * small["windows"]
    for stage in ("read", "tokenise", "pack"):
        # Ten times the text would take 225 MB more where it was held, as ids several times that.
        assert large[stage] < small[stage] + 60, measured
