"""What `test_sequence.py` runs on every rank: a model over slices against the same model over whole texts."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cottention.distributed import shard_sequence, slice_batch, sum_gradients
from cottention.models import (
    CottentionBertConfig,
    CottentionBertForMaskedLM,
    CottentionBertForPreTraining,
    CottentionGPTConfig,
    CottentionGPTForCausalLM,
)

VOCAB = 23
_GPT: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 8, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 64}
_BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
_WINDOWS: dict[str, Any] = {"layer_types": ["sliding_attention", "linear_attention"], "sliding_window": 3}
_BLOCK: dict[str, Any] = {"short_conv": 4, "decay": "data", "output_norm": True, "output_gate": "silu"}
MODELS = {
    "gpt": lambda: CottentionGPTForCausalLM(CottentionGPTConfig(**_GPT)),
    "gpt_plus": lambda: CottentionGPTForCausalLM(CottentionGPTConfig(**_GPT, **_BLOCK, erase=True, divisor="query")),
    "gpt_hybrid": lambda: CottentionGPTForCausalLM(CottentionGPTConfig(**_GPT, **_HYBRID)),
    "gpt_windows": lambda: CottentionGPTForCausalLM(CottentionGPTConfig(**_GPT, **_WINDOWS)),
    "bert": lambda: CottentionBertForPreTraining(CottentionBertConfig(**_BERT)),
    "bert_plus": lambda: CottentionBertForMaskedLM(
        CottentionBertConfig(**_BERT, **_BLOCK, norm_first=True, position_embedding_type="rotary")
    ),
    "bert_hybrid": lambda: CottentionBertForMaskedLM(CottentionBertConfig(**_BERT, **_HYBRID)),
}


def model_of(name: str, dtype: torch.dtype) -> nn.Module:
    """The model, the same on every rank, with weights that are not at their start."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.train()


def batch_of(name: str, kind: str, seed: int) -> dict[str, Any]:
    """A whole batch: plain, padded (left, right, a hole) or packed."""
    generator = torch.Generator().manual_seed(seed)
    B, T = (1 if kind == "packed" else 2), 19
    ids = torch.randint(1, VOCAB, (B, T), generator=generator)
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    if name.startswith("bert"):
        batch["labels"][torch.rand(B, T, generator=generator) < 0.7] = -100
    if name == "bert" and kind != "packed":
        batch["next_sentence_label"] = torch.tensor([0, 1])
    if kind == "padded":
        mask = torch.ones(B, T, dtype=torch.long)
        mask[0, :6], mask[1, 11:] = 0, 0
        mask[0, 12] = 0
        batch["attention_mask"] = mask
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    if kind == "packed":
        batch["cu_seqlens"] = torch.tensor([0, 2, 11, 12, 19], dtype=torch.int32)
    return batch


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def check_loss_and_gradients(group: dist.ProcessGroup, names: list[str], dtype: torch.dtype, tolerance: float) -> None:
    for name in names:
        whole = model_of(name, dtype)
        shared = shard_sequence(copy.deepcopy(whole), group)
        for kind in ("plain", "padded", "packed"):
            if name == "bert" and kind == "packed":
                continue  # its pooler asks for a row per text
            batch = batch_of(name, kind, seed=1)
            for model in (whole, shared):
                model.zero_grad()
            loss = whole(**batch).loss
            loss.backward()
            share = shared(**slice_batch(shared, batch)).loss
            share.backward()
            sum_gradients(shared, group)
            total = share.detach().clone()
            dist.all_reduce(total, group=group)
            assert relative_error(total, loss.detach()) <= tolerance, f"{name}, {kind}: {total} is not {loss}"
            expected = dict(whole.named_parameters())
            largest = max(float(each.grad.abs().max()) for each in expected.values() if each.grad is not None)
            for key, parameter in shared.named_parameters():
                gradient = expected[key].grad
                gradient = torch.zeros_like(parameter) if gradient is None else gradient
                assert parameter.grad is not None
                error = float((parameter.grad - gradient).abs().max()) / largest
                assert error <= tolerance, f"{name}, {kind}: gradient of {key} is off by {error:.1e}"


def check_training(group: dist.ProcessGroup, name: str) -> None:
    """Steps of an optimiser: the same losses and weights as of one process."""
    whole = model_of(name, torch.float64)
    shared = shard_sequence(copy.deepcopy(whole), group)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (whole, shared)]
    for step in range(4):
        batch = batch_of(name, ("plain", "padded", "packed", "plain")[step], seed=step)
        loss, share = whole(**batch).loss, shared(**slice_batch(shared, batch)).loss
        for each, optimizer in zip((loss, share), optimizers, strict=True):
            optimizer.zero_grad()
            each.backward()
        sum_gradients(shared, group)
        for optimizer in optimizers:
            optimizer.step()
        total = share.detach().clone()
        dist.all_reduce(total, group=group)
        assert relative_error(total, loss.detach()) <= 1e-10, f"step {step}: {total} is not {loss}"
