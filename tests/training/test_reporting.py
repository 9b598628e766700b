"""Where a run's figures are shown beside metrics.jsonl: trackers that are asked for, and the picture of the loss."""

from __future__ import annotations

import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cottention.errors import SettingsError
from cottention.training import reporting
from cottention.training.metrics import read_metrics
from cottention.training.pretraining import pretrain
from cottention.training.recipe_files import replace_settings
from cottention.training.reporting import Reports, check_trackers
from tests.training.helpers import metrics_of, tiny_recipe, write_corpus


class Tracker:
    """What the three packages are to us, writing down what they are told."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def init(self, **options: Any) -> Tracker:
        print("welcome")
        self.begun.append(options)
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.lines.append((step, dict(figures)))

    def finish(self) -> None:
        self.ended += 1

    def SummaryWriter(self, directory: str) -> Tracker:
        return self.init(directory=directory)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.log({name: value}, step)

    close = finish


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tracker]:
    """Packages under the names of the real ones."""
    made = {}
    for name, module_name in (
        ("wandb", "wandb"),
        ("trackio", "trackio"),
        ("tensorboard", "torch.utils.tensorboard"),
    ):
        made[name], module = Tracker(), ModuleType(module_name)
        for each in ("init", "log", "finish", "SummaryWriter"):
            setattr(module, each, getattr(made[name], each))
        monkeypatch.setitem(sys.modules, module_name, module)
    monkeypatch.setattr(reporting, "find_spec", lambda name: ModuleSpec(name, None))
    return made


def recipe_for(source: Path, *names: str) -> Any:
    return replace_settings(tiny_recipe("gpt", source), {"training.report_to": list(names)})


def test_each_tracker_gets_every_line_by_step_and_is_closed(
    trackers: dict[str, Tracker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = Reports(recipe_for(tmp_path, *trackers), tmp_path / "mine")
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=2)
    reports.on_train_begin(None, state, None)  # type: ignore[arg-type]
    reports.on_log(None, state, None, logs={"step": 2, "tokens": 64, "loss": 3.5})  # type: ignore[arg-type]
    reports.on_train_end(None, state, None)  # type: ignore[arg-type]
    for name in ("wandb", "trackio"):
        assert trackers[name].lines == [(2, {"tokens": 64, "loss": 3.5})]
        (begun,) = trackers[name].begun
        assert (begun["project"], begun["resume"]) == ("cottention", "allow")
        assert begun["name"].startswith("mine")
        assert begun["config"]["training"]["max_steps"] == recipe_for(tmp_path).training.max_steps
    assert trackers["tensorboard"].lines == [(2, {"tokens": 64}), (2, {"loss": 3.5})]
    assert trackers["tensorboard"].begun == [{"directory": str(tmp_path / "mine" / "tensorboard")}]
    assert capsys.readouterr().out.count("welcome") == 2, "Trackio, which prints, is kept out of the results"
    assert [tracker.ended for tracker in trackers.values()] == [1, 1, 1]


def test_other_processes_report_nothing(trackers: dict[str, Tracker], tmp_path: Path) -> None:
    reports = Reports(recipe_for(tmp_path, "trackio"), tmp_path)
    state: Any = SimpleNamespace(is_world_process_zero=False, global_step=1)
    reports.on_train_begin(None, state, None)  # type: ignore[arg-type]
    reports.on_log(None, state, None, logs={"step": 1, "loss": 1.0})  # type: ignore[arg-type]
    reports.on_log(None, state, None, logs={"step": 1, "val_loss": 1.0})  # type: ignore[arg-type]
    assert trackers["trackio"].begun == trackers["trackio"].lines == []
    assert not (tmp_path / "loss_curve.png").exists()


def test_a_run_tells_what_metrics_jsonl_holds_and_renews_its_picture_at_every_evaluation(
    trackers: dict[str, Tracker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    real = reporting.draw_run

    def draw(run_dir: Path) -> None:
        real(run_dir)
        drawn.append(len(metrics_of(run_dir)))

    monkeypatch.setattr(reporting, "draw_run", draw)
    recipe = replace_settings(
        recipe_for(write_corpus(tmp_path / "text.txt", num_paragraphs=150), "trackio"),
        {"training.max_steps": 4, "training.log_every": 1, "training.eval_every": 2},
    )
    pretrain(recipe, output_dir=tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert trackers["trackio"].lines == [
        (line["step"], {name: value for name, value in line.items() if name != "step"}) for line in lines
    ]
    held_out = [number for number, line in enumerate(lines, start=1) if "val_loss" in line]
    assert len(held_out) == 2
    assert drawn == held_out


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "find_spec", lambda name: None if name == "trackio" else ModuleSpec(name, None))
    check_trackers(["wandb", "tensorboard"])
    with pytest.raises(SettingsError, match="report_to: trackio is not installed; pip install trackio, or take it out"):
        pretrain(recipe_for(tmp_path, "wandb", "trackio"), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_line_about_a_missing_tracker_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="the extra `tracking` of cottention brings all three"):
        check_trackers(["wandb"])
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^tracking = \[(.*)\]$", text, re.MULTILINE)
    assert extra is not None
    assert set(re.findall(r'"(\w+)>=', extra[1])) == set(reporting._OPENERS)
