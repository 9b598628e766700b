"""GLUE's files: what is read from them in every layout, and what is said about one that is wrong."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard

from cottention.data.glue import find_glue_file, has_split, load_glue, task_folder
from cottention.data.glue_tasks import DIAGNOSTIC, GLUE_TASKS, GlueTask, glue_task
from cottention.errors import DataError, SettingsError
from tests.glue_files import write_glue

REAL_ROWS = {
    ("cola", "train"): 8551,
    ("cola", "dev"): 1043,
    ("sst2", "dev"): 872,
    ("mrpc", "train"): 3668,
    ("mrpc", "dev"): 408,
    ("qqp", "train"): 8999,
    ("qqp", "dev"): 1000,
    ("stsb", "train"): 5749,
    ("stsb", "dev"): 1500,
    ("mnli", "train"): 8999,
    ("mnli", "dev_matched"): 9815,
    ("qnli", "train"): 8999,
    ("qnli", "dev"): 5463,
    ("rte", "train"): 2490,
    ("rte", "dev"): 277,
    ("wnli", "train"): 635,
    ("wnli", "dev"): 71,
}


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


def one_file(folder: Path, content: str | bytes, name: str = "train.tsv") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def refusal(task: str, source: Path, split: str = "train", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_glue(glue_task(task), source, split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("task", GLUE_TASKS.values(), ids=GLUE_TASKS)
def test_every_task_is_read_from_its_official_layout(task: GlueTask, glue: Path) -> None:
    for split in ("train", *task.dev_splits):
        rows = load_glue(task, glue, split)
        assert rows.column_names == ["index", "first", "second", "label"]
        assert len(rows) == 16
        assert all(rows["first"])
        assert all(bool(second) == bool(task.second) for second in rows["second"])
        kind = float if task.is_regression else int
        assert {type(label) for label in rows["label"]} == {kind}
        if not task.is_regression:  # texts of class 1 end in "Union"
            assert rows["label"] == [i % task.num_labels for i in range(16)]
            assert [text.endswith("Union") for text in rows["first"]] == [label == 1 for label in rows["label"]]
    for split in task.test_splits:
        rows = load_glue(task, glue, split)
        assert rows.column_names == ["index", "first", "second"]
        assert rows["index"] == ["0", "1", "2", "3", "4"]
    assert load_glue(DIAGNOSTIC, glue, "test")["index"] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(("task", "split"), REAL_ROWS)
def test_the_real_files_have_their_rows(task: str, split: str, shared_dir: Path) -> None:
    rows = load_glue(glue_task(task), _real(shared_dir), split)
    assert len(rows) == REAL_ROWS[task, split]
    assert not any("\t" in text or "\n" in text for text in rows["first"][:500])


@pytest.mark.slow
def test_the_largest_real_file(shared_dir: Path) -> None:
    rows = load_glue(glue_task("sst2"), _real(shared_dir), "train")
    assert len(rows) == 67349
    assert sum(rows["label"]) == 37569  # the published number of positive phrases


def test_real_files_without_a_header(shared_dir: Path) -> None:
    rows = load_glue(glue_task("sst2"), _real(shared_dir) / "SST-2-sentences", "dev")
    assert rows[0] == {"index": "0", "first": "one long string of cliches", "second": "", "label": 0}
    assert len(rows) == 872
    cola = load_glue(glue_task("cola"), _real(shared_dir), "dev")[0]
    assert cola["first"] == "The sailors rode the breeze clear of the rocks."
    assert cola["label"] == 1


def _real(shared_dir: Path) -> Path:
    folder = shared_dir / "data/glue"
    if not folder.is_dir():
        pytest.skip("needs GLUE's files in shared/data/glue")
    return folder


def test_quotes_blank_lines_and_other_line_ends_are_text(tmp_path: Path) -> None:
    text = 'sentence\tlabel\n"an open quote\t1\r\nodd\x85\u2028 ends\t0\n\n'
    rows = load_glue(glue_task("sst2"), one_file(tmp_path / "sst2", "\ufeff" + text), "train")
    assert rows["first"] == ['"an open quote', "odd\x85\u2028 ends"]
    assert rows["label"] == [1, 0]


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)]
)
def test_compressed_files(suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    one_file(tmp_path, pack(b"sentence\tlabel\nfine\t1\n"), f"train.tsv{suffix}")
    assert load_glue(glue_task("sst2"), tmp_path, "train")["first"] == ["fine"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    for word in ("first", "second"):
        folder = one_file(tmp_path, f"sentence\tlabel\n{word}\t1\n")
        assert load_glue(glue_task("sst2"), folder, "train")["first"] == [word]


def test_folders_are_found_whatever_their_spelling(tmp_path: Path) -> None:
    folder = one_file(tmp_path / "sst_2", "sentence\tlabel\nfine\t1\n")
    assert task_folder(glue_task("sst2"), tmp_path) == folder
    assert task_folder(glue_task("sst2"), folder) == folder
    assert find_glue_file(glue_task("sst2"), tmp_path, "dev") is None
    assert has_split(glue_task("sst2"), tmp_path, "train")
    assert not has_split(glue_task("sst2"), tmp_path, "dev")
    assert not has_split(glue_task("rte"), tmp_path, "train")
    assert has_split(glue_task("sst2"), "hub", "dev")


@pytest.mark.parametrize(
    ("task", "content", "expected"),
    [
        (
            "sst2",
            "sentence\tlabel\nfine\t1\nno label\n",
            "line 3: 2 columns expected; got 1; --skip-malformed leaves such rows out",
        ),
        (
            "rte",
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tc\tentailment\n",
            "line 2: 4 columns expected; got 5; --skip-malformed leaves such rows out",
        ),
        ("sst2", "sentence\tlabel\nfine\t2\n", "line 2: the label must be one of 0, 1; got '2'"),
        (
            "rte",
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailed\n",
            "line 2: the label must be one of entailment, not_entailment; got 'entailed'",
        ),
        (
            "stsb",
            "sentence1\tsentence2\tscore\na\tb\t5.1\n",
            "line 2: the label must be a number from 0 to 5; got '5.1'",
        ),
        (
            "stsb",
            "sentence1\tsentence2\tscore\na\tb\tnan\n",
            "line 2: the label must be a number from 0 to 5; got 'nan'",
        ),
    ],
)
def test_a_wrong_row_is_named(task: str, content: str, expected: str, tmp_path: Path) -> None:
    assert refusal(task, one_file(tmp_path, content)) == f"{tmp_path / 'train.tsv'}, {expected}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", " holds no rows"),
        ("index\tsentence1\tsentence2\tlabel\n", " holds no rows"),
        (
            "sentence1\tsentnce2\tlabel\na\tb\tc\n",
            " has no column 'sentence2'; it has 'sentence1', 'sentnce2', 'label'",
        ),
        ("sentence1\tsentence2\na\tb\n", " has no column 'label'; it has 'sentence1', 'sentence2'"),
        ("one\ttwo\n", ", line 1: expected the columns' names, 'sentence1' among them; got 2 columns, first 'one'"),
        (b"index\tsentence1\tsentence2\tlabel\n0\t\xff\tb\tentailment\n", " is not UTF-8 text: invalid start byte"),
    ],
)
def test_a_wrong_file_is_named(content: str | bytes, expected: str, tmp_path: Path) -> None:
    assert refusal("rte", one_file(tmp_path, content)).startswith(f"{tmp_path / 'train.tsv'}{expected}")


def test_a_file_without_names_shows_the_layout_that_is_known(tmp_path: Path) -> None:
    said = refusal("cola", one_file(tmp_path, "fine\t1\n"))
    assert "or 4 (source, label, mark, sentence) columns without names; got 2 columns, first 'fine'" in said


def test_a_cut_compressed_file_is_named(tmp_path: Path) -> None:
    packed = gzip.compress(b"sentence\tlabel\n" + b"fine\t1\n" * 1000)
    assert "cannot read" in refusal("sst2", one_file(tmp_path, packed[:-20], "train.tsv.gz"))


def test_malformed_rows_are_left_out_and_counted_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("cottention"), "propagate", True)
    folder = one_file(tmp_path, "sentence\tlabel\nfine\t1\nbad\nworse\t1\t2\ndull\t0\n")
    rows = load_glue(glue_task("sst2"), folder, "train", skip_malformed=True)
    assert rows["first"] == ["fine", "dull"]
    # A logger that another test left without propagation is watched by pytest itself: the line then comes twice.
    assert set(caplog.messages) == {f"{folder / 'train.tsv'}: 2 malformed rows are left out, first in line 3"}


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert (
        refusal("sst2", tmp_path / "none")
        == f"no folder {tmp_path / 'none'} with GLUE's files; `hub` fetches them from the Hub"
    )
    assert refusal("sst2", tmp_path) == f"{tmp_path} has no folder SST-2, nor SST-2's files themselves"
    one_file(tmp_path, "sentence\tlabel\nfine\t1\n")
    said = f"{tmp_path} has no dev.tsv or validation.tsv (also .gz, .zst), the dev split of SST-2"
    assert refusal("sst2", tmp_path, "dev") == said
    with pytest.raises(SettingsError, match=r"task must be one of cola, sst2, .*; got 'sts-b'; did you mean 'stsb'"):
        glue_task("sts-b")


HUB = {
    "sst2": ("validation", {"sentence": ["fine", "dull"], "label": [1, 0], "idx": [0, 1]}),
    "mnli": (
        "validation_mismatched",
        {"premise": ["a"], "hypothesis": ["b"], "label": [2], "idx": [7]},
    ),
    "stsb": ("validation", {"sentence1": ["a"], "sentence2": ["b"], "label": [2.5], "idx": [0]}),
}


@pytest.mark.parametrize("task", HUB)
def test_the_hub_gives_the_same_columns(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    split, content = HUB[task]
    asked: list[Any] = []

    def load_dataset(*names: str, split: str) -> datasets.Dataset:
        asked.append((*names, split))
        return datasets.Dataset.from_dict(content)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_glue(glue_task(task), "hub", glue_task(task).dev_splits[-1])
    assert asked == [("nyu-mll/glue", task, split)]
    first, second = (key if key in content else "sentence" for key in ("premise", "hypothesis"))
    if task == "stsb":
        first, second = "sentence1", "sentence2"
    assert rows["first"] == content[first]
    assert rows["second"] == (content[second] if len(content) == 4 else ["", ""])
    assert rows["label"] == content["label"]
    assert rows["index"] == [str(number) for number in content["idx"]]
    assert load_glue(glue_task(task), "hub", glue_task(task).test_splits[0]).column_names == [
        "index",
        "first",
        "second",
    ]


def test_a_hub_out_of_reach_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^cannot fetch SST-2 from nyu-mll/glue on the Hugging Face Hub: .*$"):
        load_glue(glue_task("sst2"), "hub", "dev")
