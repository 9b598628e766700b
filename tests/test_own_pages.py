"""The commands of the pages on own labels do what the page says, typed as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from cottention.cli.main import main
from tests.training.test_finetuning import save_bert

_DOCS = Path(__file__).resolve().parents[1] / "docs"
_QUICK = ["--epochs", "1", "--batch-size", "8"]  # what a test leaves out of a page's defaults: time


def commands_of(page: str) -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", (_DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("cottention ")]
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.slow
def test_the_commands_on_own_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_bert(Path("runs/bert/model"), max_position_embeddings=128)
    moods = "".join(
        f'{n},"the people, {"Union" if n % 2 else "order"}",{"glad" if n % 2 else "sad"}\n' for n in range(20)
    )
    Path("reviews.csv").write_text(f"id,review,mood\n{moods}")
    Path("new.csv").write_text("review\nthe Union\norder\n")
    pairs = "".join(f"the people\torder {n}\t{n % 2}\n" for n in range(20))
    Path("pairs.tsv").write_text(f"question\tanswer\tfits\n{pairs}")
    Path("prices.csv").write_text("advert,price\n" + "".join(f"the {n},{n}\n" for n in range(20)))
    films = [{"plot": f"the people {n}", "genres": ["a"] * (n % 2) + ["b"] * (n % 3 > 0)} for n in range(20)]
    Path("films.jsonl").write_text("\n".join(map(json.dumps, films)))
    Path("names.conll").write_text("Union B-ORG\nof O\n\n" * 20)
    Path("sentences.txt").write_text("the Union\norder\n")
    given = commands_of("own-labels.md")
    assert len(given) == 9
    for words in given:
        quick = _QUICK if words[0] == "finetune" else []
        assert main([*words, *quick]) == 0, words
    assert len(Path("moods.jsonl").read_text().splitlines()) == 2
    assert len(Path("fits.csv").read_text().splitlines()) == 21
    assert Path("tagged.conll").read_text().startswith("the\t")


@pytest.mark.slow
def test_the_commands_on_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_bert(Path("runs/bert/model"), max_position_embeddings=128)
    notes = [f"the people {'order ' * n}" for n in range(12)]
    Path("notes.txt").write_text("\n".join(notes))
    Path("notes.csv").write_text("number,note\n" + "".join(f"{n},{note}\n" for n, note in enumerate(notes)))
    Path("pairs.tsv").write_text(
        "question\tanswer\n" + "".join(f"{note}\tthe {n}\n" for n, note in enumerate(notes * 3))
    )
    scores = "".join(f"{note}\tthe people\t{n}.5\n" for n, note in enumerate(notes * 3))
    Path("sts.tsv").write_text(f"sentence1\tsentence2\tscore\n{scores}")
    given = commands_of("embeddings.md")
    assert len(given) == 8
    for words in given:
        if ">" in words:  # what a shell does
            words = words[: words.index(">")]
        assert main([*words, *(_QUICK if words[0] == "finetune" else [])]) == 0, words
    assert all(Path(name).stat().st_size for name in ("vectors.npy", "notes.parquet", "alike.parquet"))
