"""Scores of a cosine model beside its softmax source: the loss of each, and how far their layers are from each other.

errors, similarity = compare(source, model, windows, batch_size=16)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.convert.distil_layers import attention_sublayers, hidden_states_of, record
from cottention.convert.distil_report import Scores
from cottention.convert.distil_text import DistillationText, scoring_batches
from cottention.evaluation import evaluate_masked_lm, evaluate_perplexity
from cottention.models import CottentionGPTForCausalLM


@dataclass
class _Unexplained:
    """Squared error over the truth's variance, summed over batches: one pass, in double."""

    squared_error: float = 0.0
    squares: float = 0.0
    sums: Tensor | float = 0.0
    count: int = 0

    def add(self, got: Tensor, truth: Tensor) -> None:
        """Take in `[N, D]` vectors."""
        got, truth = got.double(), truth.double()
        self.squared_error += (got - truth).square().sum().item()
        self.squares += truth.square().sum().item()
        self.sums = self.sums + truth.sum(0)
        self.count += len(truth)

    def share(self) -> float:
        """0 for equal vectors, 1 for their mean; of vectors that do not vary, 0 or infinite."""
        variation = self.squares - (torch.as_tensor(self.sums).square().sum() / max(self.count, 1)).item()
        if variation <= 0:
            return 0.0 if self.squared_error == 0 else float("inf")
        return self.squared_error / variation


def score_source(
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: DistillationText, window: int, **options: Any
) -> Scores:
    """Loss of the softmax source; without a trained head there is none."""
    return Scores(**_losses(source, tokenizer, text, window, **options))


def score_copy(
    source: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: DistillationText,
    window: int,
    **options: Any,
) -> Scores:
    """Loss of the cosine model, and what separates it from its source."""
    return Scores(
        **_losses(model, tokenizer, text, window, **options),
        **_differences(source, model, text.held_out, options["batch_size"]),
    )


def _losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: DistillationText,
    window: int,
    *,
    has_head: bool,
    batch_size: int,
    seed: int,
    show_progress: bool,
) -> dict[str, Any]:
    if not has_head:
        return {"loss": None}
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress": show_progress}
    if isinstance(model, CottentionGPTForCausalLM):
        result = evaluate_perplexity(model, tokenizer, text.held_out_documents, context=window, **options)
        return {"loss": result.nats_per_token, "perplexity": result.perplexity}
    masked = evaluate_masked_lm(model, tokenizer, text.held_out_documents, window=window, seed=seed, **options)
    return {"loss": masked.nats_per_token, "accuracy": masked.accuracy}


@torch.inference_mode()
def _differences(source: PreTrainedModel, model: PreTrainedModel, windows: Dataset, batch_size: int) -> dict[str, Any]:
    """Errors of every attention sublayer and of the whole, and the similarity of pooled windows."""
    sublayers = attention_sublayers(model)
    layers, whole = [_Unexplained() for _ in sublayers], _Unexplained()
    similarity, num_rows = 0.0, 0
    for cpu_batch, on_cpu in scoring_batches(windows, batch_size):
        batch, real = {name: tensor.to(model.device) for name, tensor in cpu_batch.items()}, on_cpu.to(model.device)
        calls, hidden_states = record(source, batch)
        for sublayer, call, error in zip(sublayers, calls, layers, strict=True):
            error.add(sublayer(*call.args, **call.kwargs)[real], call.output[real])
        truth, got = hidden_states[-1], hidden_states_of(model, batch)[-1]
        whole.add(got[real], truth[real])
        similarity += F.cosine_similarity(_pooled(got, real), _pooled(truth, real), dim=-1).sum().item()
        num_rows += len(real)
    return {
        "attention_errors": tuple(error.share() for error in layers),
        "hidden_error": whole.share(),
        "similarity": similarity / num_rows,
    }


def _pooled(hidden: Tensor, real: Tensor) -> Tensor:
    """Mean over the real tokens: `[B, D]`; a length does not matter to an angle, so the sum serves."""
    return (hidden * real[..., None]).sum(dim=1)
