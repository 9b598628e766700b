"""The tables of GLUE: published rows as published, ours beneath them, and no figure where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from cottention.errors import DataError
from cottention.evaluation.glue_table import COLUMNS, average, glue_tables, read_glue_run


def epoch(number: int, splits: tuple[str, ...], official: dict[str, float], published: dict[str, float]) -> Any:
    scores = {"main": mean(official.values()), "official": official, "as_published": published}
    return {"epoch": number, "score": scores["main"], "splits": dict.fromkeys(splits, scores)}


def write_run(folder: Path, task: str, seeds: list[list[Any]], best: list[int], **changes: Any) -> Path:
    (folder / task).mkdir(parents=True)
    metrics = {
        "task": task,
        "attention_type": "cosine",
        "absent": [],
        "train_limit": None,
        "dev_limit": None,
        "from_scratch": False,
        "num_rows": {"train": 100},
        "seeds": [
            {"seed": number, "best_epoch": chosen, "epochs": epochs}
            for number, (epochs, chosen) in enumerate(zip(seeds, best, strict=True))
        ],
        **changes,
    }
    (folder / task / "metrics.json").write_text(json.dumps(metrics))
    return folder


def write_all(folder: Path, **changes: Any) -> Path:
    names = {"cola": ("mcc", "accuracy"), "stsb": ("pearson", "absolute_pearson"), "mrpc": ("f1", "mean_batch_f1")}
    for task in {name for name, _split in COLUMNS.values()}:
        official, published = names.get(task, ("accuracy", "accuracy"))
        splits = ("dev_matched", "dev_mismatched") if task == "mnli" else ("dev",)
        write_run(folder, task, [[epoch(1, splits, {official: 0.5}, {published: 0.75})]], [1], **changes)
    return folder


def cells_of(text: str, row: str) -> list[list[str]]:
    """The cells of this row in both tables."""
    return [
        [cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines() if line.startswith(f"| {row}")
    ]


def test_published_figures_stand_only_under_their_own_metric(tmp_path: Path) -> None:
    text = glue_tables([read_glue_run(write_all(tmp_path / "mine"))]).markdown()
    official, published = cells_of(text, "published cosine")
    assert published == ["80.6", "81.1", "86.2", "89.3", "90.1", "77.8", "76.5", "88.6", "66.4", "81.8"]
    assert official == ["80.6", "81.1", "–", "89.3", "90.1", "–", "–", "–", "66.4", "–"]
    assert cells_of(text, "published softmax")[1][-1] == "83.1"
    assert cells_of(text, "mine (cosine, 1 seed)") == [["50.0"] * 10, ["75.0"] * 10]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines[:5]}) == 1
    assert "Matthews correlation" in text
    assert "mean of the F1 of every 32 rows" in text


def test_the_best_epochs_of_all_seeds_are_averaged(tmp_path: Path) -> None:
    seeds = [
        [epoch(1, ("dev",), {"accuracy": 0.9, "f1": 0.1}, {"mean_batch_f1": 0.2}),
         epoch(2, ("dev",), {"accuracy": 0.6, "f1": 0.7}, {"mean_batch_f1": 0.5})],
        [epoch(1, ("dev",), {"accuracy": 0.8, "f1": 0.9}, {"mean_batch_f1": 0.7})],
    ]  # fmt: skip
    run = read_glue_run(write_run(tmp_path / "mine", "mrpc", seeds, [2, 1]))
    official, published = cells_of(glue_tables([run]).markdown(), "mine (cosine, 2 seeds)")
    assert official[list(COLUMNS).index("MRPC")] == "70.0 ± 14.1 / 80.0 ± 14.1"
    assert published[list(COLUMNS).index("MRPC")] == "60.0 ± 14.1"
    assert set(official) == {"–", "70.0 ± 14.1 / 80.0 ± 14.1"}  # no other task, so no average either
    assert average(run, "official") is None
    (as_json,) = glue_tables([run]).to_dict()["runs"]
    assert as_json["official"] == {"MRPC": {"accuracy": pytest.approx(0.7), "f1": pytest.approx(0.8)}}
    assert as_json["num_seeds"] == 2


def test_what_limits_a_figure_is_said(tmp_path: Path) -> None:
    scores = [epoch(1, ("dev_matched",), {"accuracy": 0.5}, {"accuracy": 0.5})]
    changes = {"absent": ["dev_mismatched"], "train_limit": 100, "dev_limit": 20, "from_scratch": True}
    folder = write_run(tmp_path / "mine", "mnli", [scores], [1], **changes)
    text = glue_tables([read_glue_run(folder)]).markdown()
    remarks = ("dev_mismatched absent", "100 training rows", "the first 20 dev rows", "no pretraining")
    assert text.endswith(f"\n\nmine: {'; '.join(f'MNLI: {remark}' for remark in remarks)}.\n")
    assert cells_of(text, "mine")[0][:2] == ["50.0", "–"]


def test_a_limit_that_left_nothing_out_is_not_said(tmp_path: Path) -> None:
    scores = [epoch(1, ("dev",), {"accuracy": 0.5}, {"accuracy": 0.5})]
    for limit, remarks in ((100, ()), (20, ("WNLI: the first 20 dev rows",))):
        rows = {"train": 100, "dev": min(limit, 71)}
        folder = write_run(tmp_path / str(limit), "wnli", [scores], [1], dev_limit=limit, num_rows=rows)
        assert read_glue_run(folder).remarks == remarks


def test_wnli_has_a_column_only_where_it_was_run_and_is_in_no_average(tmp_path: Path) -> None:
    folder = write_all(tmp_path / "mine")
    without = glue_tables([read_glue_run(folder)]).markdown()
    assert "WNLI" not in without
    write_run(folder, "wnli", [[epoch(1, ("dev",), {"accuracy": 0.1}, {"accuracy": 0.1})]], [1])
    cells = cells_of(glue_tables([read_glue_run(folder)]).markdown(), "mine")[0]
    assert cells[-2:] == ["50.0", "10.0"]
    one_task = read_glue_run(folder / "wnli")
    assert (one_task.name, list(one_task.scores["official"])) == ("wnli", ["wnli"])


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no finished run of `cottention finetune`"):
        read_glue_run(tmp_path)
    (tmp_path / "metrics.json").write_text('{"task": "snli"}')
    with pytest.raises(DataError, match=r"metrics\.json is not what `cottention finetune` writes"):
        read_glue_run(tmp_path)
