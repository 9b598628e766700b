"""Whatever is wrong with a model directory, every command that opens one says it in one line and ends with 2."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForMaskedLM, GPTJConfig, GPTJForCausalLM

from cottention.cli.main import main
from tests import tiny
from tests.convert.helpers import change_json

COMMANDS = {
    "generate": ["generate", "--prompt", "The people"],
    "evaluate": ["evaluate", "perplexity", "--data", "TEXT"],
    "fill-mask": ["fill-mask", "The [MASK]"],
}


def a_file(model: Path, _: str) -> Path:
    return model / "config.json"


def misspelled(model: Path, _: str) -> Path:
    return model.with_name("modell")


def a_run(model: Path, _: str) -> Path:
    return model.parent


def without_config(model: Path, _: str) -> Path:
    (model / "config.json").unlink()
    return model


def damaged_config(model: Path, _: str) -> Path:
    (model / "config.json").write_text("{")
    return model


def without_weights(model: Path, _: str) -> Path:
    (model / "model.safetensors").unlink()
    return model


def truncated(model: Path, _: str) -> Path:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    return model


def damaged(model: Path, _: str) -> Path:
    (model / "model.safetensors").write_bytes(b"not tensors" * 99)
    return model


def cosine_opened_as_softmax(model: Path, _: str) -> Path:
    change_json(model / "config.json", attention_type="softmax")
    return model


def softmax_opened_as_cosine(model: Path, command: str) -> Path:
    shutil.rmtree(model)
    if command == "fill-mask":
        tiny.save(model, tiny.bert("softmax"), tiny.wordpiece_tokenizer())
    else:
        tiny.save(model, tiny.gpt("softmax"), tiny.bpe_tokenizer())
    change_json(model / "config.json", attention_type="cosine")
    return model


def the_other_kind(model: Path, command: str) -> Path:
    shutil.rmtree(model)
    if command == "fill-mask":
        return tiny.save(model, tiny.gpt(), tiny.bpe_tokenizer())
    return tiny.save(model, tiny.bert(), tiny.wordpiece_tokenizer())


def stock(model: Path, command: str) -> Path:
    shutil.rmtree(model)
    kind: Any
    if command == "fill-mask":
        sizes: dict[str, Any] = {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 8,
        }
        kind = BertForMaskedLM(BertConfig(vocab_size=60, **sizes))
    else:
        kind = GPTJForCausalLM(GPTJConfig(vocab_size=290, n_embd=8, n_layer=1, n_head=1, rotary_dim=4))
    kind.save_pretrained(model)
    return model


def without_tokenizer(model: Path, _: str) -> Path:
    (model / "tokenizer.json").unlink()
    return model


def tokenizer_too_large(model: Path, command: str) -> Path:
    shutil.rmtree(model)
    if command == "fill-mask":
        return tiny.save(model, tiny.bert(vocab_size=50), tiny.wordpiece_tokenizer())
    return tiny.save(model, tiny.gpt(vocab_size=50), tiny.bpe_tokenizer())


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (a_file, "is a file; expected a model directory"),
        (misspelled, "did you mean 'model'?"),
        (a_run, "it holds the model RUN/model"),
        (without_config, "is not a model directory: it has no config.json"),
        (damaged_config, "config.json cannot be read as JSON"),
        (without_weights, "has no weights (model.safetensors)"),
        (truncated, "holds damaged weights"),
        (damaged, "holds damaged weights"),
        (cosine_opened_as_softmax, "holds cosine attention (it has norm_const weights)"),
        (softmax_opened_as_cosine, "holds softmax attention (it has no norm_const)"),
        (the_other_kind, "; needed is a "),
        (stock, "convert it first: cottention convert softmax RUN/model NEW_DIRECTORY"),
        (without_tokenizer, "has no tokenizer (tokenizer.json)"),
        (tokenizer_too_large, "but 50 embeddings"),
    ],
    ids=lambda value: getattr(value, "__name__", "-"),
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_model_directory_is_one_line(
    command: str,
    spoil: Callable[[Path, str], Path],
    expected: str,
    gpt_dir: Path,
    bert_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(bert_dir if command == "fill-mask" else gpt_dir, run_dir / "model")
    (tmp_path / "text.txt").write_text("The people")
    words = [word.replace("TEXT", str(tmp_path / "text.txt")) for word in COMMANDS[command]]
    model = spoil(run_dir / "model", command)
    capsys.readouterr()  # saving a model shows a bar
    assert main([*words, "--model", str(model)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"cottention {command}: error: ")
    assert err.count("\n") == 1
    assert expected in err.replace(str(run_dir), "RUN")
