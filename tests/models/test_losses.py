"""Losses: scaled right under gradient accumulation, blind to what has no label, and never broadcast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPTJConfig, GPTJForCausalLM, Trainer, TrainingArguments

from cottention.models import (
    CottentionBertForMaskedLM,
    CottentionBertForPreTraining,
    CottentionBertForSequenceClassification,
    CottentionBertForTokenClassification,
    CottentionGPTForCausalLM,
    CottentionGPTForSequenceClassification,
)
from cottention.models.losses import causal_lm_loss, classification_loss, cross_entropy
from tests.models.helpers import ATTENTION_TYPES, bert_config, gpt_config, gradients, randomised, some_tokens

TOKENS = some_tokens(8, 10)
# Rows with very different numbers of targets: a mean of means would be far off.
SPARSE = TOKENS.masked_fill(torch.arange(10) >= torch.tensor([10, 9, 3, 2, 10, 4, 2, 3])[:, None], -100)


def task(name: str, attention_type: str = "cosine") -> tuple[Any, dict[str, Tensor]]:
    """A model and one batch of its labels."""
    gpt, bert = gpt_config(attention_type, num_labels=3), bert_config(attention_type, num_labels=3)
    flags = (torch.arange(24).reshape(8, 3) % 2).double()
    cases: dict[str, tuple[Any, Any, dict[str, Tensor]]] = {
        "causal_lm": (CottentionGPTForCausalLM, gpt, {"labels": SPARSE}),
        "masked_lm": (CottentionBertForMaskedLM, bert, {"labels": SPARSE}),
        "token": (CottentionBertForTokenClassification, bert, {"labels": torch.where(SPARSE < 0, -100, SPARSE % 3)}),
        "single_label": (CottentionBertForSequenceClassification, bert, {"labels": torch.arange(8) % 3}),
        "multi_label": (CottentionBertForSequenceClassification, bert, {"labels": flags}),
        "gpt_single_label": (CottentionGPTForSequenceClassification, gpt, {"labels": torch.arange(8) % 3}),
        "regression": (
            CottentionBertForSequenceClassification,
            bert_config(attention_type, num_labels=1),
            {"labels": torch.linspace(-1, 1, 8).double()},
        ),
        "pretraining": (
            CottentionBertForPreTraining,
            bert,
            {"labels": SPARSE, "next_sentence_label": torch.arange(8) % 2},
        ),
    }
    kind, config, labels = cases[name]
    return randomised(kind(config)), labels


NAMES = [
    "causal_lm",
    "masked_lm",
    "token",
    "single_label",
    "multi_label",
    "gpt_single_label",
    "regression",
    "pretraining",
]


@pytest.mark.parametrize("name", NAMES)
def test_four_micro_batches_add_up_to_one_batch(name: str) -> None:
    model, labels = task(name)
    whole = model(TOKENS, **labels).loss
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    targets = labels["labels"][:, 1:] if name == "causal_lm" else labels["labels"]
    settings = {"num_items_in_batch": (targets != -100).sum()}
    if name == "pretraining":
        settings["num_sequences_in_batch"] = torch.tensor(8)
    total = torch.zeros(())
    for part in range(0, 8, 2):
        rows = slice(part, part + 2)
        loss = model(TOKENS[rows], **{key: value[rows] for key, value in labels.items()}, **settings).loss
        loss.backward()
        total = total + loss.detach()
    torch.testing.assert_close(total, whole.detach())
    got = gradients(model)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], msg=lambda text, key=key: f"{key}: {text}")


def test_pretraining_without_a_row_count_keeps_the_scale_of_the_sentence_loss() -> None:
    model, labels = task("pretraining")
    num_items = (SPARSE != -100).sum()
    share = 0.0
    for part in range(0, 8, 2):
        rows = slice(part, part + 2)
        micro = {key: value[rows] for key, value in labels.items()}
        alone = model(TOKENS[rows], **micro).nsp_loss
        share += (model(TOKENS[rows], **micro, num_items_in_batch=num_items).nsp_loss / alone).item()
    assert share == pytest.approx(1)


class Rows(Dataset):
    """The batch above as a data set."""

    def __init__(self, labels: dict[str, Tensor]) -> None:
        self.columns = {"input_ids": TOKENS, **labels}

    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[i] for key, value in self.columns.items()}


def trained(name: str, folder: Path, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Two optimiser steps over the same 8 rows, `steps` micro-batches each; losses and final weights."""
    model, labels = task(name)
    model.train()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=8 // steps,
        gradient_accumulation_steps=steps,
        learning_rate=1e-3,
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(labels))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {key: value.detach() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["causal_lm", "masked_lm", "single_label"])
@pytest.mark.slow
def test_the_trainer_gets_the_same_losses_and_weights_with_accumulation(name: str, tmp_path: Path) -> None:
    losses, weights = trained(name, tmp_path / "1", 1)
    losses_4, weights_4 = trained(name, tmp_path / "4", 4)
    assert len(losses) == 2
    assert losses_4 == pytest.approx(losses, rel=1e-3)  # the Trainer logs four digits
    for key in weights:
        torch.testing.assert_close(weights_4[key], weights[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "is_shifted"), [("causal_lm", True), ("masked_lm", False), ("single_label", False), ("stock", True)]
)
def test_the_trainer_smooths_the_labels_that_the_loss_has(name: str, is_shifted: bool, tmp_path: Path) -> None:
    """It finds the loss by itself from the logits, and shifts the labels of classes that it knows by name alone."""
    if name == "stock":
        model: Any = GPTJForCausalLM(GPTJConfig(vocab_size=61, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)).eval()
        labels = {"labels": SPARSE}
    else:
        model, labels = task(name)
    arguments = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=0.3, use_cpu=True)
    rows = {"input_ids": TOKENS, **labels}
    with torch.no_grad():
        found = Trainer(model, arguments).compute_loss(model, dict(rows))
        logits = model(input_ids=TOKENS).logits
    logits, targets = (logits[:, :-1], labels["labels"][:, 1:]) if is_shifted else (logits, labels["labels"])
    expected = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=0.3)
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-5, atol=0)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_labels_are_shifted_unless_they_already_are(attention_type: str) -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config(attention_type)))
    logits = model(TOKENS).logits
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    torch.testing.assert_close(model(TOKENS, labels=TOKENS).loss, by_hand)
    shifted = torch.cat([TOKENS[:, 1:], torch.full((8, 1), -100)], dim=1)
    torch.testing.assert_close(model(TOKENS, shift_labels=shifted).loss, by_hand)
    torch.testing.assert_close(model(TOKENS, labels=TOKENS, shift_labels=shifted).loss, by_hand)


def test_no_target_crosses_into_the_next_packed_text() -> None:
    logits, labels = torch.randn(1, 6, 11), torch.randint(11, (1, 6))
    cu_seqlens = torch.tensor([0, 0, 2, 6])
    parts = [causal_lm_loss(logits[:, a:b], labels[:, a:b]) * (b - a - 1) for a, b in ((0, 2), (2, 6))]
    torch.testing.assert_close(causal_lm_loss(logits, labels, cu_seqlens=cu_seqlens), sum(parts) / 4)


def test_no_label_at_all_costs_nothing() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_regression_does_not_broadcast(shape: tuple[int, ...]) -> None:
    logits, labels = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert classification_loss(logits, labels.reshape(shape), None) == 0
    assert classification_loss(logits, labels.reshape(shape).long(), "regression") == 0


def test_labels_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must have shape \[4, 1\] for regression; got \[3\]"):
        classification_loss(torch.zeros(4, 1), torch.zeros(3), None)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = (torch.randn(3000, 50) * 4).bfloat16()
    labels = torch.randint(50, (3000,))
    loss = cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.float(), labels))


def test_each_pretraining_loss_can_be_had_alone() -> None:
    model, labels = task("pretraining")
    both = model(TOKENS, **labels)
    assert model(TOKENS).loss is None
    only_tokens = model(TOKENS, labels=labels["labels"])
    only_sentences = model(TOKENS, next_sentence_label=labels["next_sentence_label"])
    assert only_tokens.nsp_loss is None
    assert only_sentences.mlm_loss is None
    torch.testing.assert_close(only_tokens.loss + only_sentences.loss, both.loss)
    torch.testing.assert_close(both.mlm_loss, only_tokens.loss)
    torch.testing.assert_close(both.nsp_loss, only_sentences.loss)


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelled_argument_is_refused_with_a_suggestion(name: str) -> None:
    model, _ = task(name)
    with pytest.raises(
        TypeError, match="unexpected keyword argument 'num_item_in_batch'; did you mean 'num_items_in_batch'"
    ):
        model(TOKENS, num_item_in_batch=3)
