"""transformers' common tests on our GPT, and on stock GPT-J, which has to pass them all."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
)

from cottention import models
from tests.peers.common_tests import DIFFERENCES, common_tests

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("always")]

_CLASSES = [
    getattr(models, name) for name in models.__all__ if name.startswith("CottentionGPT") and "Config" not in name
]
_SIZES: Any = {
    "vocab_size": 99,
    "n_positions": 512,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 37,
    "rotary_dim": 4,
    "bos_token_id": 98,
    "eos_token_id": 98,
    "pad_token_id": 98,
}

TestCosineGPT = common_tests(
    "TestCosineGPT",
    models.CottentionGPTConfig(attention_type="cosine", **_SIZES),
    _CLASSES,
    trained=models.CottentionGPTForCausalLM,
    differences=DIFFERENCES,
)
TestSoftmaxGPT = common_tests(
    "TestSoftmaxGPT",
    models.CottentionGPTConfig(attention_type="softmax", **_SIZES),
    _CLASSES,
    trained=models.CottentionGPTForCausalLM,
    differences=DIFFERENCES
    | {
        "test_bc_cache_name_forward": "past_key_values brings no warning: versions before 5.24 know no other name",
    },
)
TestStockGPTJ = common_tests(
    "TestStockGPTJ",
    GPTJConfig(**_SIZES),
    [GPTJModel, GPTJForCausalLM, GPTJForSequenceClassification, GPTJForQuestionAnswering],
    trained=GPTJForCausalLM,
)
