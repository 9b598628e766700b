"""Teaches a cosine model what its softmax source does: first each layer's attention by itself, then all as a whole.

In the first phase the source runs alone; every cosine layer gets the tokens that the source's layer got, and its
attention sublayer learns to give what the source's gave. Layers do not wait for each other and nothing runs backward
through the feed-forward parts, so an update costs about two forward passes. Only projections and norm_const learn.

In the second phase the cosine model runs by itself, so that its layers meet the errors of those before them. It learns
the source's hidden states after every layer and, where there is a trained head, the source's distribution over the
vocabulary. Every parameter below the head learns, but the embeddings.

    teach_attention(source, model, batches, steps=200, learning_rate=3e-3)
    teach_whole(source, model, batches, steps=50, learning_rate=5e-4, has_head=True)

Source: the two phases are those of LoLCATs (arXiv 2410.10254), attention transfer and recovery. Differs: the student's
own weights are trained, not a feature map and low-rank additions, and no text is predicted, only the source imitated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from cottention.bars import progress
from cottention.convert.distil_layers import attention_sublayers, hidden_states_of, record
from cottention.errors import CottentionError
from cottention.training.loop import TrainingLoop
from cottention.training.processes import Processes, to_device

Batches = Iterator[dict[str, Tensor]]

# norm_const sits behind a sigmoid and in an exponent: it has units to go where weights have hundredths.
_NORM_CONST_RATE = 20.0
_WARMUP_SHARE = 0.1
_LOGIT_ROWS = 2048  # tokens whose logits are compared: 250 MB at 30k tokens of vocabulary


def teach_attention(
    source: PreTrainedModel,
    model: PreTrainedModel,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float,
    show_progress: bool = False,
) -> dict[str, nn.Parameter]:
    """First phase: the sum over layers of each sublayer's unexplained share of variance.

    Returns:
        What was trained: projections and norm_const of every cosine layer, by name.

    Raises:
        CottentionError: the loss is no number any more.
    """

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            calls, _ = record(source, batch)
        shares = [
            unexplained(sublayer(*call.args, **call.kwargs), call.output)
            for sublayer, call in zip(attention_sublayers(model), calls, strict=True)
            if sublayer.is_cosine
        ]
        return torch.stack(shares).sum()

    cosine = [sublayer for sublayer in attention_sublayers(model) if sublayer.is_cosine]
    inside = {id(parameter) for sublayer in cosine for parameter in sublayer.parameters()}
    parameters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside}
    with progress("Attention", "update", total=steps, on=show_progress) as bar:
        _Teaching(model, parameters, loss, batches, steps=steps, learning_rate=learning_rate, bar=bar).teach()
    return parameters


def teach_whole(
    source: PreTrainedModel,
    model: PreTrainedModel,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float,
    has_head: bool,
    show_progress: bool = False,
) -> dict[str, nn.Parameter]:
    """Second phase: hidden states after every layer and, with a head, the divergence of its distribution.

    Returns:
        What was trained: every parameter of every layer, by name.

    Raises:
        CottentionError: the loss is no number any more.
    """

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            truths = hidden_states_of(source, batch)[1:]
        got = hidden_states_of(model, batch)[1:]
        total = torch.stack([unexplained(one, truth) for one, truth in zip(got, truths, strict=True)]).sum()
        return total + _divergence(source, model, truths[-1], got[-1]) if has_head else total

    body: Any = model.base_model
    layers: nn.Module = body.encoder if hasattr(body, "encoder") else body.h
    inside = {id(parameter) for parameter in layers.parameters()}
    parameters = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in inside}
    with progress("Whole model", "update", total=steps, on=show_progress) as bar:
        _Teaching(model, parameters, loss, batches, steps=steps, learning_rate=learning_rate, bar=bar).teach()
    return parameters


def unexplained(got: Tensor, truth: Tensor) -> Tensor:
    """Squared error over the variance of the truth: 0 for a perfect copy, 1 for the best constant."""
    return (got - truth).square().sum() / (truth - truth.mean((0, 1))).square().sum()


def _divergence(source: PreTrainedModel, model: PreTrainedModel, truth: Tensor, got: Tensor) -> Tensor:
    """Kullback-Leibler divergence per token of the model's distribution from the source's, over part of the tokens."""
    rows = slice(None, _LOGIT_ROWS)
    with torch.no_grad():
        expected = _head(source)(truth.flatten(0, 1)[rows]).log_softmax(-1)
    found = _head(model)(got.flatten(0, 1)[rows]).log_softmax(-1)
    return F.kl_div(found, expected, reduction="batchmean", log_target=True)


def _head(model: Any) -> nn.Module:
    return model.cls.predictions if hasattr(model, "cls") else model.lm_head


class _Teaching(TrainingLoop):
    """Adam with a short warmup and a linear way down to 0, on ready batches; nothing is measured or saved meanwhile."""

    stepwise = False
    drops_out = False

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: dict[str, nn.Parameter],
        loss_of: Callable[[dict[str, Tensor]], Tensor],
        batches: Batches,
        *,
        steps: int,
        learning_rate: float,
        bar: Any,
    ) -> None:
        arguments = TrainingArguments(max_steps=steps, max_grad_norm=0.0, use_cpu=True, report_to="none")
        super().__init__(model, arguments, processes=Processes(device=model.device), stream=batches, collator=None)
        self._parameters, self._loss_of, self._learning_rate, self._bar = parameters, loss_of, learning_rate, bar

    def teach(self) -> None:
        """Train these parameters and no others."""
        for key, parameter in self.model.named_parameters():
            parameter.requires_grad_(key in self._parameters)
        self.train()
        self.model.requires_grad_(True)

    def create_optimizer(self) -> torch.optim.Optimizer:
        """Adam, at a rate of its own for norm_const."""
        slow = [parameter for key, parameter in self._parameters.items() if not key.endswith("norm_const")]
        fast = [parameter for key, parameter in self._parameters.items() if key.endswith("norm_const")]
        rate = self._learning_rate
        groups = [{"params": slow, "lr": rate}, {"params": fast, "lr": rate * _NORM_CONST_RATE}]
        return torch.optim.Adam(groups, betas=(0.9, 0.98))

    def create_scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
        """Up within a tenth of the updates, and down to 0."""
        warmup = max(_WARMUP_SHARE * num_steps, 1)
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (num_steps - step) / (num_steps - warmup + 1))
        )

    def batches_from(self, step: int) -> Batches:
        """All of them."""
        return (to_device(batch, self.processes.device) for batch in self.train_dataset)

    def compute_loss(self, model: nn.Module, batch: Any, num_targets: Tensor | None) -> Tensor:
        """How far the model is from its source."""
        return self._loss_of(batch)

    def watch(self, loss: Tensor) -> None:
        """Show the loss; stop at one that is no number."""
        value = loss.item()
        if not math.isfinite(value):
            raise CottentionError(
                f"the distillation's loss must be finite; got {value} at update {self.state.global_step + 1} of "
                f"{self.args.max_steps} (learning rate {self._learning_rate:g}): take a lower rate"
            )
        self._bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        self._bar.update()
