"""PEFT on our models, stock GPT-J and BERT beside: every adapter counts in every loss, prompts pass, defaults fit."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, GPTJConfig, GPTJForCausalLM

from cottention.models import (
    CottentionBertForSequenceClassification,
    CottentionBertModel,
    CottentionGPTForCausalLM,
)
from tests.models.helpers import ATTENTION_TYPES, bert_config, gpt_config, randomised, some_tokens

peft: Any = import_module("peft")  # not in the environment that types are checked in
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("always")]

TOKENS = some_tokens(2, 11)
MASK = torch.tensor([[1] * 11, [1] * 7 + [0] * 4])


def randomise_adapters(model: Any) -> None:
    """Adapters begin as zero, where a mistake does not show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["lm_head"], "lora_dropout": 0.1},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"target_modules": "all-linear"},
    ],
)
def test_an_adapter_on_the_head_counts_under_the_fused_loss(settings: dict[str, Any], attention_type: str) -> None:
    plain = randomised(CottentionGPTForCausalLM(gpt_config(attention_type)), torch.float32)
    model: Any = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    randomise_adapters(model)
    found: dict[bool, tuple[Tensor, dict[str, Tensor]]] = {}
    for fused in (False, True):
        plain.fused_loss = fused
        model.zero_grad()
        model.eval()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        found[fused] = loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-6)
    assert set(found[True][1]) == {name for name, p in model.named_parameters() if p.requires_grad}
    plain.fused_loss = False
    merged = copy.deepcopy(model).merge_and_unload() if "modules_to_save" not in settings else model
    torch.testing.assert_close(merged(input_ids=TOKENS, labels=TOKENS).loss, found[True][0])


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_lora_on_token_types_counts_without_token_types(attention_type: str) -> None:
    config = peft.LoraConfig(target_modules=["token_type_embeddings", "query"], r=4)
    model = peft.get_peft_model(randomised(CottentionBertModel(bert_config(attention_type)), torch.float32), config)
    randomise_adapters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding_B" in name:
                parameter.normal_()
    without = model(input_ids=TOKENS).last_hidden_state
    torch.testing.assert_close(without, model(input_ids=TOKENS, token_type_ids=TOKENS * 0).last_hidden_state)


def stock_and_ours(kind: str) -> list[Any]:
    sizes: dict[str, Any] = {"vocab_size": 61}
    if kind == "gpt":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 8}
        softmax = randomised(CottentionGPTForCausalLM(gpt_config("softmax", pad_token_id=0)), torch.float32)
        stock: Any = GPTJForCausalLM(GPTJConfig(**sizes, pad_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
        cosine = randomised(CottentionGPTForCausalLM(gpt_config(pad_token_id=0)), torch.float32)
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        sizes |= {"max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        softmax = randomised(CottentionBertForSequenceClassification(bert_config("softmax")), torch.float32)
        stock = BertForSequenceClassification(BertConfig(**sizes))
        cosine = randomised(CottentionBertForSequenceClassification(bert_config()), torch.float32)
    stock.load_state_dict(softmax.state_dict())
    return [stock.eval(), softmax, cosine]


@pytest.mark.parametrize("method", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_prompts_are_learned_as_by_stock_models(kind: str, method: Any) -> None:
    # Nothing is promised of what padding predicts.
    targets = TOKENS.masked_fill(MASK == 0, -100)
    task, labels = ("CAUSAL_LM", targets) if kind == "gpt" else ("SEQ_CLS", torch.tensor([1, 0]))
    losses, gradients = [], []
    for base in stock_and_ours(kind):
        torch.manual_seed(3)
        config = method(task_type=task, num_virtual_tokens=4, token_dim=32, num_layers=2, num_attention_heads=2)
        model: Any = peft.get_peft_model(base, config).eval()
        prompts = [parameter for name, parameter in model.named_parameters() if "prompt_encoder" in name]
        loss = model(input_ids=TOKENS, attention_mask=MASK, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in prompts if p.grad is not None]))
        if kind == "gpt":
            written = model.generate(input_ids=TOKENS[:1], attention_mask=MASK[:1], max_new_tokens=4, do_sample=False)
            assert written.shape == (1, 15)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    assert losses[2].isfinite()
    assert gradients[2].abs().max() > 0


@pytest.mark.parametrize("kind", ["gpt", "bert"])
@pytest.mark.parametrize(
    "config", [peft.LoraConfig(), peft.IA3Config(), peft.VeraConfig(), peft.AdaLoraConfig(total_step=9)]
)
def test_default_modules_are_those_of_stock_models(kind: str, config: Any) -> None:
    stock, softmax, cosine = stock_and_ours(kind)
    adapted = [
        {
            name
            for name, parameter in peft.get_peft_model(base, copy.deepcopy(config)).named_parameters()
            if parameter.requires_grad
        }
        for base in (stock, softmax, cosine)
    ]
    assert adapted[0]
    assert adapted[0] == adapted[1] == adapted[2]
