"""A run by the clock ends in its time, whatever its speed, with a schedule that a slow beginning does not spoil."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from cottention.errors import SettingsError
from cottention.training import neighbours
from cottention.training.arguments import training_arguments
from cottention.training.deadline import Deadline
from cottention.training.neighbours import NeighbourWatch, threads_beside
from cottention.training.pretraining import build_model, pretrain
from cottention.training.recipe_files import replace_settings
from cottention.training.stopwatch import Stopwatch
from cottention.training.text import prepare_text
from cottention.training.trainer import PretrainingTrainer
from tests.training.helpers import metrics_of, tiny_recipe
from tests.training.test_trainer import short

TOTAL_S = 300.0


class _Run:
    """The Trainer's part, with steps that take what they are told."""

    def __init__(self, recipe: Any, before_s: float = 0.0) -> None:
        self.now = before_s
        self.deadline = Deadline(recipe, lambda: self.now)
        self.state, self.control, self.arguments = TrainerState(), TrainerControl(), TrainingArguments(use_cpu=True)
        self.factors: list[float] = []
        self.forecasts: list[int] = []
        self.deadline.on_train_begin(self.arguments, self.state, self.control)

    def go(self, step_s: Callable[[float], float]) -> None:
        """Until it is to stop; `step_s` says how long a step takes that begins at a time."""
        while not self.control.should_training_stop:
            assert self.state.global_step < self.state.max_steps, "the Trainer itself would have stopped"
            self.factors.append(self.deadline.factor(self.state.global_step))
            self.now += step_s(self.now)
            self.state.global_step += 1
            self.deadline.on_step_end(self.arguments, self.state, self.control)
            self.forecasts.append(self.state.max_steps)


@pytest.fixture
def recipe(corpus: Path) -> Any:
    changes = {"training.max_steps": 1000, "training.minutes": TOTAL_S / 60, "optimizer.warmup_steps": 0.05}
    return replace_settings(tiny_recipe("gpt", corpus), changes)


@pytest.mark.parametrize(
    ("step_s", "num_steps"),
    [
        (lambda _now: 0.3, 1000),  # as forecast
        (lambda _now: 0.1, 3000),
        (lambda _now: 1.2, 250),
        (lambda now: 5.0 if now < 10 else 0.3, 2 + 967),  # a slow beginning
        (lambda now: 0.3 if now < 150 else 0.6, 500 + 250),  # a neighbour comes
        (lambda _now: 70.0, 4),
    ],
)
def test_it_ends_in_its_time_with_a_rate_near_zero(recipe: Any, step_s: Any, num_steps: int) -> None:
    run = _Run(recipe)
    run.go(step_s)
    assert run.now == pytest.approx(TOTAL_S, abs=step_s(TOTAL_S) / 2 + 1e-6)
    assert run.state.global_step == pytest.approx(num_steps, abs=2)
    assert run.state.max_steps == run.deadline.num_steps == run.state.global_step
    assert run.factors[-1] <= 1.1 * (step_s(TOTAL_S) + step_s(TOTAL_S) / 2) / (0.95 * TOTAL_S)


def test_the_forecast_follows_the_speed_within_seconds(recipe: Any) -> None:
    run = _Run(recipe)
    run.go(lambda now: 3.0 if now < 10 else 0.3)
    first = run.forecasts[3]
    assert first == pytest.approx(TOTAL_S / 3.0, rel=0.1)
    settled = run.forecasts[4 + round(25 / 0.3)]  # the slow seconds lie behind the horizon
    assert settled == pytest.approx(run.state.global_step, rel=0.03)


def test_a_slow_beginning_does_not_skip_the_warmup(recipe: Any) -> None:
    run = _Run(recipe)
    run.go(lambda now: 14.0 if now == 0 else 0.3)  # one step as long as nearly the whole warmup
    steep = max(after - before for before, after in zip(run.factors, run.factors[1:], strict=False))
    assert steep <= 1 / 20 + 1e-9
    assert max(run.factors) > 0.9


def test_the_share_of_hidden_tokens_falls_by_the_clock_too(corpus: Path, tmp_path: Path) -> None:
    changes = {"data.mlm_probability_start": 0.5, "training.minutes": 1.0}
    recipe = replace_settings(tiny_recipe("bert", corpus), changes)
    text = prepare_text(recipe, None)
    arguments = training_arguments(recipe, tmp_path)
    model = build_model(recipe, text.tokenizer)
    trainer = PretrainingTrainer(recipe, model, arguments=arguments, text=text, run_dir=tmp_path)
    stream: Any = trainer.train_dataset
    for elapsed_s, share in ((0.0, 0.5), (30.0, 0.325), (60.0, 0.15), (70.0, 0.15)):
        trainer._stopwatch = Stopwatch(elapsed_s=elapsed_s, step=0)
        assert stream[0]["mlm_probability"] == pytest.approx(share, abs=0.005)


def test_a_resumed_run_has_what_is_left_of_its_time(recipe: Any) -> None:
    run = _Run(recipe, before_s=200.0)
    run.state.global_step = 600
    run.go(lambda _now: 0.3)
    assert run.now == pytest.approx(TOTAL_S, abs=0.2)
    assert run.factors[0] == pytest.approx((TOTAL_S - 200) / (0.95 * TOTAL_S))


def test_pretraining_by_the_clock_goes_on_where_it_was_stopped(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each look at the clock is a tenth of a second, so that the run is the same on any machine.
    ticks = iter(range(1_000_000))
    monkeypatch.setattr("cottention.training.stopwatch.time.perf_counter", lambda: next(ticks) / 10)
    recipe = replace_settings(short("gpt", corpus), {"training.max_steps": 5, "training.minutes": 0.5})
    result = pretrain(recipe, output_dir=tmp_path)
    assert result.step > 5, "max_steps is a forecast"
    lines = metrics_of(tmp_path)
    assert lines[-1]["step"] == result.step
    assert "val_loss" in lines[-1]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["attention_type"] == "cosine"
    again = pretrain(recipe, output_dir=tmp_path)
    assert (again.step, again.metrics) == (result.step, result.metrics)


def test_what_counts_steps_excludes_the_clock(corpus: Path) -> None:
    with pytest.raises(SettingsError, match=r"^data.carry_state excludes training.minutes"):
        tiny_recipe("gpt", corpus, data__carry_state=True, training__minutes=1.0)
    with pytest.raises(SettingsError, match=r"^data.long_sequence_length excludes training.minutes"):
        tiny_recipe("bert", corpus, data__sequence_length=8, data__long_sequence_length=16, training__minutes=1.0)
    with pytest.raises(SettingsError, match=r"^training.minutes must be positive; got 0"):
        tiny_recipe("gpt", corpus, training__minutes=0)


def test_one_process_has_one_clock(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(SettingsError, match=r"^training.minutes needs one process, whose clock decides; got 2$"):
        training_arguments(recipe, tmp_path)


# Threads


@pytest.mark.parametrize(
    ("others", "cores", "most", "expected"),
    [
        (0.0, 2, 2, 2),
        (0.4, 2, 2, 2),
        (1.0, 2, 2, 1),
        (1.9, 2, 2, 1),
        (3.0, 16, 16, 13),
        (0.0, 16, 4, 4),
        (9.0, 2, 2, 1),
    ],
)
def test_threads_are_those_that_have_a_core(others: float, cores: int, most: int, expected: int) -> None:
    assert threads_beside(others, cores=cores, most=most) == expected


def test_a_watch_takes_fewer_threads_beside_a_neighbour_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(neighbours, "_num_cores", lambda: 2)
    monkeypatch.setattr(neighbours.time, "sleep", lambda _seconds: None)
    clocks = [
        neighbours._Clocks(wall=0.0, own=0.0, busy=0.0),
        neighbours._Clocks(wall=1.0, own=0.1, busy=1.1),  # one core is busy with other work
        neighbours._Clocks(wall=5.0, own=4.1, busy=9.1),  # still
        neighbours._Clocks(wall=9.0, own=8.1, busy=13.1),  # no longer
    ]
    monkeypatch.setattr(neighbours, "_read_clocks", lambda: clocks.pop(0))
    watch, arguments, state, control = (
        NeighbourWatch(),
        TrainingArguments(use_cpu=True),
        TrainerState(),
        TrainerControl(),
    )
    watch.on_train_begin(arguments, state, control)
    assert chosen == [2, 1]
    for _ in range(2):
        monkeypatch.setattr(neighbours.time, "perf_counter", lambda: 1e9)
        watch.on_step_end(arguments, state, control)
    assert chosen == [2, 1, 2]
    watch.on_train_end(arguments, state, control)
    assert chosen[-1] == 2


def test_the_clocks_of_this_machine_run() -> None:
    before = neighbours._read_clocks()
    if before is None:
        pytest.skip("the system does not say what its cores do")
    while neighbours.time.process_time() - before.own < 0.2:
        pass
    after = neighbours._read_clocks()
    assert after is not None
    assert after.busy - before.busy >= 0.2 - 0.05  # ticks of 10 ms on each core
    assert 0 < after.busy - before.busy <= neighbours._num_cores() * (after.wall - before.wall) + 0.1
