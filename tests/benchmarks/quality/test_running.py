"""Cells run, stop, go on and come out the same; small ones of a made task and of a made text."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cottention.benchmarks.quality import cells, running, training
from cottention.benchmarks.quality.cells import HYBRID, PLUS, Cell, cells_like
from cottention.benchmarks.quality.language import TextTask, window_losses
from cottention.benchmarks.quality.lines import Lines
from cottention.benchmarks.quality.models import new_model
from cottention.benchmarks.quality.running import differences, run_cell, run_cells
from cottention.benchmarks.quality.tables import as_markdown
from cottention.benchmarks.quality.tasks import Batch, TaskFiles, make_task
from cottention.benchmarks.quality.texts import open_text
from cottention.errors import DataError, SettingsError

_WORDS = ["the", "a", "of", "in", "sea", "ship", "sails", "whale", "man", "old", "said", "went", "home", "night"]


_SMALL = {"vocab_size": 300}
_STEP_BYTES = training._step_bytes


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small experiments with few steps."""
    mqar = dataclasses.replace(
        cells.EXPERIMENTS["small-mqar"],
        variants=("cosine", "softmax"),
        steps=8,
        rate_steps=4,
        rates=(1e-3, 1e-2),
        settings={"pairs": 4, "test_pairs": (2, 4), "vocab_size": 96, "num_scored": 64},
    )
    monkeypatch.setattr(training, "_step_bytes", lambda run: 1)  # a second of torch's profiler
    text = dataclasses.replace(
        cells.EXPERIMENTS["small"],
        variants=("cosine", "softmax"),
        steps=8,
        rate_steps=2,
        rates=(1e-2,),
        length=16,
        settings={"vocab_size": 300, "num_scored": 1024},
    )
    monkeypatch.setitem(cells.EXPERIMENTS, "small-mqar", mqar)
    monkeypatch.setitem(cells.EXPERIMENTS, "small", text)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    (folder / "texts").mkdir()
    for number in range(60):
        (folder / "texts" / f"{number:02}.txt").write_text(f"{number} " + " ".join(rng.choice(_WORDS, 250)) + ".")
    return TaskFiles(texts=folder / "texts", work=folder / "work")


def test_a_finished_study_has_nothing_to_run_and_an_interrupted_one_goes_on(tmp_path: Path, files: TaskFiles) -> None:
    wanted = cells_like(["small-mqar/*"])
    begun = run_cells(wanted, Lines(tmp_path), files)
    first = [next(begun)["cell"] for _ in range(3)]
    begun.close()
    rest = [line["cell"] for line in run_cells(wanted, Lines(tmp_path), files)]
    assert sorted(first + rest) == sorted(cell.name for cell in wanted)
    assert list(run_cells(wanted, Lines(tmp_path), files)) == []


def test_a_cell_repeats_to_the_last_digit(tmp_path: Path, files: TaskFiles) -> None:
    lines = Lines(tmp_path)
    for _ in run_cells(cells_like(["small-mqar/cosine/*"]), lines, files):
        pass
    cell = cells_like(["small-mqar/cosine/seed-1"])[0]
    found, line = run_cell(cell, lines, files), lines.of(cell)
    assert line is not None
    assert found["scores"] == line["scores"]
    assert [point[:2] for point in found["curve"]] == [point[:2] for point in line["curve"]]
    assert differences(found, line) == []
    other = lines.of(cells_like(["small-mqar/cosine/seed-0"])[0])
    assert other is not None
    assert differences(found, other)


def test_a_rate_that_breaks_training_is_not_chosen_and_a_broken_seed_stops_no_other(
    tmp_path: Path, files: TaskFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = dataclasses.replace(cells.EXPERIMENTS["small-mqar"], rates=(1e-2, 1e30), variants=("cosine",))
    monkeypatch.setitem(cells.EXPERIMENTS, "small-mqar", broken)
    lines, run = Lines(tmp_path), training._Run._step
    for _ in run_cells(cells_like(["small-mqar/cosine/rate-*"]), lines, files):
        pass
    cell = cells_like(["small-mqar/cosine/seed-1"])[0]
    assert Lines(tmp_path).chosen_rate(cell) == 1e-2

    def breaking(self: training._Run, number: int) -> torch.Tensor:
        return run(self, number) * (torch.nan if self.task is first else 1)

    first, make = make_task(cells_like(["small-mqar/cosine/seed-0"])[0], files), make_task
    monkeypatch.setattr(running, "make_task", lambda each, files: first if each.seed == 0 else make(each, files))
    monkeypatch.setattr(training._Run, "_step", breaking)
    seeds = cells_like(["small-mqar/cosine/seed-*"])
    assert [line["cell"] for line in run_cells(seeds, lines, files)] == [each.name for each in seeds[1:]]


def test_cells_of_other_text_do_not_stand_beside_these(tmp_path: Path, files: TaskFiles) -> None:
    lines, (one, other) = Lines(tmp_path), cells_like(["small-mqar/cosine/rate-*"])
    lines.add(one, {"learning_rate": one.rate, "scores": {"loss": 1.0}, "data": "another text"})
    with pytest.raises(
        SettingsError, match=r"^the lines of small-mqar are of other text than this: give another --lines"
    ):
        run_cell(other, lines, files)


def test_two_processes_that_begin_together_make_one_text(tmp_path: Path, files: TaskFiles) -> None:
    begin = [threading.Thread(target=open_text, args=(files.texts,), kwargs=_SMALL | {"work": tmp_path}) for _ in "ab"]
    for each in begin:
        each.start()
    for each in begin:
        each.join()
    text, known = open_text(files.texts, **_SMALL, work=tmp_path), open_text(files.texts, **_SMALL, work=files.work)
    assert np.array_equal(text.train, known.train)


@pytest.mark.parametrize("experiment", ["small", "small-mqar"])
def test_training_goes_on_from_a_checkpoint_with_the_same_numbers(
    tmp_path: Path, files: TaskFiles, monkeypatch: pytest.MonkeyPatch, experiment: str
) -> None:
    cell = Cell(experiment=experiment, variant="cosine", seed=0)
    task = make_task(cell, files)
    whole = training.train(cell, task, rate=1e-2)
    monkeypatch.setattr(training, "_SAVE_S", -1.0)
    path, step = tmp_path / "x.pt", training._Run._step

    def breaking(run: training._Run, number: int) -> torch.Tensor:
        if number == 5:
            raise KeyboardInterrupt
        return step(run, number)

    monkeypatch.setattr(training._Run, "_step", breaking)
    with pytest.raises(KeyboardInterrupt):
        training.train(cell, task, rate=1e-2, checkpoint=path)
    assert path.exists()
    monkeypatch.setattr(training._Run, "_step", step)
    rest = training.train(cell, task, rate=1e-2, checkpoint=path)
    assert [point[:2] for point in rest.curve] == [point[:2] for point in whole.curve]
    for one, other in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_variants_are_trained_on_the_same_rows_in_the_same_order(files: TaskFiles) -> None:
    for experiment in ("small", "small-mqar"):
        one, other = (make_task(Cell(experiment=experiment, variant=v, seed=1), files) for v in ("cosine", "softmax"))
        for step in (0, 7, 1000):
            assert torch.equal(one.batch(step).inputs, other.batch(step).inputs)


def test_documents_are_in_one_split_each(files: TaskFiles) -> None:
    text = open_text(files.texts, vocab_size=300, work=files.work)
    streams = {"train": text.train, **{name: text.held_out(name)["documents"] for name in ("choose", "score")}}
    sizes = [(each == 0).sum() - 1 for each in streams.values()]
    assert sum(sizes) == 60
    assert min(sizes) > 5
    total = sum(text.num_bytes(stream) for stream in streams.values())
    assert total == sum(path.stat().st_size for path in files.texts.iterdir())
    heads = {name: {tuple(part[:3]) for part in _documents(stream)} for name, stream in streams.items()}
    assert not heads["train"] & heads["score"]
    assert not heads["choose"] & heads["score"]
    assert not heads["choose"] & heads["train"]


def _documents(stream: np.ndarray) -> list[list[int]]:
    borders = np.flatnonzero(stream == 0)
    return [stream[a + 1 : b].tolist() for a, b in itertools.pairwise(borders)]


def test_every_window_comes_once_before_any_comes_again(files: TaskFiles) -> None:
    text = open_text(files.texts, vocab_size=300, work=files.work)
    task = TextTask(text, length=16, batch_size=8, seed=3)
    steps = (len(text.train) - 1) // 16 // 8
    rows = [tuple(row) for step in range(steps) for row in task.batch(step).inputs.tolist()]
    windows = {tuple(text.train[i * 16 : i * 16 + 16].tolist()) for i in range((len(text.train) - 1) // 16)}
    assert set(rows) <= windows
    assert len(windows) - len(set(rows)) < 8
    assert (task.batch(0).inputs != task.batch(steps).inputs).any()


def test_carried_rows_go_on_where_they_were(files: TaskFiles) -> None:
    text = open_text(files.texts, vocab_size=300, work=files.work)
    task = TextTask(text, length=16, batch_size=4, seed=3, carried=True)
    first, second = task.batch(0), task.batch(1)
    assert (first.goes_on, second.goes_on) == (False, True)
    assert torch.equal(first.labels[:, -1], second.inputs[:, 0])


@pytest.mark.parametrize("variant", ["cosine", "softmax", PLUS, HYBRID, f"{PLUS}+nope"])
def test_the_same_tokens_are_scored_at_every_context(files: TaskFiles, variant: str) -> None:
    cell = Cell(experiment="small", variant=variant, seed=0)
    model = new_model(cell, 300).eval()
    stream = np.random.default_rng(0).integers(1, 300, 129)
    short, long, carried = (
        window_losses(model, stream, 16),
        *(window_losses(model, stream, 64, p) for p in (None, 16)),
    )
    assert short.size == long.size == 128
    np.testing.assert_allclose(carried, long, atol=1e-5)
    np.testing.assert_allclose(short.reshape(2, 64)[:, :16], long[:, :16], atol=1e-5)
    assert np.abs(short.reshape(2, 64)[:, 16:] - long[:, 16:]).max() > 1e-4
    ids = torch.from_numpy(stream[None, :17])
    with torch.no_grad():
        loss = model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
    assert float(loss) == pytest.approx(short[0].mean(), abs=1e-5)


def test_a_text_is_trained_scored_and_tabled(tmp_path: Path, files: TaskFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_step_bytes", _STEP_BYTES)
    lines = Lines(tmp_path)
    for line in run_cells(cells_like(["small/*"]), lines, files):
        assert line["tokens_per_cpu_second"] > 0
        assert line["step_bytes"] > 1e5
    scores = line["scores"]
    assert list(scores["by_context"]) == ["16", "32", "64", "128", "256", "carried"]
    assert np.isclose(scores["perplexity"], np.exp(scores["loss"]))
    table = as_markdown(lines, ["small"])
    assert "| softmax | " in table
    assert "against softmax" in table
    assert as_markdown(lines, ["lm-1m"]) == ""


def test_mistakes_are_one_line(tmp_path: Path, files: TaskFiles) -> None:
    missing = TaskFiles(texts=tmp_path / "none", work=tmp_path)
    with pytest.raises(DataError, match=r"there is no text at .*none: name a folder or a file with --texts"):
        make_task(Cell(experiment="small", variant="cosine", seed=0), missing)
    with pytest.raises(SettingsError, match="no experiment is named 'lm-1'; did you mean 'lm-1m'"):
        as_markdown(Lines(tmp_path), ["lm-1"])


def test_a_step_in_parts_is_the_step(files: TaskFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(experiment="small-mqar", variant="cosine", seed=0)
    whole = training.train(cell, make_task(cell, files), rate=1e-3)
    monkeypatch.setitem(cells.EXPERIMENTS, "small-mqar", dataclasses.replace(cell.plan, rows_at_once=12))
    parts = training.train(cell, make_task(cell, files), rate=1e-3)
    assert [point[1] for point in parts.curve] == pytest.approx([point[1] for point in whole.curve], rel=1e-5)
    for one, other in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_carried_training_starts_from_what_the_batch_before_has_left(
    files: TaskFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = dataclasses.replace(cells.EXPERIMENTS["small"], settings={"vocab_size": 300, "carried": True}, batch_size=4)
    monkeypatch.setitem(cells.EXPERIMENTS, "small", plan)
    cell = Cell(experiment="small", variant="cosine+conv+decay", seed=0)
    task = make_task(cell, files)
    carried = training.train(cell, task, rate=1e-2)

    def forgetful(step: int, batch: Callable[[int], Batch] = task.batch) -> Batch:
        return dataclasses.replace(batch(step), goes_on=False)

    monkeypatch.setattr(task, "batch", forgetful)
    fresh = training.train(cell, task, rate=1e-2)
    assert carried.curve[0][1] == fresh.curve[0][1]
    assert carried.curve[1][1] != fresh.curve[1][1]
