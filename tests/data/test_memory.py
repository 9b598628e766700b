"""From 200 MB of text to windows: memory does not grow with the corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.subprocesses import run_python

_LINE = "It is the duty of the Executive to lay before the Congress , in 1861 , such information as is useful .\n"

# Private memory is sampled from a thread: pages of mapped files, which the system takes back at will, do not count.
_PIPELINE = """
import json, threading, time
from pathlib import Path
from datasets import Dataset, config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from cottention.data import load_corpus, pack_windows, tokenize_documents
config.HF_DATASETS_CACHE = Path({cache!r})

# A whole word is a token: some times as quick as BPE.
vocab = {{word: number for number, word in enumerate(dict.fromkeys(["[END]", *{line!r}.split()]))}}
words = Tokenizer(models.WordLevel(vocab, unk_token="[END]"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[END]")

def private_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

most = 0.0
def watch():
    global most
    while True:
        most = max(most, private_mb())
        time.sleep(0.01)

before = private_mb()
threading.Thread(target=watch, daemon=True).start()
figures = {{}}
def measure(stage, made):
    global most
    figures[stage] = most - before
    most = 0.0
    return made

corpus = measure("read", load_corpus({path!r}, split_by={split_by!r}))
figures["size"] = len(corpus)
if {split_by!r} == "document":
    tokens = measure("tokenise", tokenize_documents(corpus, tokenizer))
    windows = measure("pack", pack_windows(tokens, 1024, tokenizer.eos_token_id))
    figures["size"] = len(windows)
print(json.dumps(figures))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, which tells private memory")
@pytest.mark.parametrize("split_by", ["document", "line"])
def test_memory_does_not_grow_with_the_corpus(tmp_path, split_by):
    measured = {}
    for megabytes in (20, 200):
        path = tmp_path / f"{megabytes}.txt"
        with path.open("w") as file:
            for _ in range(megabytes):
                file.write(_LINE * (1_000_000 // len(_LINE)))
        names = {"cache": str(tmp_path / "cache"), "path": str(path), "split_by": split_by, "line": _LINE}
        measured[megabytes] = json.loads(run_python(_PIPELINE.format(**names)).stdout)
        path.unlink()
    small, large = measured[20], measured[200]
    assert large.pop("size") > 9 * small.pop("size")
    for stage in small:
        # Ten times the text would take 180 MB more where it was held, and as ids several times that.
        assert large[stage] < small[stage] + 60, measured
