"""Hybrids write, read and remember texts as cosine models do: chunks, prompts of any length, states in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from cottention.errors import CheckpointError
from cottention.generation import generate_text, load_state, read_text, save_state
from tests import tiny

DOCUMENT = "The people of the United States serve crème brûlée to the people. " * 5
QUESTIONS = [" Who serves", " In 東"]
MIXES = [["linear_attention", "full_attention"], ["sliding_attention", "linear_attention"]]


def hybrid(layer_types: list[str]) -> Any:
    window: dict[str, Any] = {"sliding_window": 5} if "sliding_attention" in layer_types else {}
    return tiny.gpt(layer_types=layer_types, **window)


def write(model: Any, prompts: Any, **settings: Any) -> list[str]:
    settings = {"max_new_tokens": 20, "temperature": 0, **settings}
    return generate_text(model, tiny.bpe_tokenizer(), prompts, **settings).texts


@pytest.mark.parametrize("layer_types", MIXES)
def test_a_batch_of_prompts_is_written_on_as_each_alone(layer_types: list[str], monkeypatch: Any) -> None:
    model = hybrid(layer_types)
    prompts = ["The", DOCUMENT, " In 東"]
    expected = [write(model, [prompt])[0] for prompt in prompts]
    for chunk in (1, 7, 2048):
        assert write(model, prompts, prefill_chunk=chunk) == expected
    monkeypatch.setattr("cottention.generation.writing._TOKENS_A_CALL", 6)
    assert write(model, prompts) == expected


@pytest.mark.parametrize("layer_types", MIXES)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"temperature": 1.0, "seed": 3}])
def test_a_loaded_state_is_gone_on_from_as_the_text_itself(
    layer_types: list[str], settings: dict[str, Any], tmp_path: Path
) -> None:
    model, tokenizer, path = hybrid(layer_types), tiny.bpe_tokenizer(), tmp_path / "document.state"
    save_state(path, read_text(model, tokenizer, DOCUMENT, prefill_chunk=7), model, tokenizer)
    state = load_state(path, model, tokenizer)
    expected = write(model, [DOCUMENT + question for question in QUESTIONS], **settings)
    assert write(model, QUESTIONS, state=state, **settings) == expected


@pytest.mark.parametrize("layer_types", MIXES)
def test_a_text_of_one_token_is_a_state_too(layer_types: list[str], tmp_path: Path) -> None:
    model, tokenizer, path = hybrid(layer_types), tiny.bpe_tokenizer(), tmp_path / "one.state"
    save_state(path, read_text(model, tokenizer, "a"), model, tokenizer)
    assert write(model, ["b"], state=load_state(path, model, tokenizer)) == write(model, ["ab"])


@pytest.mark.parametrize("name", ["layers.0.k", "layers.0.real", "layers.1.kv"])
def test_a_state_of_other_shapes_is_damaged(name: str, tmp_path: Path) -> None:
    model, tokenizer, path = hybrid(MIXES[1]), tiny.bpe_tokenizer(), tmp_path / "document.state"
    save_state(path, read_text(model, tokenizer, DOCUMENT), model, tokenizer)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[name] = tensors[name].repeat_interleave(3, dim=1)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="is damaged: its tensors are not those of a state of this model"):
        load_state(path, model, tokenizer)
