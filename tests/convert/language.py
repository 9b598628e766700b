"""A language small enough to be learnt in seconds, and text of it: a word can be guessed from its context alone.

A sentence repeats one random word: `ka ka ka ka .`; what stands beside a hidden word tells it, which a model without
attention cannot know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from cottention.data import load_corpus, pack_mlm_windows, pack_windows, tokenize_documents, train_tokenizer
from cottention.data.collators import CausalCollator, MaskedLMCollator
from tests.convert.stock import save_stock, stock_model

WORDS = [consonant + vowel for consonant in "bdgklmnprst" for vowel in "aeiou"]
WINDOW = 16


def write_text(path: Path, num_sentences: int, seed: int = 0) -> Path:
    """One document of so many sentences."""
    drawn = np.random.default_rng(seed).integers(0, len(WORDS), num_sentences)
    path.write_text(" ".join(f"{WORDS[word]} " * 4 + "." for word in drawn))
    return path


def tokenizer_for(kind: str) -> Any:
    """Every word is one token."""
    corpus = Dataset.from_dict({"text": [" ".join([*WORDS, "."] * 20)]})
    return train_tokenizer(corpus, kind=kind, vocab_size=140 if kind == "wordpiece" else 420)


def trained_checkpoint(directory: Path, name: str, text: Path, *, steps: int) -> Path:
    """A stock model that has learnt the language, saved with its tokenizer."""
    bert = name.startswith("Bert")
    tokenizer = tokenizer_for("wordpiece" if bert else "bpe")
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer)}
    sizes |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4} if bert else {"n_embd": 64}
    torch.manual_seed(0)
    model = stock_model(name, **sizes).train()
    tokens = tokenize_documents(load_corpus(text), tokenizer)
    if bert:
        special = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("cls", "sep", "pad")}
        windows, collator = pack_mlm_windows(tokens, WINDOW, **special), MaskedLMCollator(tokenizer)
    else:
        windows, collator = pack_windows(tokens, WINDOW, tokenizer.eos_token_id), CausalCollator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    order = np.random.default_rng(1)
    for step in range(steps):
        if isinstance(collator, MaskedLMCollator):
            collator.set_epoch(step)
        rows = [windows[int(row)] for row in order.integers(0, len(windows), 32)]
        optimizer.zero_grad()
        model(**collator(rows)).loss.backward()
        optimizer.step()
        schedule.step()
    return save_stock(directory, model.eval(), tokenizer)
