"""`cottention compare`: a table and curves of runs, of which some are not finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cottention.cli.main import main
from cottention.training.comparing import read_run


def _run(directory: Path, losses: list[float], *, held_out: bool = True, model: bool = True) -> str:
    directory.mkdir()
    lines = []
    for number, loss in enumerate(losses, start=1):
        step = 10 * number
        lines.append({"step": step, "loss": loss, "tokens": 100 * step, "tokens_per_s": 50.0, "elapsed_s": 2.0 * step})
        if held_out:
            lines.append({"step": step, "tokens": 100 * step, "val_loss": loss + 0.5, "val_ppl": 7.0})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if model:
        (directory / "model").mkdir()
        save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, directory / "model/model.safetensors")
    return str(directory)


def test_the_table_says_where_each_run_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [_run(tmp_path / "one", [3.0, 2.0]), _run(tmp_path / "two", [3.0, 2.25], model=False)]
    assert main(["compare", *runs, "--json"]) == 0
    one, two = json.loads(capsys.readouterr().out)
    assert one == {
        "run": runs[0],
        "parameters": 17,
        "steps": 20,
        "tokens": 2000,
        "seconds": 40.0,
        "tokens_per_s": 50.0,
        "val_loss": 2.5,
        "val_ppl": 7.0,
        "val_nats_per_byte": None,
        "against_first": 0.0,
    }
    assert (two["parameters"], two["against_first"]) == (None, 0.25)
    assert main(["compare", *runs]) == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert "nats/byte" not in heading  # no run has it
    assert first.split()[1:] == ["17", "20", "2k", "40", "50", "2.500", "7.0", "+0.000"]
    assert second.split()[1] == "-"


def test_curves_have_held_out_losses_at_the_seconds_of_their_step(tmp_path: Path):
    run = read_run(_run(tmp_path / "run", [3.0, 2.0]))
    assert run.curve("tokens") == ((1000, 2000), (3.5, 2.5))
    assert run.curve("seconds") == ((20.0, 40.0), (3.5, 2.5))
    unscored = read_run(_run(tmp_path / "unscored", [3.0, 2.0], held_out=False))
    assert unscored.curve("tokens") == ((1000, 2000), (3.0, 2.0))


@pytest.mark.parametrize("name", ["curves.png", "curves.svg"])
def test_the_picture_is_of_the_kind_of_its_name(name: str, tmp_path: Path):
    run = _run(tmp_path / "run", [3.0, 2.0])
    assert main(["compare", run, run, "--plot", str(tmp_path / name)]) == 0
    start = (tmp_path / name).read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if name.endswith("png") else b"svg" in start


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no directory nowhere"),
        (["."], "is no run: it has no metrics.jsonl"),
        (["empty"], "metrics.jsonl has no line yet"),
        (["run", "--plot", "curves.gif"], "--plot must end in .png or .svg; got curves.gif"),
        (["run", "--plot", "no/such/dir.png"], "--plot"),
        ([], "run"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    _run(Path("run"), [1.0])
    Path("empty").mkdir()
    Path("empty/metrics.jsonl").touch()
    assert main(["compare", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
