"""Distillation: the cosine model comes near its source on text that it was not taught on; the report says the truth.

The models have learnt a toy language in seconds (see language.py), so that a loss means something.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cottention.convert import ConversionReport, DistillationSettings, convert_softmax
from cottention.data import load_corpus
from cottention.errors import CottentionError
from cottention.evaluation import evaluate_masked_lm, evaluate_perplexity
from cottention.generation.loading import load_model_and_tokenizer
from tests.convert.language import WINDOW, tokenizer_for, trained_checkpoint, write_text
from tests.convert.stock import save_stock, stock_checkpoint, stock_model

NAMES = ("BertForMaskedLM", "GPTJForCausalLM")
STEPS = {"BertForMaskedLM": 200, "GPTJForCausalLM": 120}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", 3000)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "held_out.txt", 300, seed=1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """Each architecture's stock model after some seconds of training."""
    folder = tmp_path_factory.mktemp("stock")
    return {name: trained_checkpoint(folder / name, name, text, steps=STEPS[name]) for name in NAMES}


def settings_for(text: Path, **changes: Any) -> DistillationSettings:
    return DistillationSettings(**{"text": (str(text),), "steps": 40, "window": WINDOW, "batch_size": 32, **changes})


def convert(source: Path, new: Path, text: Path, **changes: Any) -> ConversionReport:
    return convert_softmax(source, new, distillation=settings_for(text, **changes), device="cpu")


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_teaching_each_layer_closes_most_of_the_gap(
    sources: dict[str, Path], text: Path, held_out: Path, tmp_path: Path, name: str
) -> None:
    taught: Any = convert(sources[name], tmp_path / "new", text, held_out=(str(held_out),)).distillation
    source, before, after = taught.source, taught.before, taught.after
    gap, left = before.loss - source.loss, after.loss - source.loss
    assert gap > 0.4
    assert left < 0.5 * gap
    assert len(after.attention_errors) == 2
    pairs = zip(after.attention_errors, before.attention_errors, strict=True)
    assert all(error < 0.3 * earlier for error, earlier in pairs)
    assert after.hidden_error < 0.5 * before.hidden_error
    assert before.similarity < after.similarity <= 1

    # What is reported is what anyone measures on the directory that was written.
    kind: Any = "masked-lm" if name.startswith("Bert") else "causal-lm"
    model, tokenizer = load_model_and_tokenizer(tmp_path / "new", kind, device="cpu")
    corpus = load_corpus(held_out)
    if kind == "masked-lm":
        measured = evaluate_masked_lm(model, tokenizer, corpus, window=WINDOW)
        assert measured.accuracy == after.accuracy
    else:
        measured = evaluate_perplexity(model, tokenizer, corpus, context=WINDOW)
        assert measured.perplexity == pytest.approx(after.perplexity, rel=1e-6)
    assert measured.nats_per_token == pytest.approx(after.loss, rel=1e-6)


def test_teaching_the_whole_closes_more_of_it(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    losses = []
    for steps in (0, 40):
        report = convert(sources["GPTJForCausalLM"], tmp_path / f"new-{steps}", text, end_to_end_steps=steps)
        assert report.distillation is not None
        assert report.distillation.after is not None
        losses.append(report.distillation.after.loss)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_each_phase_trains_what_it_says_and_nothing_else(
    sources: dict[str, Path], text: Path, tmp_path: Path, name: str
) -> None:
    convert_softmax(sources[name], tmp_path / "copied")
    copied = weights_of(tmp_path / "copied")
    for folder, steps in (("layers", {"steps": 2}), ("whole", {"steps": 0, "end_to_end_steps": 2})):
        report = convert(sources[name], tmp_path / folder, text, **steps)
        taught = weights_of(tmp_path / folder)
        changed = {key for key, value in taught.items() if not torch.equal(value, copied[key])}
        inside = (".layer.", ".h.") if folder == "whole" else (".attention.self.", ".attention.output.dense.", ".attn.")
        assert changed == {key for key in copied if any(part in key for part in inside)}
        assert report.distillation is not None
        assert report.distillation.num_trained == sum(copied[key].numel() for key in changed)
        assert all(torch.isfinite(value).all() for value in taught.values())


def test_the_same_seed_gives_the_same_model(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    models = []
    for folder, seed in (("one", 0), ("two", 0), ("three", 1)):
        convert(sources["BertForMaskedLM"], tmp_path / folder, text, steps=2, seed=seed)
        models.append(weights_of(tmp_path / folder))
    key = "bert.encoder.layer.1.attention.self.query.weight"
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0][key], models[2][key])


def test_no_updates_are_scores_alone(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    convert_softmax(sources["BertForMaskedLM"], tmp_path / "copied")
    report = convert(sources["BertForMaskedLM"], tmp_path / "scored", text, steps=0)
    assert report.distillation is not None
    assert report.distillation.after is None
    assert report.distillation.num_trained == 0
    copied, scored = weights_of(tmp_path / "copied"), weights_of(tmp_path / "scored")
    assert all(torch.equal(copied[name], scored[name]) for name in copied)
    assert any("distil or train" in note for note in report.notes)
    assert report.summary().splitlines()[-1].split()[-1] != "-"


def test_a_model_without_a_trained_head_has_no_loss(text: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_for("wordpiece")
    source = save_stock(tmp_path / "stock", stock_model("BertModel", vocab_size=len(tokenizer)), tokenizer)
    report = convert(source, tmp_path / "new", text, steps=3, end_to_end_steps=3)
    assert report.distillation is not None
    for scores in (report.distillation.source, report.distillation.before, report.distillation.after):
        assert scores is not None
        assert scores.loss is None
        assert scores.accuracy is None
    assert "loss" not in report.summary()
    assert any("masked-token head" in note for note in report.notes)


def test_half_precision_is_taught_in_float32_and_stored_as_it_was(text: Path, tmp_path: Path) -> None:
    source = stock_checkpoint(tmp_path / "stock", "GPTJForCausalLM", torch.bfloat16)
    convert_softmax(source, tmp_path / "copied")
    convert(source, tmp_path / "new", text, steps=3)
    copied, taught = weights_of(tmp_path / "copied"), weights_of(tmp_path / "new")
    assert {key: value.dtype for key, value in taught.items()} == {key: value.dtype for key, value in copied.items()}
    assert all(torch.equal(taught[key], copied[key]) for key in copied if ".attn." not in key)
    assert not torch.equal(taught["transformer.h.0.attn.q_proj.weight"], copied["transformer.h.0.attn.q_proj.weight"])


def test_a_rate_that_is_far_too_high_is_named_and_leaves_nothing(
    sources: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(CottentionError, match=r"must be finite; got .* at update \d+ of 40 .*take a lower rate"):
        convert(sources["GPTJForCausalLM"], tmp_path / "new", text, learning_rate=1e30)
    assert list(tmp_path.iterdir()) == []
