"""The recommended block and its hybrid do all that a model is for: scores, texts, states, fine-tuning."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from cottention.benchmarks.memory import MALLOC_ENVIRONMENT
from cottention.convert import convert_softmax
from cottention.evaluation import evaluate_harness, evaluate_perplexity
from cottention.generation import generate_text, load_model_and_tokenizer, load_state, read_text, save_state
from cottention.models import CottentionGPTForSequenceClassification
from cottention.training.finetune_settings import FinetuneSettings
from cottention.training.finetuning import finetune
from tests import tiny
from tests.glue_files import write_glue

PARTS: dict[str, Any] = {"short_conv": 4, "output_norm": True, "output_gate": "silu"}
PLUS: dict[str, Any] = {**PARTS, "decay": "data", "erase": True, "divisor": "none"}
MIX = ["linear_attention", "full_attention"]
HYBRID: dict[str, Any] = {**PLUS, "layer_types": MIX}
KINDS = {"plus": PLUS, "hybrid": HYBRID}
DOCUMENT = "The people of the United States serve crème brûlée to the people. " * 4


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.gpt(dtype=torch.float32, **KINDS[request.param])


def _nats(model: Any, text: str) -> float:
    """Of every token behind the end-of-text that begins the reading, by one plain forward."""
    ids = torch.tensor([[0, *tiny.bpe_tokenizer()(text)["input_ids"]]])
    with torch.no_grad():
        log_probs = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return -float(log_probs.gather(1, ids[0, 1:, None]).sum())


def _cut_off(text: str) -> Dataset:
    return Dataset.from_dict({"text": [text], "ends_document": [False]})


def test_perplexity_is_that_of_one_forward_beyond_the_window_too(model: Any) -> None:
    expected = _nats(model, DOCUMENT)
    for context in (64, 500):
        found = evaluate_perplexity(model, tiny.bpe_tokenizer(), _cut_off(DOCUMENT), context=context).nats
        assert (found == pytest.approx(expected, rel=1e-4)) == (context == 500)


def test_a_linear_model_carries_its_state_over_windows() -> None:
    model = tiny.gpt(dtype=torch.float32, **PLUS)
    carried = evaluate_perplexity(model, tiny.bpe_tokenizer(), _cut_off(DOCUMENT), context=16, carry_state=True)
    assert carried.nats == pytest.approx(_nats(model, DOCUMENT), rel=1e-4)


def test_the_harness_finds_the_same(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval.tasks", reason="needs lm-eval: pip install 'cottention[harness]'")
    from tests.evaluation.test_harness import PASSAGES, WHOLE, task_folder

    folder = task_folder(tmp_path / "tasks", [{"text": text} for text in PASSAGES], WHOLE)
    result = evaluate_harness(model, tiny.bpe_tokenizer(), ["text_local"], include_path=folder)
    (found,) = (score.value for score in result.scores if score.metric == "byte_perplexity")
    nats, num_bytes = sum(_nats(model, text) for text in PASSAGES), sum(len(text.encode()) for text in PASSAGES)
    assert math.log(found) == pytest.approx(nats / num_bytes, abs=1e-4)


def test_a_saved_state_is_gone_on_from_as_the_text_itself(model: Any, tmp_path: Path) -> None:
    tokenizer, path = tiny.bpe_tokenizer(), tmp_path / "document.state"
    model = model.double()
    save_state(path, read_text(model, tokenizer, DOCUMENT, prefill_chunk=7), model, tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0}
    expected = generate_text(model, tokenizer, DOCUMENT + " Who", **options).texts
    assert (
        generate_text(model, tokenizer, [" Who"], state=load_state(path, model, tokenizer), **options).texts == expected
    )


def test_what_decoding_keeps_grows_in_a_hybrid_alone() -> None:
    def kept(options: dict[str, Any], num_tokens: int) -> int:
        model = tiny.gpt(dtype=torch.float32, eos_token_id=None, **options)
        return generate_text(model, tiny.bpe_tokenizer(), "The", max_new_tokens=num_tokens, seed=0).state_bytes

    assert kept(PLUS, 60) == kept(PLUS, 20)
    assert kept(HYBRID, 60) > kept(HYBRID, 20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpt_is_fine_tuned_to_tell_texts_apart(kind: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "gpt", tiny.gpt(dtype=torch.float32, std=0.05, **KINDS[kind]), tiny.bpe_tokenizer())
    torch.manual_seed(0)
    model: Any = CottentionGPTForSequenceClassification.from_pretrained(source, num_labels=2, pad_token_id=1)
    rows = torch.randint(2, 290, (8, 12))
    labels = (rows[:, 3] > 145).long()  # far from the last token, which is what the head reads
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(input_ids=rows, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < 0.5 < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bert_is_fine_tuned_on_a_task(kind: str, tmp_path: Path) -> None:
    # Both directions of a text: no erase, and a convolution of the tokens around.
    parts: dict[str, Any] = {**PARTS, "short_conv": 3, "decay": "learned", "divisor": "none", "norm_first": True}
    mix: dict[str, Any] = {"layer_types": MIX} if kind == "hybrid" else {}
    source = tiny.save(tmp_path / "bert", tiny.bert(dtype=torch.float32, **parts, **mix), tiny.wordpiece_tokenizer())
    data = write_glue(tmp_path / "glue", num_rows=20)
    settings = FinetuneSettings(epochs=1, batch_size=8, max_length=32)
    result = finetune(source, task="rte", data=data, output_dir=tmp_path / "run", settings=settings)
    assert result.model_dir is not None
    opened = load_model_and_tokenizer(result.model_dir, "classifier")[0]
    assert opened.config.short_conv == 3
    assert set(opened.config.layer_types) == set(MIX if kind == "hybrid" else MIX[:1])


def test_a_softmax_twin_is_converted_to_a_hybrid_that_writes(tmp_path: Path) -> None:
    twin = tiny.gpt("softmax", torch.float32, **PARTS)
    source = tiny.save(tmp_path / "twin", twin, tiny.bpe_tokenizer())
    convert_softmax(source, tmp_path / "hybrid", keep_every=2)
    model, tokenizer = load_model_and_tokenizer(tmp_path / "hybrid", "causal-lm")
    assert model.config.layer_types == MIX
    assert (model.config.short_conv, model.config.output_norm, model.config.output_gate) == (4, True, "silu")
    assert generate_text(model, tokenizer, "The", max_new_tokens=5).num_new_tokens == 5


_WRITE = """
import sys, torch
from cottention.benchmarks.memory import _start_high_water_mark, _status_bytes
from cottention.generation import generate_text
from tests import tiny
from tests.evaluation.test_recommended_block import PLUS

model, tokenizer = tiny.gpt(dtype=torch.float32, **PLUS), tiny.bpe_tokenizer()
with torch.no_grad():
    model.lm_head.bias[0] = -1e3  # never ends
generate_text(model, tokenizer, "The", max_new_tokens=200)
before = _start_high_water_mark()
written = generate_text(model, tokenizer, "The", max_new_tokens=int(sys.argv[1]))
print(written.num_new_tokens, written.state_bytes, _status_bytes("VmHWM") - before)
"""


def _written(num_tokens: int) -> list[int]:
    """Tokens, bytes of the state, bytes of memory that writing them took."""
    environment = {**os.environ, **MALLOC_ENVIRONMENT, "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    command = [sys.executable, "-c", _WRITE, str(num_tokens)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    return [int(word) for word in ran.stdout.split()]


@pytest.mark.slow
def test_a_hundred_thousand_tokens_are_written_from_a_state_that_does_not_grow() -> None:
    if not os.path.exists("/proc/self/clear_refs"):  # noqa: PTH110
        pytest.skip("needs the high-water mark of Linux")
    short, long = _written(1_000), _written(100_000)
    assert (short[0], long[0]) == (1_000, 100_000)
    assert long[1] == short[1]
    # What is left of the text is itself, as numbers and as characters; keys and values would be 256 bytes a layer.
    assert long[2] - short[2] < 99_000 * 100
