"""The loop alone, on a model of one number: what a step reads, when it exchanges, who ends it, what callbacks see."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from cottention.training.loop import TrainingLoop
from cottention.training.processes import Processes, to_device
from cottention.training.stream import InOrder

LENGTH = 400


class Numbers(torch.utils.data.Dataset[float]):
    """The stream 0, 1, 2, ..."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, position: int) -> float:
        return float(position)


@dataclass(frozen=True, kw_only=True)
class Watched(Processes):
    """One process that notes when it would exchange gradients."""

    exchanges: list[bool] = field(default_factory=list)

    def exchange(self, wrapped: nn.Module, *, now: bool) -> AbstractContextManager[Any]:
        self.exchanges.append(now)
        return nullcontext()


class Product(TrainingLoop):
    """Learns with the gradient that is the mean of a step's numbers."""

    def __init__(self, *, collator: Any = torch.tensor, processes: Processes | None = None, **settings: Any) -> None:
        arguments = TrainingArguments(
            **{
                "max_steps": 6,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 3,
                "max_grad_norm": 0.0,
                **settings,
            },
            use_cpu=True,
            report_to="none",
            logging_steps=2,
            eval_steps=3,
            save_steps=4,
        )
        model: Any = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        super().__init__(
            model, arguments, processes=processes, stream=Numbers(), collator=lambda rows: {"x": collator(rows)}
        )
        self.seen: list[list[float]] = []
        self.said: list[str] = []

    def create_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=1.0)

    def create_scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)

    def num_targets(self, passes: Any) -> Tensor:
        self.seen.append([number for one in passes for number in one["x"].tolist()])
        return torch.tensor(len(self.seen[-1]))

    def compute_loss(self, model: nn.Module, batch: Any, num_targets: Tensor | None) -> Tensor:
        assert num_targets is not None
        return model(batch["x"][:, None]).sum() / num_targets

    def watch(self, loss: Tensor) -> None:
        assert not loss.requires_grad

    def log_step(self, learning_rate: float) -> None:
        self.said.append(f"log {self.state.global_step} {learning_rate:.2f}")

    def evaluate(self) -> None:
        self.said.append(f"evaluate {self.state.global_step}")

    def save_checkpoint(self) -> None:
        self.said.append(f"save {self.state.global_step}")


def test_steps_read_the_stream_in_order_and_the_gradient_is_that_of_all_passes() -> None:
    loop = Product()
    loop.train()
    assert loop.seen == [[6.0 * step + i for i in range(6)] for step in range(6)]
    rates = [1 - step / 6 for step in range(6)]
    descended = sum(rate * (6 * step + 2.5) for step, rate in enumerate(rates))
    assert loop.model.weight.item() == pytest.approx(-descended, rel=1e-6)
    assert loop.model.weight.grad is None
    assert float(loop._grad_norm) == 5 * 6 + 2.5
    assert loop.said == ["log 2 0.83", "evaluate 3", "log 4 0.50", "save 4", "log 6 0.17", "evaluate 6"]


def test_clipping_leaves_the_norm_that_was_measured() -> None:
    loop = Product(max_steps=1, max_grad_norm=0.5)
    loop.train()
    assert float(loop._grad_norm) == 2.5
    assert loop.model.weight.item() == pytest.approx(-0.5, rel=1e-5)


def test_gradients_are_exchanged_once_a_step_behind_its_last_pass() -> None:
    processes = Watched(device=torch.device("cpu"))
    loop = Product(processes=processes, max_steps=2, gradient_accumulation_steps=2)
    # The second micro batch of each step comes in two passes.
    loop.collator = lambda rows: (
        {"x": torch.tensor(rows)} if rows[0] % 4 == 0 else {"passes": [{"x": torch.tensor([row])} for row in rows]}
    )
    loop.train()
    assert processes.exchanges == [False, False, True] * 2
    assert loop.seen == [[0, 1, 2, 3], [4, 5, 6, 7]]


class _Moves(TrainerCallback):
    """Moves the end of the run at a step."""

    def __init__(self, at: int, to: int) -> None:
        self.at, self.to = at, to

    def on_step_end(self, args: Any, state: Any, control: Any, **_others: Any) -> None:
        if state.global_step == self.at:
            state.max_steps = self.to


@pytest.mark.parametrize(("at", "to", "steps"), [(2, 4, 4), (3, 9, 9), (5, 5, 5)])
def test_a_callback_may_move_the_end(at: int, to: int, steps: int) -> None:
    loop = Product()
    loop.add_callback(_Moves(at, to))
    loop.train()
    assert loop.state.global_step == len(loop.seen) == steps


class _Notes(TrainerCallback):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._note("begin", others)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._note(f"step {state.global_step}", others)
        control.should_training_stop = state.global_step == 4

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._note("save", others)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._note("end", others)

    def _note(self, event: str, others: dict[str, Any]) -> None:
        assert isinstance(others["optimizer"], torch.optim.SGD)
        assert others["lr_scheduler"].optimizer is others["optimizer"]
        self.told.append(event)


def test_callbacks_see_the_run_and_stop_it_behind_what_is_due() -> None:
    loop, notes, unheard = Product(), _Notes(), _Moves(1, 2)
    loop.add_callback(unheard)
    loop.add_callback(notes)
    loop.remove_callback(_Moves)
    loop.train()
    assert notes.told == ["begin", "step 1", "step 2", "step 3", "step 4", "save", "end"]
    assert loop.said[-1] == "save 4"


def test_micro_batches_go_round_the_processes() -> None:
    shares = [InOrder(24, start=8, micro_batch_size=2, process_index=rank, num_processes=2) for rank in range(2)]
    assert [list(share) for share in shares] == [[8, 9, 12, 13, 16, 17, 20, 21], [10, 11, 14, 15, 18, 19, 22, 23]]
    assert [len(share) for share in shares] == [8, 8]
    assert list(InOrder(5)) == [0, 1, 2, 3, 4]


def test_tensors_are_moved_however_deep_they_lie() -> None:
    batch = {"first": {"input_ids": torch.ones(2)}, "passes": [{"x": torch.ones(1)}], "name": "a", "none": None}
    moved = to_device(batch, torch.device("meta"))
    assert moved["first"]["input_ids"].is_meta
    assert moved["passes"][0]["x"].is_meta
    assert (moved["name"], moved["none"]) == ("a", None)
    assert not batch["first"]["input_ids"].is_meta  # pyright: ignore
