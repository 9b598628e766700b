"""Vectors of alike texts become alike: the losses by their equations, and both ways of learning end to end."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from cottention.cli.main import main
from cottention.generation import embed_sentences, load_model_and_tokenizer
from cottention.training.similarity import PairCollator, similarity_loss
from tests.training.test_finetuning import save_bert

WORDS = ["the", "people", "of", "United", "States", "order", "form", "more", "perfect", "Union"]


def unit(seed: int) -> torch.Tensor:
    return normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_numbers_are_compared_with_cosines_from_0_to_1() -> None:
    first, second, scores = unit(0), unit(1), torch.tensor([1.0, 2.0, 3.0, 5.0])
    cosines = torch.stack([a @ b for a, b in zip(first, second, strict=True)])
    expected = ((cosines - torch.tensor([0, 0.25, 0.5, 1])) ** 2).mean()
    torch.testing.assert_close(similarity_loss(first, second, (1.0, 5.0), scores, None), expected)


def test_partners_are_told_apart_in_both_directions_and_equal_ones_are_no_rivals() -> None:
    first, second = unit(0), unit(1)
    rows = [{"first": [2, 3], "second": partner} for partner in ([2, 3], [2, 4], [2, 3], [2])]
    same = PairCollator(pad_token_id=0, packed=False)(rows)["same"]
    assert same.nonzero().tolist() == [[0, 2], [2, 0]]
    total = torch.zeros(())
    for one, other in ((first, second), (second, first)):
        for at in range(4):
            rivals = [by for by in range(4) if by == at or not same[at, by]]
            exponents = torch.stack([(one[at] @ other[by] / 0.05).exp() for by in rivals])
            total -= (exponents[rivals.index(at)] / exponents.sum()).log()
    torch.testing.assert_close(similarity_loss(first, second, None, None, same), total / 8)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.0)


def finetune(bert: Path, rows: list[dict[str, Any]], folder: Path, capsys: Any, *more: Any) -> dict[str, Any]:
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["finetune", "--model", bert, "--objective", "similarity", "--data", folder / "pairs.jsonl", "--json"]
    words += ["--text-column", "a", "--text-pair-column", "b", "--output-dir", folder / "run", "--max-length", 32]
    words += ["--batch-size", 16, "--learning-rate", 3e-3, *more]
    capsys.readouterr()
    assert main([*map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_pairs_with_numbers(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    rows = []
    for _ in range(96):
        one, other = (draw.choice(["people", "Union"]) for _ in range(2))
        a, b = (f"{draw.choice(WORDS[:3])} {word} {word}" for word in (one, other))
        rows.append({"a": a, "b": b, "alike": 4.0 if one == other else 1.0})
    found = finetune(bert, rows, tmp_path, capsys, "--label-column", "alike", "--epochs", 4)
    assert found["scale"] == [1.0, 4.0]
    first, *_, last = found["seeds"][0]["epochs"]
    assert last["train_loss"] < first["train_loss"] / 2
    assert found["best"]["score"] > 0.7
    model, tokenizer = load_model_and_tokenizer(tmp_path / "run/model", "encoder")
    alike = embed_sentences(
        model, tokenizer, ["the people people", "of people people", "of Union Union"], normalize=True
    )
    assert alike[0] @ alike[1] > alike[0] @ alike[2] + 0.3


def test_pairs_alone(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    texts = [draw.sample(WORDS, 3) for _ in range(80)]
    rows = [{"a": " ".join(words), "b": " ".join([*words[::-1], "in"])} for words in texts]
    found = finetune(bert, rows, tmp_path, capsys, "--epochs", 3, "--dev-share", 0.2, "--license", "mit")
    official = [epoch["splits"]["dev"]["official"] for epoch in found["seeds"][0]["epochs"]]
    assert found["scale"] is None
    assert max(each["reciprocal_rank"] for each in official) > 0.6  # of 16 at random: 0.21
    assert all(0 <= each["nearest_is_right"] <= each["reciprocal_rank"] <= 1 for each in official)
    card = (tmp_path / "run/model/README.md").read_text(encoding="utf-8")
    assert "AutoModel.from_pretrained" in card
    assert "| license of the weights | mit |" in card


def test_mistakes(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: Any) -> str:
        (tmp_path / "p.csv").write_text("a,b,n\nx,y,one\n")
        asked = ["finetune", "--model", bert, "--objective", "similarity", "--data", tmp_path / "p.csv", *words]
        assert main([*map(str, asked), "--output-dir", str(tmp_path / "o"), "--max-length", "32"]) == 2
        return capsys.readouterr().err.strip().partition(": error: ")[2]

    pair = ["--text-column", "a", "--text-pair-column", "b"]
    assert said() == "--objective similarity needs --text-pair-column: it learns from pairs of texts"
    assert (
        said(*pair, "--label-type", "several") == "--objective similarity takes one --label-column of numbers, or none"
    )
    assert said(*pair, "--label-column", "n") == f"{tmp_path / 'p.csv'}, row 1: the label must be a number; got 'one'"
    assert "are too few" in said(*pair)
    assert said("--task", "stsb").startswith("--objective similarity goes with rows of one's own")
