"""A card says what is in the directory and what the run measured; the directory arrives at a hub whole."""

from __future__ import annotations

import base64
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from cottention.errors import CheckpointError
from cottention.models.model_card import push_model, write_model_card
from tests import tiny

METRICS = {"step": 200, "val_ppl": 21.437512, "val_nats_per_byte": 0.9, "diverged": math.nan, "note": "x", "done": True}
RECIPE = {"model": {"n_embd": 32, "rotary_dim": None}, "data": {"source": ["a.txt", "東.txt"]}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "mine" / "model", tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer())


def test_a_card_holds_the_real_figures(directory: Path) -> None:
    path = write_model_card(directory, metrics=METRICS, recipe=RECIPE, data="sotu:validation", license="mit")
    assert path == directory / "README.md"
    card: Any = ModelCard.load(path)
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "cottention",
        "text-generation",
        "mit",
    )
    assert card.data.tags == ["cottention", "cosine-attention"]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert found == {"step": 200, "val_ppl": 21.437512, "val_nats_per_byte": 0.9}
    num_parameters = sum(parameter.numel() for parameter in tiny.gpt().parameters())
    for line in (
        "# mine",
        "A GPT with cosine attention, trained with cottention.",
        f"| parameters | {num_parameters:,} |",
        "| layers | 2 |",
        "| positions in training | 64 |",
        "Measured on sotu:validation.",
        "| val_ppl | 21.4375 |",
        "| diverged | nan |",
        "  - 東.txt",
        'model = AutoModelForCausalLM.from_pretrained("mine")',
    ):
        assert line in card.text.splitlines(), line
    assert "note" not in card.text
    # Written again, it is replaced.
    write_model_card(directory, metrics={})
    assert "val_ppl" not in path.read_text()
    assert not list(directory.glob("*.partial"))


def test_a_bert_fills_masks(tmp_path: Path) -> None:
    tiny.save(tmp_path / "bert", tiny.bert("softmax"), tiny.wordpiece_tokenizer())
    card: Any = ModelCard.load(write_model_card(tmp_path / "bert", metrics={"accuracy": 0.5}, name="me/bert"))
    assert (card.data.pipeline_tag, card.data.model_name) == ("fill-mask", "me/bert")
    assert "A BERT with softmax attention, trained with cottention." in card.text
    assert 'model = AutoModelForMaskedLM.from_pretrained("me/bert")' in card.text


@pytest.mark.parametrize(
    ("architecture", "task", "auto_class"),
    [
        ("CottentionGPTForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
        ("CottentionGPTForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
        ("CottentionGPTForQuestionAnswering", "question-answering", "AutoModelForQuestionAnswering"),
        ("CottentionGPTModel", "feature-extraction", "AutoModel"),
    ],
)
def test_a_card_opens_the_head_that_is_there(directory: Path, architecture: str, task: str, auto_class: str) -> None:
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, "architectures": [architecture]}))
    card: Any = ModelCard.load(write_model_card(directory, metrics={}))
    assert card.data.pipeline_tag == task
    assert hasattr(transformers, auto_class)
    assert f'model = {auto_class}.from_pretrained("mine")' in card.text


def test_a_license_is_named_or_none_is_claimed(directory: Path) -> None:
    assert "| license of the weights | mit |" in write_model_card(directory, metrics={}, license="mit").read_text()
    assert "license" not in write_model_card(directory, metrics={}).read_text()


def test_what_is_no_model_is_one_line(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a model directory: its config\.json cannot be read"):
        write_model_card(tmp_path, metrics={})
    (directory / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"has damaged weights: model\.safetensors cannot be read"):
        write_model_card(directory, metrics={})
    (directory / "config.json").write_text('{"model_type": "gptj"}')
    with pytest.raises(CheckpointError, match="must hold one of our models"):
        push_model(directory, "me/mine")


WEB = "https://huggingface.co"  # an address that is only ever read


class Hub(BaseHTTPRequestHandler):
    """What the Hub answers to an upload; keeps what it was sent."""

    files: dict[str, bytes]
    repos: list[dict[str, Any]]
    refuses = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if type(self).refuses:
            self._answer({"error": "no entry"}, 403)
        elif self.path == "/api/repos/create":
            type(self).repos.append(json.loads(body))
            self._answer({"url": f"{WEB}/me/mine", "name": "me/mine", "id": "me/mine"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    type(self).files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"{WEB}/me/mine/commit/abc", "commitOid": "abc", "pullRequestUrl": None})
        else:
            self._answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        self._answer({"id": "me/mine", "modelId": "me/mine", "sha": "abc", "siblings": [], "xetEnabled": False})

    def _answer(self, content: Any, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    handler = type("ThisHub", (Hub,), {"files": {}, "repos": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield handler
        server.shutdown()


def test_a_directory_arrives_at_a_hub_whole(directory: Path, hub: type[Hub]) -> None:
    write_model_card(directory, metrics=METRICS)
    (directory / "optimizer.pt").write_bytes(b"not for others")
    address = push_model(directory, "me/mine", token="hf_none")
    assert address.endswith("/commit/abc")
    made = hub.repos[0]
    assert made["name"] == "mine"
    assert made.get("private") or made.get("visibility") == "private"
    expected = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "optimizer.pt"}
    assert hub.files == expected
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(expected)


def test_a_refusal_is_one_line(directory: Path, hub: type[Hub]) -> None:
    hub.refuses = True
    with pytest.raises(CheckpointError, match=r"cannot upload .* as me/mine: ") as caught:
        push_model(directory, "me/mine", token="hf_none")
    assert "\n" not in str(caught.value)
