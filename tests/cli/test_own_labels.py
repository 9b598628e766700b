"""cottention finetune on rows of one's own, then classify: BERT and GPT, all kinds of labels, a user's mistakes."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import pipeline

from cottention.cli.main import main
from tests import tiny
from tests.training.test_finetuning import save_bert

WORDS = ["the", "people", "of", "United", "States", "in", "order", "to", "form", "a", "more", "perfect"]
QUICK = ["--max-length", 32, "--epochs", 2, "--batch-size", 8, "--learning-rate", 3e-3]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.0)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.gpt(dtype=torch.float32, std=0.02)
    return tiny.save(tmp_path_factory.mktemp("gpt"), model, tiny.bpe_tokenizer())


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .csv whose label is whether a word is there; a third of the rows have it."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "review", "mood"])
        for number in range(60):
            words = draw.sample(WORDS, 3) + ["Union" if number % 3 == 0 else "people"] * 2
            writer.writerow([number, " ".join(words), "glad" if number % 3 == 0 else "sad"])
    return path


@pytest.fixture(scope="module")
def moods(bert: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "moods"
    assert main([str(word) for word in [*command(bert, reviews, folder), "--epochs", 4]]) == 0
    return folder


def test_a_fine_tuned_model_has_a_card_with_its_scores(moods: Path, reviews: Path) -> None:
    card = (moods / "model/README.md").read_text(encoding="utf-8")
    metrics = json.loads((moods / "metrics.json").read_text())
    best = metrics["seeds"][0]["epochs"][metrics["best"]["epoch"] - 1]["splits"]["dev"]["official"]
    for name, value in best.items():
        assert f"| {name} | {value:.6g} |" in card
    assert "Measured on reviews.csv, 0.1 of the rows." in card
    assert 'AutoModelForSequenceClassification.from_pretrained(".")' in card
    assert "license of the weights" not in card


def test_a_card_of_a_fine_tuned_model_opens_it_wherever_it_lies(moods: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(moods / "model", tmp_path / "unpacked" / "elsewhere"))
    card = (moved / "README.md").read_text(encoding="utf-8")
    opened = re.search(r'AutoModelForSequenceClassification\.from_pretrained\("(.*)"\)  # in this directory', card)
    assert opened is not None
    assert (moved / opened[1] / "model.safetensors").is_file()
    assert str(moods) not in card, "a moved or published model tells nobody's paths"


def command(model: Path, data: Path, output: Path) -> list[Any]:
    return [
        *["finetune", "--model", model, "--data", data, "--text-column", "review", "--label-column", "mood"],
        *["--output-dir", output, *QUICK],
    ]


def run(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main([*map(str, words)]) == code
    return capsys.readouterr()


def mistake(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    out, err = run(capsys, *words, code=2)
    assert out == ""
    assert err.count(": error: ") == 1
    assert err.endswith("\n")
    return err.rstrip("\n").partition(": error: ")[2]


def json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def test_classes_are_learned_kept_in_the_config_and_given_to_new_rows(
    moods: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((moods / "model/config.json").read_text())
    assert config["id2label"] == {"0": "glad", "1": "sad"}
    assert config["label2id"] == {"glad": 0, "sad": 1}
    metrics = json.loads((moods / "metrics.json").read_text())
    assert metrics["labels"] == {"kind": "classes", "names": ["glad", "sad"]}
    assert metrics["num_rows"] == {"train": 54, "dev": 6}
    dev = metrics["seeds"][0]["epochs"][metrics["best"]["epoch"] - 1]["splits"]["dev"]
    assert [sum(row) for row in dev["confusion"]] == [2, 4]  # each label's share
    with reviews.open() as file:
        rows = list(csv.DictReader(file))
    words = ["classify", "--model", moods / "model", reviews, "--text-column", "review"]
    out, _ = run(capsys, *words)
    printed = json_lines(out)
    assert [row["text"] for row in printed] == [row["review"] for row in rows]
    right = [found["label"] == row["mood"] for found, row in zip(printed, rows, strict=True)]
    assert sum(right) >= 55
    assert all(0.5 <= row["score"] <= 1 for row in printed)
    # Written, in batches of another size, as cells: the same.
    assert run(capsys, *words, "--output", tmp_path / "moods.csv", "--batch-size", 7)[0] == ""
    with (tmp_path / "moods.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["label"] for row in written] == [row["label"] for row in printed]
    assert [float(row["score"]) for row in written] == pytest.approx([row["score"] for row in printed], abs=1e-5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["moods.csv"]
    # transformers says the same of the same directory.
    said: Any = pipeline("text-classification", model=str(moods / "model"))
    again = said([row["text"] for row in printed[:5]])
    assert [each["label"] for each in again] == [row["label"] for row in printed[:5]]
    assert [each["score"] for each in again] == pytest.approx([row["score"] for row in printed[:5]], abs=1e-4)


def test_the_report_and_a_run_that_is_done(
    bert: Path, moods: Path, reviews: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = run(capsys, *command(bert, reviews, moods), "--epochs", 4)
    assert "seed 0 is done already" in err
    assert "no --dev: 6 of 60 rows (seed 0, with each label's share in both) are held out to measure on" in err
    assert out.startswith("label  predicted\n")
    assert "reviews.csv: dev macro_f1 1.0000, accuracy 1.0000 (seed 0, epoch " in out
    assert out.endswith(f"next: cottention classify --model {moods / 'model'} FILE\n")
    said = mistake(capsys, *command(bert, reviews, moods), "--epochs", 3)
    assert "holds a run of other settings: epochs (4 there, 3 now)" in said


def test_a_gpt_reads_texts_with_their_end_and_says_so_in_its_tokenizer(
    gpt: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(capsys, *command(gpt, reviews, tmp_path / "run"))
    assert "macro_f1" in out
    out, _ = run(capsys, "classify", "--model", tmp_path / "run/model", reviews, "--text-column", "review")
    printed = json_lines(out)
    said: Any = pipeline("text-classification", model=str(tmp_path / "run/model"))
    again = said([row["text"] for row in printed[:3]])
    assert [each["score"] for each in again] == pytest.approx([row["score"] for row in printed[:3]], abs=1e-4)
    assert said.tokenizer("a", "b")["input_ids"][-1] == said.tokenizer.eos_token_id
    assert said.tokenizer.model_max_length == 32


def test_numbers_several_labels_pairs_and_a_dev_file(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"a": f"the people {'Union ' * (n % 3)}", "b": "order", "score": n % 3 + 0.5} for n in range(24)]
    for name, part in {"train": rows[:18], "dev": rows[18:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    own = ["--model", bert, "--data", tmp_path / "train.jsonl", "--dev", tmp_path / "dev.jsonl", *QUICK]
    pairs = ["--text-column", "a", "--text-pair-column", "b"]
    where = ["--label-column", "score", "--output-dir", tmp_path / "n", "--json"]
    found = json.loads(run(capsys, "finetune", *own, *pairs, *where)[0])
    assert found["labels"] == {"kind": "number", "names": ["score"]}
    assert found["num_rows"] == {"train": 18, "dev": 6}
    words = ["classify", "--model", tmp_path / "n/model", tmp_path / "dev.jsonl", *pairs]
    first = json_lines(run(capsys, *words)[0])[0]
    assert first.keys() == {"text", "text_pair", "label", "score"}
    assert (first["label"], first["text_pair"]) == ("score", "order")
    for row in rows:
        row["kinds"] = ["x"] * (row["score"] > 1) + ["y"] * (row["score"] > 2)
    (tmp_path / "kinds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = ["--model", bert, "--data", tmp_path / "kinds.jsonl", "--text-column", "a", "--label-column", "kinds"]
    found = json.loads(run(capsys, "finetune", *own, "--output-dir", tmp_path / "s", "--json", *QUICK)[0])
    assert found["labels"] == {"kind": "several", "names": ["x", "y"]}
    words = [
        "classify",
        "--model",
        tmp_path / "s/model",
        tmp_path / "kinds.jsonl",
        "--text-column",
        "a",
        "--all-scores",
    ]
    for row in json_lines(run(capsys, *words)[0]):
        assert row["label"] == [name for name, score in row["scores"].items() if score > 0.5]
        assert row["score"] == [row["scores"][name] for name in row["label"]]


@pytest.mark.parametrize("family", ["bert", "gpt"])
def test_tags_of_words(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    draw = random.Random(1)
    texts = [draw.sample([*WORDS[:4], "Union", "Union"], 5) for _ in range(32)]
    lines = ["".join(f"{word} X {'B-U' if word == 'Union' else 'O'}\n" for word in words) for words in texts]
    (tmp_path / "train.conll").write_text("\n".join(lines))
    own = ["--model", model, "--data", tmp_path / "train.conll", "--output-dir", tmp_path / "t", *QUICK]
    own += ["--epochs", 8, "--learning-rate", 1e-2]
    found = json.loads(run(capsys, "finetune", *own, "--json")[0])
    assert found["labels"] == {"kind": "words", "names": ["B-U", "O"]}
    (tmp_path / "new.txt").write_text("the Union of people\n" + "order " * 60 + "\n")
    words = ["classify", "--model", tmp_path / "t/model", tmp_path / "new.txt"]
    out, err = run(capsys, *words)
    short, long = json_lines(out)
    assert short["tokens"] == ["the", "Union", "of", "people"]
    assert short["label"] == ["O", "B-U", "O", "O"]
    assert len(long["tokens"]) == len(long["label"]) == len(long["score"]) == 60
    assert long["label"][-1] is long["score"][-1] is None
    assert "1 of 2 rows are longer than 32 tokens and were cut" in err
    run(capsys, *words, "--output", tmp_path / "new.conll")
    assert (tmp_path / "new.conll").read_text().startswith("the\tO\nUnion\tB-U\nof\tO\npeople\tO\n\norder\tO\n")


def test_lines_of_stdin_and_rows_without_text(
    moods: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"the people\n\nUnion Union of Union\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(text))))  # type: ignore
    out, err = run(capsys, "classify", "--model", moods / "model", "-")
    rows = json_lines(out)
    assert [row["label"] for row in rows] == ["sad", None, "glad"]
    assert rows[1] == {"text": None, "label": None, "score": None}
    assert "1 rows have no text and get no label; the first is stdin, line 2" in err


def test_mistakes(bert: Path, moods: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: Any) -> str:
        return mistake(capsys, "finetune", "--model", bert, *QUICK, "--output-dir", tmp_path / "o", *words)

    own = ["--text-column", "review", "--label-column", "mood"]
    assert said() == "give --data FILE with rows of your own, or --task with a task of GLUE"
    assert said("--task", "cola", "--dev", reviews).startswith("--dev goes with rows of one's own, --task with GLUE's")
    assert said("--data", reviews) == f"{reviews}: no column 'text'; it has 'id', 'review', 'mood'"
    assert said("--data", reviews, "--text-column", "review", "--label-column", "moood") == (
        f"{reviews}: no column 'moood'; it has 'id', 'review', 'mood'; did you mean 'mood'?"
    )
    assert said("--data", tmp_path).startswith(f"--data: {tmp_path} is a folder; a file of rows is expected")
    assert said("--data", reviews, "--dev", "dev.csv", *own).startswith("--dev: no such file: dev.csv")
    (tmp_path / "dev.csv").write_text("review,mood\nthe people,sadd\n")
    assert said("--data", reviews, "--dev", tmp_path / "dev.csv", *own) == (
        f"{tmp_path / 'dev.csv'}, row 1: the label 'sadd' is none of those trained on (glad, sad); did you mean 'sad'?"
    )
    (tmp_path / "one.csv").write_text("review,mood\na,x\nb,x\nc,x\n")
    assert "every row has the label 'x' in 'mood': there is nothing to tell apart" in said(
        "--data", tmp_path / "one.csv", *own
    )
    (tmp_path / "empty.csv").write_text("")
    assert said("--data", tmp_path / "empty.csv", *own) == f"{tmp_path / 'empty.csv'} holds no rows"
    assert said("--data", reviews, "--dev-share", 2, *own) == "dev_share must lie between 0 and 1; got 2.0"
    assert not (tmp_path / "o").exists()
    label = ["classify", "--model", moods / "model"]
    assert mistake(capsys, *label, reviews) == f"{reviews}: no column 'text'; it has 'id', 'review', 'mood'"
    nowhere = mistake(capsys, *label, reviews, "--output", tmp_path / "no/a.csv")
    assert nowhere == f"--output: cannot write {tmp_path / 'no/a.csv'}: No such file or directory"
    assert (
        mistake(capsys, *label, reviews, "--output", "a.txt")
        == "--output must end in .jsonl, .csv, .conll; got 'a.txt'"
    )
    asked = mistake(capsys, "classify", "--model", bert, reviews, "--text-column", "review")
    assert asked == f"{bert} has no classifier; fine-tune it first: cottention finetune"
    broken = tmp_path / "broken.csv"
    broken.write_text("review\nthe people\n" + "a,b\n")
    output = tmp_path / "out.jsonl"
    asked = mistake(capsys, *label, broken, "--text-column", "review", "--output", output)
    assert asked.startswith(f"{broken}, row 2 (line 3): 1 cells expected")
    assert not output.exists()
    run(capsys, *label, broken, "--text-column", "review", "--output", output, "--skip-malformed")
    assert len(json_lines(output.read_text())) == 1


def test_the_end_of_a_labelling_says_how_many_rows_were_written(
    moods: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["classify", "--model", moods / "model", reviews, "--text-column", "review"]
    _, err = run(capsys, *words)
    assert err.endswith("60 rows labelled\n")
    _, err = run(capsys, *words, "--output", tmp_path / "labels.csv")
    assert err.endswith(f"60 rows labelled: {tmp_path / 'labels.csv'}\n")
