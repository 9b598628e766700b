"""The small version of the whole study, by its command line: sweeps, seeds, tables, pictures, one cell again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cottention.benchmarks.quality.__main__ import main
from cottention.benchmarks.quality.cells import cells_like
from cottention.benchmarks.quality.texts import Text, open_text

_EXPERIMENTS = ("small", "small-mqar")


def _unigram_loss(text: Text, count: int) -> float:
    """Nats of a held-out token by the frequencies of the training text."""
    share = (np.bincount(text.train, minlength=text.vocab_size) + 1) / (len(text.train) + text.vocab_size)
    scored = np.concatenate([stream[1 : count + 1] for stream in text.held_out("score").values()])
    return float(-np.log(share[scored]).mean())


@pytest.mark.slow
def test_the_small_study_runs_from_nothing_and_repeats(
    shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["--lines", str(tmp_path / "lines")]
    files = ["--texts", str(shared_dir / "data" / "lm"), "--work", str(tmp_path / "work")]
    patterns = [f"{name}/*" for name in _EXPERIMENTS]
    for share in ("1/2", "2/2"):  # what waits for the other half's sweep is left
        assert main([*lines, "run", *files, "--share", share, *patterns]) == 0
    assert main([*lines, "run", *files, *patterns]) == 0
    texts = [(tmp_path / "lines" / f"{name}.jsonl").read_text() for name in _EXPERIMENTS]
    found = [json.loads(line) for line in "".join(texts).splitlines()]
    assert sorted(line["cell"] for line in found) == sorted(cell.name for cell in cells_like(patterns))
    losses = {line["cell"]: line["scores"]["loss"] for line in found}
    text = open_text(shared_dir / "data" / "lm", vocab_size=1024, work=tmp_path / "work")
    assert max(losses[name] for name in losses if "small/" in name and "seed" in name) < _unigram_loss(text, 8192)
    for line in found:
        assert line["environment"]["processor"]
        assert line["curve"][-1][1] < line["curve"][0][1]
    capsys.readouterr()
    assert main([*lines, "list", *patterns]) == 0
    assert "to run" not in capsys.readouterr().out
    assert main([*lines, "table", *_EXPERIMENTS]) == 0
    assert capsys.readouterr().out.count("| cosine") >= 4
    assert main([*lines, "plot", "--output", str(tmp_path / "plots")]) == 0
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["small-mqar.png", "small.png"]
    assert main([*lines, "repeat", *files, "small/softmax/seed-1"]) == 0
    assert "the same as its line" in capsys.readouterr().out


def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["--lines", str(tmp_path)]
    for arguments, told in (
        (["run", "--share", "3/2", "small/*"], "--share must be I/N with I from 1 to N, as in 1/2; got '3/2'"),
        (["repeat", "small/*"], "one cell is repeated at a time; 'small/*' are "),
        (["repeat", "small/cosine/seed-0"], "small/cosine/seed-0 has no line in "),
        (["run", "smal/cosine/seed-0"], "did you mean 'small/cosine/seed-0'?"),
    ):
        assert main([*lines, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert told in error
        assert error.count("\n") == 1
