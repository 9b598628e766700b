"""The quickstart's blocks: the recommended one unless the published one is asked for; trigrams beside both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.cli import main as cli
from cottention.cli import quickstart as command
from cottention.data.tokenization import tokenize_documents
from cottention.errors import SettingsError
from cottention.evaluation import TrigramModel
from cottention.generation import load_model_and_tokenizer
from cottention.training import time_budget
from cottention.training.documents import open_documents
from cottention.training.pretraining import build_model
from cottention.training.quickstart import QuickstartSettings, run_quickstart
from cottention.training.recipe_files import replace_settings
from tests.training.helpers import tiny_recipe

PARTS = {"short_conv": 4, "output_norm": True, "output_gate": "silu"}
MEMORY = {"decay": "data", "erase": True, "divisor": "none"}
NONE = {
    "short_conv": None,
    "output_norm": False,
    "output_gate": None,
    "decay": "none",
    "erase": False,
    "divisor": "key",
}


def _built(**settings: Any) -> tuple[int, dict[str, Any]]:
    with torch.device("meta"):
        model = build_model(QuickstartSettings(**settings).recipe())
    return sum(each.numel() for each in model.parameters()), {name: getattr(model.config, name) for name in NONE}


def test_the_recommended_block_is_trained_unless_another_is_asked_for() -> None:
    assert _built()[1] == PARTS | MEMORY
    assert _built(attention_type="softmax")[1] == NONE | PARTS
    assert _built(block="published")[1] == NONE
    assert _built(block="published", attention_type="softmax")[1] == NONE


@pytest.mark.parametrize("block", ["recommended", "published"])
def test_twins_are_of_one_size(block: str) -> None:
    assert _built(block=block)[0] == pytest.approx(_built(block=block, attention_type="softmax")[0], rel=0.01)


def test_each_block_has_a_directory_of_its_own() -> None:
    kinds = [
        QuickstartSettings(block=block, attention_type=kind).output_dir  # pyright: ignore[reportArgumentType]
        for block in ("recommended", "published")
        for kind in ("cosine", "softmax")
    ]
    assert kinds[0] == "runs/quickstart-gpt"
    assert kinds[2] == "runs/quickstart-gpt-published"
    assert len(set(kinds)) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": "best"}, r"^block must be one of recommended, published; got 'best'$"),
        ({"block": "published", "arch": "bert"}, r"^block is a GPT's; got 'published' with arch='bert'$"),
    ],
)
def test_a_block_that_there_is_not_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        QuickstartSettings(**settings)


def test_the_table_has_trigrams_of_the_same_text(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace_settings(tiny_recipe("gpt", corpus), {"training.max_steps": 2})
    monkeypatch.setattr(time_budget, "fit_to_time", lambda recipe, _text, *, budget_s: recipe)
    monkeypatch.setattr(QuickstartSettings, "recipe", lambda _settings: recipe)
    report = run_quickstart(QuickstartSettings(), output_dir=tmp_path)
    assert report.model_dir is not None
    tokenizer: Any = load_model_and_tokenizer(report.model_dir, "causal-lm")[1]
    train, held_out = (tokenize_documents(rows, tokenizer) for rows in open_documents(recipe.data, seed=0))
    model = TrigramModel.fit(train, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    assert report.trigram == model.score(held_out).to_dict()
    assert report.trigram["num_tokens"] == report.scores["model"]["num_tokens"]
    assert cli.main(["quickstart", "--output-dir", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = ["trigram", "counts", "(Kneser-Ney)", f"{report.trigram['perplexity']:.1f}"]
    assert row in [line[:4] for line in lines]


def test_the_command_asks_for_a_block(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.build_parser().parse_args(["--block", "published"]).block == "published"
    assert cli.main(["quickstart", "--block", "publishd"]) == 2
    assert "--block must be one of recommended, published; got 'publishd'; did you mean" in capsys.readouterr().err


@pytest.mark.slow
def test_half_a_minute_ends_in_its_time_and_beats_unigram_counts(tmp_path: Path) -> None:
    report = run_quickstart(QuickstartSettings(minutes=0.5), output_dir=tmp_path)
    assert 20 < report.training_s < 35
    assert report.scores["model"]["nats_per_byte"] < report.scores["unigram"]["nats_per_byte"]
