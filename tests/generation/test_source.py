"""A path or a Hub name becomes a directory; the Hub is asked once, for what is needed, and its refusal is one line."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from cottention.convert import convert_official
from cottention.errors import CheckpointError
from cottention.generation.source import resolve_directory
from tests.models.helpers import FIXTURES

NAME = "somebody/a-model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hub that answers with `hub["answer"]`, a snapshot's directory or an error, and notes what it was asked."""
    noted: dict[str, Any] = {"calls": 0}

    def snapshot_download(name: str, **settings: Any) -> str:
        noted.update(settings, name=name, calls=noted["calls"] + 1)
        if isinstance(noted["answer"], Exception):
            raise noted["answer"]
        return str(noted["answer"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return noted


def http_error(status: int) -> HfHubHTTPError:
    # Which HTTP library makes the answer differs between versions of huggingface_hub.
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    error.response = SimpleNamespace(status_code=status)  # pyright: ignore[reportAttributeAccessIssue]
    return error


def refusal(name: str, **settings: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_directory(name, file_patterns=["*.json"], **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_hub_name_is_asked_for_once_and_for_what_is_needed(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["answer"] = tmp_path
    assert resolve_directory(NAME, file_patterns=["*.json"], revision="v2") == tmp_path
    assert {key: hub[key] for key in ("name", "revision", "allow_patterns", "calls")} == {
        "name": NAME,
        "revision": "v2",
        "allow_patterns": ["*.json"],
        "calls": 1,
    }
    assert hub["etag_timeout"] <= 10


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (http_error(404), f"no directory {NAME} here, and the Hub answers 404 for {NAME} at v2"),
        (http_error(401), f"no directory {NAME} here, and the Hub answers 401 for {NAME} at v2"),
        (LocalEntryNotFoundError("a\npage"), f"no directory {NAME} here, and the Hugging Face Hub cannot be reached"),
        (HFValidationError("bad name\nand more"), f"cannot fetch {NAME} at v2 from the Hugging Face Hub: bad name"),
        (
            OSError(28, "No space left"),
            f"cannot fetch {NAME} at v2 from the Hugging Face Hub: No space left",
        ),
    ],
    ids=["404", "401", "offline", "invalid", "disk"],
)
def test_what_the_hub_refuses_is_one_line(
    hub: dict[str, Any], answer: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)  # where one is set, it is named as the reason
    hub["answer"] = answer
    assert refusal(NAME, revision="v2").removesuffix(f" (nor is {NAME} at v2 in its local cache)") == said


@pytest.mark.parametrize("name", ["model", "a/b/c", "/a/b", "./a/b", "../no model", "-a/b", "a/", "a b/c"])
def test_what_is_no_hub_name_is_never_asked_for(hub: dict[str, Any], name: str) -> None:
    assert refusal(name).startswith(f"no directory {name}")
    assert hub["calls"] == 0


def test_a_folder_here_makes_it_a_path(hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebody" / "a_model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert refusal(NAME) == f"no directory {NAME}; did you mean 'a_model'?"
    assert hub["calls"] == 0
    assert resolve_directory("somebody/a_model", file_patterns=[]) == Path("somebody/a_model")


def test_a_checkpoint_on_the_hub_is_converted_and_its_commit_noted(hub: dict[str, Any], tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123abc"
    source = FIXTURES / "modules" / "gpt_rot8"
    snapshot.parent.mkdir()
    snapshot.symlink_to(source)
    hub["answer"] = snapshot
    report = convert_official(NAME, tmp_path / "gpt", revision="main")
    assert (report.source, report.commit) == (NAME, "0123abc")
    assert (tmp_path / "gpt" / "model.safetensors").is_file()
    there = {path.name for path in source.iterdir()} | {"tokenizer.pt", "model-00001-of-00002.safetensors"}
    fetched = {name for name in there if any(fnmatch.fnmatch(name, pattern) for pattern in hub["allow_patterns"])}
    # The optimiser's state is twice the weights, the pickled tokenizer is never opened.
    assert {"config.json", "pytorch_model.bin", "config.pt", "vocab.json", "merges.txt"} < fetched
    assert not {"optimizer.pt", "scheduler.pt", "tokenizer.pt"} & fetched
