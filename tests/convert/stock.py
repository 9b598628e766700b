"""Stock softmax checkpoints as transformers writes them: tiny, with weights large enough that a mistake shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel, GPTJConfig, GPTJForCausalLM

from tests import tiny
from tests.models.helpers import gradients, randomised, some_tokens

CLASSES: dict[str, Any] = {
    "BertForPreTraining": BertForPreTraining,
    "BertForMaskedLM": BertForMaskedLM,
    "BertModel": BertModel,
    "GPTJForCausalLM": GPTJForCausalLM,
}
BERTS = ("BertForPreTraining", "BertForMaskedLM", "BertModel")


def stock_model(name: str, **settings: Any) -> Any:
    """A stock model for tiny's tokenizers, without dropout."""
    if name.startswith("Bert"):
        sizes = {
            "vocab_size": len(tiny.wordpiece_tokenizer()),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "attn_implementation": "eager",
        }
        return CLASSES[name](BertConfig(**{**sizes, **settings})).eval()
    sizes = {"vocab_size": len(tiny.bpe_tokenizer()), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    tokens = {"rotary_dim": 8, "bos_token_id": 0, "eos_token_id": 0}
    return GPTJForCausalLM(GPTJConfig(**{**sizes, **tokens, **settings})).eval()


def save_stock(directory: Path, model: Any, tokenizer: Any = None) -> Path:
    """Write it as transformers does, with a tokenizer that fits."""
    model.save_pretrained(directory)
    bert = model.config.model_type == "bert"
    (tokenizer or (tiny.wordpiece_tokenizer() if bert else tiny.bpe_tokenizer())).save_pretrained(directory)
    return directory


def stock_checkpoint(directory: Path, name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A saved stock model with random weights."""
    return save_stock(directory, randomised(stock_model(name, **settings), dtype))


def batch_for(name: str) -> dict[str, torch.Tensor]:
    """Padded on the right, with labels where the class takes them."""
    mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4])
    batch = {"input_ids": some_tokens(2, 11, 60), "attention_mask": mask}
    if name != "BertModel":
        batch["labels"] = some_tokens(2, 11, 60, seed=1).masked_fill(mask == 0, -100)
    if name == "BertForPreTraining":
        batch["next_sentence_label"] = torch.tensor([0, 1])
    return batch


def assert_same_function(ours: Any, stock: Any, batch: dict[str, Tensor]) -> None:
    """Every output of the stock model and every gradient of its loss are ours too, at the real tokens, to 1e-5."""
    real = batch["attention_mask"].bool()
    got, expected = _outputs_of(ours, batch), _outputs_of(stock, batch)
    assert len(expected) >= 4
    for key, value in expected.items():
        # Padded positions mean nothing in either.
        pair = (got[key][real], value[real]) if value.shape[:2] == real.shape else (got[key], value)
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)
    for out in (got, expected):
        (out["loss"] if "loss" in out else (out["hidden_2"] * real[..., None]).square().mean()).backward()
    ours_gradients, stock_gradients = gradients(ours), gradients(stock)
    assert set(ours_gradients) == set(stock_gradients)
    for key, gradient in stock_gradients.items():
        # Softmax does not see a key's bias, so that gradient is rounding noise: hence the floor.
        assert (ours_gradients[key] - gradient).norm() <= 1e-4 * gradient.norm().clamp(min=1e-2), key


def _outputs_of(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every output that is a tensor, hidden states by number, whatever its class calls them."""
    out = model(**batch, output_hidden_states=True)
    hidden_states = {f"hidden_{i}": x for i, x in enumerate(out.hidden_states)}
    return {**{key: value for key, value in out.items() if isinstance(value, Tensor)}, **hidden_states}
