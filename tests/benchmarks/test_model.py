"""The model benchmark from settings to files, at the smallest sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cottention.benchmarks import model, twins
from cottention.benchmarks.check import WrongResultError
from cottention.benchmarks.model import benchmark_model, model_as_text, write_model_report
from cottention.benchmarks.settings import PAIR_LENGTHS, ModelSettings
from cottention.cli import bench
from cottention.cli.main import main
from cottention.errors import SettingsError

TINY = ModelSettings(batch_size=6, hidden_size=16, num_layers=1, num_heads=2, vocab_size=50, repeats=3, lengths=(40,))
GPT = replace(TINY, arch="gpt", lengths=(9, 64))


@pytest.fixture(scope="module")
def report() -> model.ModelReport:
    return benchmark_model(TINY)


def test_both_forms_are_timed_on_every_mix(report: model.ModelReport) -> None:
    assert [point.mix for point in report.points] == list(PAIR_LENGTHS)
    for point in report.points:
        assert len(point.unpadded.samples_s) == len(point.padded.samples_s) == 3
        assert point.speedup == point.padded.median_s / point.unpadded.median_s
        assert point.loss_difference < 1e-6
        assert point.gradient_difference < 1e-5


def test_a_batch_has_the_lengths_of_its_mix() -> None:
    for mix, quantiles in PAIR_LENGTHS.items():
        batch = model._packed_batch(mix, replace(TINY, batch_size=4000))
        lengths = batch["cu_seqlens"].diff().double()
        assert lengths.mean() == pytest.approx(sum(quantiles) / len(quantiles), rel=0.02)
        assert (int(lengths.min()), int(lengths.max())) == (quantiles[0], 128)
        share = (batch["labels"] != -100).double().mean()
        assert share == pytest.approx(0.15, abs=0.01)


def test_the_padded_form_holds_the_same_pairs() -> None:
    packed = model._packed_batch("sentences", TINY)
    padded = model._padded(packed)
    real = padded["attention_mask"].bool()
    for name in ("input_ids", "token_type_ids", "labels"):
        assert torch.equal(padded[name][real], packed[name][0])
    assert torch.equal(real.sum(1), packed["cu_seqlens"].diff().long())
    assert (padded["labels"][~real] == -100).all()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_forms_that_differ_are_not_timed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = model._loss_and_gradients

    def wrong(settings: ModelSettings, batch: model.Batch) -> tuple[float, torch.Tensor]:
        loss, gradients = real(settings, batch)
        if "cu_seqlens" in batch:
            return (loss * 1.001, gradients) if what == "loss" else (loss, gradients * 1.001)
        return loss, gradients

    monkeypatch.setattr(model, "_loss_and_gradients", wrong)
    with pytest.raises(WrongResultError, match=f"packed and padded pairs must have the same {what} to 1e-0"):
        benchmark_model(TINY)


def test_the_files_hold_what_was_measured(report: model.ModelReport, tmp_path: Path) -> None:
    paths = write_model_report(report, tmp_path)
    assert [path.name for path in paths] == ["model.json", "model.txt"]
    written = json.loads(paths[0].read_text())
    assert written["settings"]["batch_size"] == 6
    for result, point in zip(written["results"], report.points, strict=True):
        assert result["speedup"] == point.speedup
        assert result["padded"]["median_s"] == point.padded.median_s
        assert result["num_tokens"] < result["num_padded"]
    table = paths[1].read_text()
    assert table == model_as_text(report) + "\n"
    assert f"{report.points[0].speedup:.2f}x" in table


def test_softmax_can_be_measured_too() -> None:
    found = benchmark_model(replace(TINY, attention_type="softmax", mixes=("filled",), dtype="bfloat16", repeats=1))
    assert [point.mix for point in found.points] == ["filled"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixes": ("long",)}, "mixes must be of sentences, filled; got 'long'"),
        ({"arch": "t5"}, "arch must be of bert, gpt; got 't5'"),
        ({"lengths": (0,)}, "lengths must be whole numbers of at least 1"),
        ({"batch_size": 0}, "batch_size must be whole numbers of at least 1"),
        ({"num_heads": 3}, "num_heads must divide hidden_size; got 3 and 16"),
        ({"attention_type": "linear"}, "attention_type must be of cosine, softmax; got 'linear'"),
        ({"time_limit_s": 0.0}, "time_limit_s must be more than 0"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        replace(TINY, **changes)


def test_flags_become_settings_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--mixes", "filled", "--batch-size", "3", "--hidden-size", "16", "--num-layers", "1", "--num-heads", "2"]
    parsed = bench.build_parser().parse_args(["model", *flags]).model
    assert bench.model_settings_from(parsed) == ModelSettings(
        mixes=("filled",), batch_size=3, hidden_size=16, num_layers=1, num_heads=2
    )
    more = ["--lengths", "16", "--vocab-size", "50", "--repeats", "1", "--output-dir", str(tmp_path), "--json"]
    assert main(["bench", "model", *flags, *more]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["mix"] == "filled"
    assert (tmp_path / "model.json").is_file()
    assert main(["bench", "model", "--mixes", "none"]) == 2
    assert "mixes must be of sentences, filled; got 'none'" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [TINY, GPT], ids=lambda settings: settings.arch)
def test_the_softmax_twin_has_the_loss_and_the_gradients_of_transformers_model(settings: ModelSettings) -> None:
    batch = twins._rows(settings.lengths[-1], settings)
    twin = twins.new_model(settings, "softmax")
    loss, gradients = twins.loss_and_gradients(twin, batch)
    stock_loss, stock_gradients = twins.loss_and_gradients(twins._stock_model(settings, twin), batch)
    assert loss == pytest.approx(stock_loss, rel=1e-6)
    torch.testing.assert_close(gradients, stock_gradients, rtol=1e-4, atol=1e-6)
    assert loss != pytest.approx(twins.loss_and_gradients(twins.new_model(settings, "cosine"), batch)[0], rel=1e-6)


def test_a_gpt_is_measured_whole_at_every_length_beside_its_twins() -> None:
    found = benchmark_model(GPT)
    assert found.points == []
    names = ("cosine", "softmax", "transformers")
    assert [(twin.passes, twin.length, twin.name) for twin in found.twins] == [
        (passes, length, name) for length in (9, 64) for passes in ("forward", "step") for name in names
    ]
    assert {(twin.length, twin.num_rows) for twin in found.twins} == {(9, 85), (64, 12)}
    for twin, result in zip(found.twins, json.loads(json.dumps(found.to_dict()))["twins"], strict=True):
        assert len(twin.timing.samples_s) == 3
        assert twin.tokens_per_s == pytest.approx(twin.num_rows * twin.length / twin.timing.median_s)
        assert result["median_s"] == twin.timing.median_s
    rows = [line for line in model_as_text(found).splitlines() if line.startswith(("forward  ", "step  "))]
    assert [line.split()[:3] for line in rows[:4]] == [
        ["forward", "9", "85"],
        ["step", "9", "85"],
        ["forward", "64", "12"],
        ["step", "64", "12"],
    ]


def test_twins_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = twins.loss_and_gradients

    def wrong(one: torch.nn.Module, batch: twins.Batch) -> tuple[float, torch.Tensor]:
        loss, gradients = real(one, batch)
        return (loss if type(one).__name__.startswith("Cottention") else loss * 1.001), gradients

    monkeypatch.setattr(twins, "loss_and_gradients", wrong)
    with pytest.raises(WrongResultError, match="the softmax twin and transformers' model must have the same loss"):
        benchmark_model(GPT)


def test_processor_time_needs_one_thread_and_is_said_in_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(TINY, processor_time=True, mixes=("filled",), repeats=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SettingsError, match="processor_time needs one thread on a CPU"):
        benchmark_model(settings)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert "1 thread, processor time, torch" in model_as_text(benchmark_model(settings)).splitlines()[0]
