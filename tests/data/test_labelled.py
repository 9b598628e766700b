"""Labels of one's own: what they are, what is held out, and what is refused, by its row."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cottention.data.labelled import held_out_rows, hold_out, labels_of, read_labelled, with_labels
from cottention.data.tagged import read_tagged, tags_of, with_tags
from cottention.errors import CottentionError, DataError, SettingsError


def rows(path: Path, labels: list[Any], **fields: Any) -> Path:
    texts = [f"text {number}" for number in range(len(labels))]
    lines = [json.dumps({"text": text, "label": label, **fields}) for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(lines))
    return path


def kind(folder: Path, labels: list[Any], asked: str = "auto", **options: Any) -> Any:
    path = rows(folder / "rows.jsonl", labels)
    raw = read_labelled(path, text="text", label=["label"], **options)
    return labels_of(raw, "F", kind=asked, label=["label"], listed="separator" in options)


def refusal(kind_of_error: type[CottentionError], work: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(kind_of_error) as caught:
        work(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["pos", "neg", "pos"], ("classes", ("neg", "pos"))),
        ([10, 9, 10], ("classes", ("9", "10"))),
        ([True, False], ("classes", ("false", "true"))),
        ([0.5, 1, 2], ("number", ("label",))),
        (list(range(30)), ("number", ("label",))),
        ([["a", "b"], [], ["a"]], ("several", ("a", "b"))),
        (["1", "2", "x"], ("classes", ("1", "2", "x"))),
    ],
)
def test_what_labels_are_is_told_by_the_column(labels: list[Any], expected: Any, tmp_path: Path) -> None:
    found = kind(tmp_path, labels)
    assert (found.kind, found.names) == expected


def test_what_labels_are_can_be_said(tmp_path: Path) -> None:
    assert kind(tmp_path, [1, 2, 1], "number").kind == "number"
    assert kind(tmp_path, [0.5, 1.5, 0.5], "classes").names == ("0.5", "1.5")
    assert kind(tmp_path, ["a;b", "b", ""], separator=";").names == ("a", "b")
    said = refusal(DataError, kind, tmp_path, ["1", "one"], "number")
    assert said == "F, row 2: the label must be a number; got 'one'"
    said = refusal(SettingsError, kind, tmp_path, [["a"], ["a", "b"]], "classes")
    assert said == "the column 'label' holds several labels to a row; --label-type several takes them"


def test_columns_of_zeros_and_ones_are_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,sad,long\na,1,0\nb,0,0\nc,true,1\n")
    raw = read_labelled(path, text="text", label=["sad", "long"])
    labels = labels_of(raw, path, label=["sad", "long"], listed=False)
    assert with_labels(raw, labels, path)["label"][:] == [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    path.write_text("text,sad,long\na,2,0\n")
    assert "'sad' must be 0 or 1; got '2'" in refusal(
        DataError, read_labelled, path, text="text", label=["sad", "long"]
    )


def test_labels_that_teach_nothing(tmp_path: Path) -> None:
    assert refusal(DataError, kind, tmp_path, ["a"] * 5) == (
        "F: every row has the label 'a' in 'label': there is nothing to tell apart"
    )
    assert (
        refusal(DataError, kind, tmp_path, [1.5] * 5) == "F: every row has the number 1.5 in 'label': nothing to learn"
    )
    assert "30 different labels in 30 rows" in refusal(DataError, kind, tmp_path, [f"row {n}" for n in range(30)])


def test_rows_without_text_or_label(tmp_path: Path, log_lines: list[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,x\n ,y\nc,\nd,y\n")
    said = refusal(DataError, read_labelled, path, text="text", label=["label"])
    assert said == f"{path}, row 2 (line 3): no text in 'text'; --skip-malformed leaves such rows out"
    raw = read_labelled(path, text="text", label=["label"], skip_malformed=True)
    assert raw["number"][:] == [1, 4]
    assert any("2 malformed rows are left out" in line for line in log_lines)


def test_a_label_that_was_not_trained_on_is_told_by_its_row(tmp_path: Path) -> None:
    labels = kind(tmp_path, ["neutral", "pos"])
    raw = read_labelled(rows(tmp_path / "dev.jsonl", ["pos", "neutrl"]), text="text", label=["label"])
    assert refusal(DataError, with_labels, raw, labels, "dev.jsonl") == (
        "dev.jsonl, row 2: the label 'neutrl' is none of those trained on (neutral, pos); did you mean 'neutral'?"
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=200), st.floats(0.05, 0.5), st.integers(0, 3))
def test_every_group_keeps_its_share_and_a_row_to_train_on(groups: list[int], share: float, seed: int) -> None:
    array = np.array(groups)
    held = held_out_rows(array, share=share, seed=seed)
    assert held.tolist() == held_out_rows(array, share=share, seed=seed).tolist()
    counts, taken = Counter(groups), Counter(array[held].tolist())
    for group, count in counts.items():
        assert taken[group] <= count - 1
        assert abs(taken[group] - count * share) <= 1
    if all(count > 1 for count in counts.values()):
        assert len(held) in (max(1, round(len(groups) * share)), sum(count - 1 for count in counts.values()))


def test_a_share_is_held_out_by_label_and_by_size(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", ["rare"] * 10 + ["common"] * 90)
    raw = read_labelled(path, text="text", label=["label"])
    labels = labels_of(raw, path, label=["label"], listed=False)
    train, dev = hold_out(raw, labels, share=0.2, seed=0)
    assert Counter(names[0] for names in dev["labels"]) == {"rare": 2, "common": 18}
    assert sorted([*train["number"], *dev["number"]]) == list(range(1, 101))
    path = rows(tmp_path / "b.jsonl", [number / 2 for number in range(100)])
    raw = read_labelled(path, text="text", label=["label"])
    _, dev = hold_out(raw, labels_of(raw, path, label=["label"], listed=False), share=0.1, seed=0)
    assert [int(float(names[0]) // 5) for names in dev["labels"]] == list(range(10))
    few = read_labelled(rows(tmp_path / "c.jsonl", ["a", "b"]), text="text", label=["label"])
    said = refusal(DataError, hold_out, few, labels_of(few, "", label=["label"], listed=False), share=0.1, seed=0)
    assert said == "2 rows are too few to hold some out; give others with --dev"


CONLL = "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\n# comment\nBlackburn NNP B-PER\n"


def test_lines_of_words_and_rows_with_lists_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text(CONLL)
    lists = tmp_path / "a.jsonl"
    lists.write_text(
        '{"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}\n{"tokens": ["Blackburn"], "tags": ["B-PER"]}\n'
    )
    found = [read_tagged(each, words="tokens", tags="tags") for each in (path, lists)]
    assert found[0].to_dict() == found[1].to_dict()
    names = tags_of(found[0], path)
    assert names == ("B-ORG", "B-PER", "O")
    assert with_tags(found[0], names, path)["label"][:] == [[0, 2], [1]]
    assert refusal(DataError, with_tags, found[0], names[1:], "F") == (
        "F, text 1: the tag 'B-ORG' is none of those trained on (B-PER, O); did you mean 'B-PER'?"
    )


def test_faults_of_tagged_words(tmp_path: Path) -> None:
    def said(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        message = refusal(DataError, read_tagged, tmp_path / name, words="tokens", tags="tags")
        return message.replace(str(tmp_path / name), "F")

    assert said("a.conll", "EU B-ORG\nrejects\n") == "F, line 2: a word and its tag expected; got 'rejects'"
    assert said("b.conll", "\n\n") == "F holds no words"
    assert said("a.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}') == (
        "F, line 1: a tag for each word expected; got 2 words and 1 tags; --skip-malformed leaves such rows out"
    )
    assert said("b.jsonl", '{"tokens": "a b", "tags": ["O"]}').startswith(
        "F, line 1: 'tokens' must hold a list of texts"
    )
    assert said("a.csv", "tokens,tags\na,O\n").startswith("F has no lists of words; .jsonl and .parquet do")
