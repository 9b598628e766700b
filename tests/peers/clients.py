"""Models for the clients' tests, ours and stock ones: a client has to do with ours what it does with those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPTJConfig, GPTJForCausalLM, GPTJForSequenceClassification

from cottention.models import (
    CottentionGPTConfig,
    CottentionGPTForCausalLM,
    CottentionGPTForSequenceClassification,
)
from tests import tiny

GPTS = ("cosine", "softmax", "stock")


def gpt(kind: str, *, classifies: bool = False, **settings: Any) -> Any:
    """A GPT for `tiny.bpe_tokenizer`, in float32: `cosine`, `softmax`, or GPT-J of the same size."""
    sizes: Any = {"vocab_size": len(tiny.bpe_tokenizer()), "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}
    sizes |= {"n_positions": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **settings}
    torch.manual_seed(0)
    if kind == "stock":
        return (GPTJForSequenceClassification if classifies else GPTJForCausalLM)(GPTJConfig(**sizes))
    config = CottentionGPTConfig(attention_type=kind, **sizes)
    return (CottentionGPTForSequenceClassification if classifies else CottentionGPTForCausalLM)(config)


def tokenizer() -> Any:
    """The tokenizer of `gpt`, padding with end-of-text, as who trains a GPT does."""
    made = tiny.bpe_tokenizer()
    made.pad_token = made.eos_token
    return made


def saved(directory: Path, model: Any, its_tokenizer: Any) -> Path:
    """A model directory."""
    return tiny.save(directory, model, its_tokenizer)
