"""GLUE in the official files' format, a few rows of each task, with something to learn: "good" texts are of class 1.

write_glue(tmp_path, num_rows=16)
"""

from __future__ import annotations

import random
from pathlib import Path

_WORDS = ("the", "people", "of", "states", "in", "order", "a", "more", "perfect")
_HEADERS = {
    "SST-2": "sentence\tlabel",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
    "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
    "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
    "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
    "QNLI": "index\tquestion\tsentence\tlabel",
    "RTE": "index\tsentence1\tsentence2\tlabel",
    "WNLI": "index\tsentence1\tsentence2\tlabel",
}
_CLASSES = {
    "MNLI": ("entailment", "neutral", "contradiction"),
    "QNLI": ("entailment", "not_entailment"),
    "RTE": ("entailment", "not_entailment"),
}
FOLDERS = ("CoLA", *_HEADERS)


def write_glue(folder: Path, *, num_rows: int = 16, tests: bool = True) -> Path:
    """Write all nine tasks with train, dev and, unless told otherwise, test files; MNLI mismatched and AX too."""
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
        devs = ("dev_matched", "dev_mismatched") if name == "MNLI" else ("dev",)
        for number, split in enumerate(("train", *devs)):
            write_split(folder / name / f"{split}.tsv", name, num_rows, seed=number)
        if tests:
            for split in ("test_matched", "test_mismatched") if name == "MNLI" else ("test",):
                _write_test(folder / name / f"{split}.tsv", name)
    if tests:
        (folder / "AX").mkdir()
        _write_test(folder / "AX/AX.tsv", "AX")
        (folder / "AX/AX.tsv").rename(folder / "AX/test.tsv")
    return folder


def write_split(path: Path, name: str, num_rows: int, seed: int = 0) -> Path:
    """Write one labelled file."""
    source = random.Random(f"{name}{seed}")
    lines = [_HEADERS[name]] if name in _HEADERS else []
    for index in range(num_rows):
        label = index % len(_CLASSES.get(name, "01"))
        first, second = _text(source, marked=label == 1), _text(source, marked=label == 1)
        shown = _CLASSES[name][label] if name in _CLASSES else str(label)
        lines.append(_LINES.get(name, _pair)(index, first, second, shown))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _write_test(path: Path, name: str, num_rows: int = 5) -> None:
    source = random.Random(name)
    one = name in ("CoLA", "SST-2")
    columns = {"MRPC": "#1 String\t#2 String", "QQP": "question1\tquestion2", "QNLI": "question\tsentence"}
    header = "index\t" + ("sentence" if one else columns.get(name, "sentence1\tsentence2"))
    texts = ["\t".join(_text(source) for _ in range(1 if one else 2)) for _ in range(num_rows)]
    path.write_text("\n".join([header, *(f"{i}\t{text}" for i, text in enumerate(texts))]) + "\n", encoding="utf-8")


def _text(source: random.Random, marked: bool = False) -> str:
    words = source.choices(_WORDS, k=source.randint(2, 7))
    return " ".join([*words, "Union"] if marked else words)


def _pair(index: int, first: str, second: str, label: str) -> str:
    return f"{index}\t{first}\t{second}\t{label}"


_LINES = {
    "CoLA": lambda index, first, second, label: f"gj04\t{label}\t*\t{first}",
    "SST-2": lambda index, first, second, label: f"{first}\t{label}",
    # A quote that is never closed: no quoting in these files.
    "MRPC": lambda index, first, second, label: f'{label}\t{index}\t{index}\t" {first}\t{second}',
    "QQP": lambda index, first, second, label: f"{index}\t1\t2\t{first}\t{second}\t{label}",
    "STS-B": lambda index, first, second, label: (
        f"{index}\tg\tf\t2012\t0\tnone\tnone\t{first}\t{second}\t{4.5 if label == '1' else 0.5 + index % 3 / 10:.3f}"
    ),
    "MNLI": lambda index, first, second, label: f"{index}\t1\t1e\tg\t{first}\t{second}\t{label}\t{label}",
}
