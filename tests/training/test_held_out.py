"""The held-out loss: exact, whatever the batch, and the same that an evaluation of the finished model gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from cottention.data.collators import CausalCollator, MaskedLMCollator
from cottention.data.packing import pack_mlm_windows, pack_windows
from cottention.data.tokenization import tokenize_documents
from cottention.evaluation import evaluate_perplexity
from cottention.generation import load_model_and_tokenizer
from cottention.models import CottentionBertForMaskedLM, CottentionGPTForCausalLM
from cottention.training.held_out import HeldOut, count_targets
from cottention.training.pretraining import pretrain
from cottention.training.text import prepare_text
from tests import tiny
from tests.training.helpers import Run, metrics_of, tiny_recipe

FP32 = {"device_type": "cpu", "enabled": False}
TEXTS = [text * 3 for text in tiny.TEXTS]


def gpt_windows(length: int = 16) -> Any:
    """Windows of a text whose last one is padded."""
    tokens = tokenize_documents(Dataset.from_dict({"text": TEXTS}), tiny.bpe_tokenizer())
    windows = pack_windows(tokens, length, 0, tail="pad")
    assert int(windows[len(windows) - 1]["num_tokens"]) < length
    return windows


def bert_windows(length: int = 16) -> Any:
    """The same for a BERT."""
    tokenizer = tiny.wordpiece_tokenizer()
    tokens = tokenize_documents(Dataset.from_dict({"text": TEXTS}), tokenizer)
    special: dict[str, Any] = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad")
    }
    return pack_mlm_windows(tokens, length, tail="pad", **special)


def held_out(kind: str, batch_size: int) -> tuple[Any, HeldOut]:
    """A model with large random weights in float64, and the measure."""
    if kind == "bert":
        model, windows, arch = tiny.bert(), bert_windows(), "bert"
        collator: Any = MaskedLMCollator(tiny.wordpiece_tokenizer(), 0.15, seed=1)
    else:
        model, windows, arch = tiny.gpt(), gpt_windows(), "gpt"
        collator = CausalCollator(reset_at_documents=kind == "gpt with documents apart")
    return model, HeldOut(windows, collator=collator, arch=arch, batch_size=batch_size, targets_per_byte=0.5)


@pytest.mark.parametrize("kind", ["gpt", "gpt with documents apart", "bert"])
def test_the_batch_does_not_change_the_loss(kind: str) -> None:
    results = []
    for batch_size in (1, 2, 3, 100):
        model, measure = held_out(kind, batch_size)
        results.append(measure.measure(model, FP32))
    for result in results[1:]:
        assert result == {name: pytest.approx(value, rel=1e-12) for name, value in results[0].items()}


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_the_loss_is_the_mean_over_all_targets(kind: str) -> None:
    model, measure = held_out(kind, 2)
    nats = right = num_targets = 0.0
    for row in range(len(measure._windows)):
        batch = measure._collator([measure._windows[row]])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits[0]
        labels = batch["labels"][0]
        if kind == "gpt":
            logits, labels = logits[:-1], labels[1:]
        nats += cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        num_targets += (labels != -100).sum().item()
        right += (logits.argmax(-1) == labels).sum().item()
    measured = measure.measure(model, FP32)
    assert measured["val_loss"] == pytest.approx(nats / num_targets, rel=1e-12)
    assert measured["val_ppl"] == pytest.approx(math.exp(nats / num_targets), rel=1e-12)
    if kind == "gpt":
        assert measured["val_nats_per_byte"] == pytest.approx(nats / num_targets * 0.5, rel=1e-12)
        assert "val_accuracy" not in measured
    else:
        assert measured["val_accuracy"] == pytest.approx(right / num_targets)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode_and_drops_nothing_out(training: bool) -> None:
    model, measure = held_out("gpt", 2)
    expected = measure.measure(model, FP32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train(training)
    assert measure.measure(model, FP32) == expected
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_absurd_loss_has_a_perplexity_all_the_same() -> None:
    model, measure = held_out("gpt", 2)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    measured = measure.measure(model, FP32)
    assert measured["val_loss"] > 1000
    assert math.isfinite(measured["val_ppl"])


@pytest.mark.parametrize(
    ("batch", "arch", "count"),
    [
        ({"labels": [[5, 6, 7], [5, -100, 7]]}, "gpt", 3),  # the first of a row is nobody's target
        ({"labels": [[5, 6, 7], [5, -100, 7]]}, "bert", 5),
        ({"labels": [[5, 6, 7, 8]], "shift_labels": [[6, 7, 8, -100]]}, "gpt", 3),
        ({"labels": [[-100, -100]]}, "bert", 0),
    ],
)
def test_targets_are_counted_as_the_losses_do(batch: dict[str, list], arch: str, count: int) -> None:
    assert count_targets({name: torch.tensor(value) for name, value in batch.items()}, arch) == count


def test_the_figures_are_those_of_evaluate_perplexity(tmp_path: Path) -> None:
    """On one document in one window both read the same tokens in the same context."""
    (tmp_path / "train.txt").write_text("\n".join(tiny.TEXTS[:2] * 8))
    (tmp_path / "held_out.txt").write_text(tiny.TEXTS[0])
    recipe = tiny_recipe(
        "gpt",
        tmp_path / "train.txt",
        data__validation=str(tmp_path / "held_out.txt"),
        data__sequence_length=80,
        training__max_steps=2,
    )
    result = pretrain(recipe, output_dir=tmp_path / "run")
    model, tokenizer = load_model_and_tokenizer(str(result.model_dir), "causal-lm")
    score = evaluate_perplexity(model, tokenizer, [tiny.TEXTS[0]], context=80)
    assert score.num_tokens < 79
    assert result.metrics["val_loss"] == pytest.approx(score.nats_per_token, rel=1e-6)
    assert result.metrics["val_ppl"] == pytest.approx(score.perplexity, rel=1e-6)
    assert result.metrics["val_nats_per_byte"] == pytest.approx(score.nats_per_byte, rel=1e-6)


def test_the_last_figures_are_those_of_the_saved_model(finished: Run) -> None:
    text = prepare_text(finished.recipe, finished.directory)
    kind = CottentionGPTForCausalLM if finished.recipe.arch == "gpt" else CottentionBertForMaskedLM
    model: Any = kind.from_pretrained(finished.result.model_dir)
    model.fused_loss = finished.recipe.arch == "gpt"  # as in training; the plain loss rounds otherwise
    last = metrics_of(finished.directory)[-1]
    measured = text.held_out.measure(model, FP32)
    assert measured == {name: last[name] for name in measured}
