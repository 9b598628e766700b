"""One loop for every cell: AdamW, a warm-up and a cosine down to zero, gradients of norm one, nothing else.

A cell that takes minutes writes what it needs to go on every two of them, and an interrupted one goes on from there
with the same numbers.

    trained = train(cell, task, rate=3e-3, checkpoint=Path("runs/quality/x.pt"))
    trained.model, trained.curve
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cottention.benchmarks.memory import measure_call
from cottention.benchmarks.quality.cells import Cell
from cottention.benchmarks.quality.models import new_model, parameter_groups
from cottention.benchmarks.quality.rounding import products_in_float32
from cottention.benchmarks.quality.tasks import Batch, Task, hidden_states, labelled_loss
from cottention.files import written_file
from cottention.models import CottentionGPTForCausalLM
from cottention.models.versions import CACHE_NAME, cache_of
from cottention.training.checkpointing_trainer import NonFiniteLossError

WEIGHT_DECAY = 0.05
BETAS = (0.9, 0.95)
WARMUP = 0.05  # of the steps
MAX_NORM = 1.0
_POINTS = 20  # of a curve
_SAVE_S = 120.0


@dataclass
class Trained:
    """A trained model and how it went.

    Attributes:
        curve: (step, mean nats since the point before, processor seconds, seconds), at most 20 points.
        seconds: of training.
        cpu_seconds: of the process, all its threads together: what a busy machine changes least.
        step_bytes: what one pass of a step needs at its peak beyond weights and optimizer.
    """

    model: CottentionGPTForCausalLM
    curve: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    step_bytes: int = 0


def train(cell: Cell, task: Task, *, rate: float, checkpoint: Path | None = None, device: str = "cpu") -> Trained:
    """Train the cell's model from its seed, or from where a checkpoint is.

    Args:
        cell: what to train.
        task: what on.
        rate: highest learning rate.
        checkpoint: where an interrupted run goes on from; removed by the caller once the cell is finished.
        device: cpu or cuda.

    Raises:
        NonFiniteLossError: the loss is not finite.
    """
    model = new_model(cell, task.vocab_size).train()
    model.to(torch.device(device))  # pyright: ignore[reportArgumentType]  transformers' decorator hides the signature
    optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=rate, betas=BETAS)
    trained, start = Trained(model), 0
    if checkpoint is not None and checkpoint.exists():
        start = _load(checkpoint, trained, optimizer)
    run = _Run(trained, optimizer, task, cell, rate=rate, device=device)
    run.go(start, checkpoint)
    trained.step_bytes = _step_bytes(run)
    model.eval()
    return trained


class _Run:
    """The loop and what it counts."""

    def __init__(
        self,
        trained: Trained,
        optimizer: torch.optim.Optimizer,
        task: Task,
        cell: Cell,
        *,
        rate: float,
        device: str,
    ) -> None:
        self.trained, self.optimizer, self.task = trained, optimizer, task
        self.rate, self.num_steps, self.device = rate, cell.steps, device
        self.rows_at_once = cell.plan.rows_at_once
        self.is_short = cell.plan.precision == "bfloat16"
        self.cache: Any = None

    def go(self, start: int, checkpoint: Path | None) -> None:
        """Train from a step to the end."""
        trained = self.trained
        every = max(1, self.num_steps // _POINTS)
        clock, cpu_clock = time.perf_counter() - trained.seconds, time.process_time() - trained.cpu_seconds
        saved_at, losses = time.perf_counter(), []
        for step in range(start, self.num_steps):
            with self._products():
                losses.append(self._step(step))
            if (step + 1) % every and step + 1 < self.num_steps:
                continue
            mean = torch.stack(losses).mean().item()
            losses = []
            if not math.isfinite(mean):
                raise NonFiniteLossError(f"the loss is {mean} at step {step + 1} with learning rate {self.rate:g}")
            trained.seconds, trained.cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu_clock
            trained.curve.append([step + 1, mean, round(trained.cpu_seconds, 2), round(trained.seconds, 2)])
            if checkpoint is not None and self.cache is None and time.perf_counter() - saved_at > _SAVE_S:
                _save(checkpoint, trained, self.optimizer, step + 1)
                saved_at = time.perf_counter()
        trained.seconds, trained.cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu_clock

    def _products(self) -> AbstractContextManager[Any]:
        return products_in_float32(self.device) if self.is_short else nullcontext()

    def _step(self, step: int) -> Tensor:
        factor = schedule(step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        loss = self._backward(self.task.batch(step))
        nn.utils.clip_grad_norm_(self.trained.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _backward(self, batch: Batch) -> Tensor:
        if self.rows_at_once is None:
            loss = self.loss(batch)
            loss.backward()
            return loss.detach()
        losses = []
        for share, part in batch.split(self.rows_at_once):
            loss = share * self.loss(part)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def loss(self, batch: Batch) -> Tensor:
        """Of a batch; rows that go on start from the states that the batch before has left."""
        model, inputs, labels = self.trained.model, batch.inputs.to(self.device), batch.labels.to(self.device)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.is_short):
            if batch.goes_on is None:
                return labelled_loss(model, hidden_states(model, inputs, use_cache=False)[0], labels)
            past = {CACHE_NAME: self.cache} if batch.goes_on else {}
            output = hidden_states(model, inputs, use_cache=True, **past)
            self.cache = cache_of(output)
            return labelled_loss(model, output[0], labels)


def schedule(step: int, num_steps: int) -> float:
    """Share of the highest rate at a step: up in a line for a twentieth of the steps, then down in a cosine to 0."""
    warmup = max(1, round(WARMUP * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def _step_bytes(run: _Run) -> int:
    """Of the tensors of one more forward and backward pass, whose gradients are dropped."""
    batch = run.task.batch(0)  # begins afresh
    if run.rows_at_once is not None:
        batch = batch.split(run.rows_at_once)[0][1]

    def call() -> tuple[Tensor, ...]:
        loss = run.loss(batch)
        loss.backward()
        return (loss.detach(),)

    reading = measure_call(call, run.device)
    run.optimizer.zero_grad()
    return reading.allocated_bytes


def _save(path: Path, trained: Trained, optimizer: torch.optim.Optimizer, step: int) -> None:
    content = {
        "step": step,
        "model": trained.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "curve": trained.curve,
        "seconds": trained.seconds,
        "cpu_seconds": trained.cpu_seconds,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_file(path) as file:
        torch.save(content, file)


def _load(path: Path, trained: Trained, optimizer: torch.optim.Optimizer) -> int:
    content = torch.load(path, weights_only=True)
    trained.model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    trained.curve, trained.seconds, trained.cpu_seconds = content["curve"], content["seconds"], content["cpu_seconds"]
    return content["step"]
