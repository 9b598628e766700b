"""The benchmark of transformers' gated delta layers from flags to files, at the smallest sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.benchmarks import gated_delta
from cottention.benchmarks.check import WrongResultError
from cottention.benchmarks.gated_delta import GatedDeltaSettings, benchmark_gated_delta, main
from cottention.errors import SettingsError

pytest.importorskip("transformers.models.qwen3_5")
TINY: dict[str, Any] = {
    "num_tokens": 6,
    "hidden_size": 64,
    "num_layers": 1,
    "num_key_heads": 1,
    "num_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 20,
    "repeats": 3,
}


@pytest.fixture(autouse=True)
def _without_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    if gated_delta.importlib.util.find_spec("fla") is not None:
        pytest.skip("flash-linear-attention is installed: transformers would call its kernels")


def test_every_work_is_timed_by_both_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    assert main([*flags, f"--output-dir={tmp_path / 'out'}"]) == 0
    data = json.loads((tmp_path / "out" / "gated_delta.json").read_text())
    text = (tmp_path / "out" / "gated_delta.txt").read_text()
    assert text == capsys.readouterr().out
    works = [each["work"] for each in data["results"]]
    assert works[:3] == ["prefill", "decoded token", "step of training"]
    assert len(works) == 6
    for each in data["results"]:
        assert each["work"] in text
        assert len(each["stock"]["samples_s"]) == len(each["ours"]["samples_s"]) == 3
        assert each["speedup"] == pytest.approx(each["stock"]["median_s"] / each["ours"]["median_s"])
    assert data["loss_difference"] < 1e-5
    assert data["gradient_difference"] < 1e-4


def test_models_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = gated_delta.accelerate_gated_delta

    def slightly_wrong(model: Any) -> Any:
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        return ours(model)

    monkeypatch.setattr(gated_delta, "accelerate_gated_delta", slightly_wrong)
    with pytest.raises(WrongResultError, match="both models must have the same"):
        benchmark_gated_delta(GatedDeltaSettings(**TINY))


def test_wrong_settings_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--num-key-heads=3"]) == 2
    assert capsys.readouterr().err == "num_key_heads must divide num_value_heads; got 3 and 8\n"
    with pytest.raises(SettingsError, match="num_tokens must be above 0; got 0"):
        GatedDeltaSettings(num_tokens=0)
    monkeypatch.setattr(gated_delta.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(SettingsError, match="flash-linear-attention must not be installed"):
        benchmark_gated_delta(GatedDeltaSettings(**TINY))
