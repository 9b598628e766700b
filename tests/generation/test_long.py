"""Memory and time of a step do not grow: with a prompt of a million tokens, and with a text of a hundred thousand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cottention.benchmarks.memory import MALLOC_ENVIRONMENT

_START = """
import json, statistics, sys, time, torch
from cottention.benchmarks.memory import _start_high_water_mark, _status_bytes
from cottention.generation import generate_text, read_text
from tests import tiny

tokenizer = tiny.bpe_tokenizer()
model = tiny.gpt(dtype=torch.float32, n_embd=64, vocab_size=290)
with torch.no_grad():
    model.lm_head.bias[0] = -1e3  # never ends
num_tokens = int(sys.argv[1])
"""
_READ = """
read_text(model, tokenizer, "x " * 5000)
before = _start_high_water_mark()
text = "".join(f"The people of the United States number {number}. " for number in range(num_tokens // 20))
while len(tokenizer(text[: 1 << 18])["input_ids"]) * len(text) < num_tokens * (1 << 18):
    text += text[: len(text) // 4]
started = time.perf_counter()
state = read_text(model, tokenizer, text)
seconds = time.perf_counter() - started
grown = _status_bytes("VmHWM") - before
print(json.dumps({"num_tokens": state.num_tokens, "seconds": seconds, "grown": grown, "text": len(text)}))
"""
_WRITE = """
marks = {}

def note(piece):
    marks["count"] = marks.get("count", 0) + 1
    for name, place in (("first", 100), ("last", num_tokens - 2000)):
        if marks["count"] == place:
            marks[name] = _status_bytes("VmRSS")
            marks["times"] = marks.get("times", []) + [time.perf_counter()]
        elif marks["count"] == place + 1000:
            marks["times"].append(time.perf_counter())

generate_text(model, tokenizer, "The people", max_new_tokens=2000)
with torch.no_grad():
    model.lm_head.bias[:] = -1e3
    model.lm_head.bias[70:90] = 0  # a letter each, so that every token is a piece of text
    model.lm_head.weight *= 0.1
result = generate_text(model, tokenizer, "The people", max_new_tokens=num_tokens, stream=note, top_p=1.0)
assert result.num_new_tokens == marks["count"] == num_tokens
a, b, c, d = marks["times"]
print(json.dumps({"grown": marks["last"] - marks["first"], "ratio": (d - c) / (b - a), "step_s": (b - a) / 1000}))
"""


def measured(code: str, num_tokens: int) -> dict[str, float]:
    environment = {**os.environ, **MALLOC_ENVIRONMENT, "PYTHONPATH": f".{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", _START + code, str(num_tokens)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(autouse=True)
def _needs_linux() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs the high-water mark of Linux")


@pytest.mark.slow
def test_a_prompt_of_a_million_tokens_is_read_in_constant_memory() -> None:
    found = measured(_READ, 1_000_000)
    assert found["num_tokens"] >= 1_000_000
    # The text, its tokens, and the tokenizer's work on one block are in it.
    assert found["grown"] < 200_000_000


@pytest.mark.slow
def test_memory_and_step_are_the_same_after_many_tokens() -> None:
    found = measured(_WRITE, 20_000)
    assert found["grown"] < 1_000_000
    assert found["ratio"] < 2  # other work on the machine may hit either
