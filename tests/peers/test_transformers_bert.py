"""transformers' common tests on our BERT, and on stock BERT, which has to pass them all."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers import BertConfig, BertForMaskedLM

from cottention import models
from tests.peers.common_tests import DIFFERENCES, common_tests

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("always")]

_NAMES = [name for name in models.__all__ if name.startswith("CottentionBert") and "Config" not in name]
_CLASSES = [getattr(models, name) for name in _NAMES]
_SIZES: Any = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "type_vocab_size": 16,
}

TestCosineBert = common_tests(
    "TestCosineBert",
    models.CottentionBertConfig(attention_type="cosine", **_SIZES),
    _CLASSES,
    trained=models.CottentionBertForMaskedLM,
    differences=DIFFERENCES,
)
TestSoftmaxBert = common_tests(
    "TestSoftmaxBert",
    models.CottentionBertConfig(attention_type="softmax", **_SIZES),
    _CLASSES,
    trained=models.CottentionBertForMaskedLM,
    differences=DIFFERENCES,
)
TestStockBert = common_tests(
    "TestStockBert",
    BertConfig(**_SIZES),
    [getattr(transformers, name.removeprefix("Cottention")) for name in _NAMES],
    trained=BertForMaskedLM,
)
