"""Models, tokenizers and texts that cost milliseconds, for everything that works on a saved model.

Weights are random but large, so that no two tokens are about equally likely and a mistake anywhere shows.

    model, tokenizer = tiny.gpt("softmax"), tiny.bpe_tokenizer()
    tiny.save(tmp_path, model, tokenizer)
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from cottention.data import train_tokenizer
from cottention.models import CottentionBertForMaskedLM, CottentionGPTForCausalLM
from tests.models.helpers import bert_config, gpt_config, randomised

TEXTS = [
    "The people of the United States, in order to form a more perfect Union.",
    "A naïve café in 東京 serves crème brûlée 🙂 to the people.\nAnd tea.",
    "Order!",
]
"""With characters of one to four bytes, which a small vocabulary has to spell byte by byte."""


@cache
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 290 tokens; end-of-text is 0."""
    return train_tokenizer(Dataset.from_dict({"text": TEXTS}), kind="bpe", vocab_size=290)


@cache
def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece of 60 tokens, of which 0 to 4 are BERT's special ones."""
    return train_tokenizer(Dataset.from_dict({"text": [TEXTS[0]] * 3}), kind="wordpiece", vocab_size=60)


def gpt(attention_type: str = "cosine", dtype: torch.dtype = torch.float64, std: float = 0.3, **settings: Any) -> Any:
    """A GPT for `bpe_tokenizer`; weights of a smaller `std` are less sure of the next token."""
    settings = {"vocab_size": len(bpe_tokenizer()), "eos_token_id": 0, "bos_token_id": 0, **settings}
    return randomised(CottentionGPTForCausalLM(gpt_config(attention_type, **settings)), dtype, std)


def bert(attention_type: str = "cosine", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A BERT for `wordpiece_tokenizer`."""
    settings = {"vocab_size": len(wordpiece_tokenizer()), **settings}
    return randomised(CottentionBertForMaskedLM(bert_config(attention_type, **settings)), dtype)


def save(directory: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Write a model directory as training does."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
