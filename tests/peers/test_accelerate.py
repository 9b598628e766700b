"""accelerate's ways to hold a model elsewhere than in memory, and its training loop, give a model's own numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch.utils.data import DataLoader

from cottention import models
from tests.models.helpers import ATTENTION_TYPES, bert_config, gpt_config, some_tokens

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

TOKENS = some_tokens(2, 9)
_FAMILIES = {"Bert": bert_config, "GPT": gpt_config}
_CLASSES = [name for name in models.__all__ if name.startswith(("CottentionBert", "CottentionGPT"))]
_CLASSES = [name for name in _CLASSES if not name.endswith("Config")]


def _model(name: str, attention_type: str) -> Any:
    config = _FAMILIES["Bert" if "Bert" in name else "GPT"](attention_type, pad_token_id=0)
    torch.manual_seed(0)
    return getattr(models, name)(config).eval()


def _output(model: Any) -> torch.Tensor:
    """The first tensor that a model gives: of two choices each where it wants choices."""
    tokens = TOKENS[None] if "MultipleChoice" in type(model).__name__ else TOKENS
    with torch.no_grad():
        return model(input_ids=tokens, return_dict=False)[0]


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("name", _CLASSES)
def test_offloading_to_memory_and_to_disk(name: str, attention_type: str, tmp_path: Path):
    expected = _output(_model(name, attention_type))
    on_cpu = accelerate.cpu_offload(_model(name, attention_type), execution_device=torch.device("cpu"))
    torch.testing.assert_close(_output(on_cpu), expected)
    on_disk = accelerate.disk_offload(_model(name, attention_type), tmp_path, execution_device=torch.device("cpu"))
    torch.testing.assert_close(_output(on_disk), expected)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("name", _CLASSES)
def test_a_checkpoint_is_loaded_into_an_empty_model_and_dispatched(name: str, attention_type: str, tmp_path: Path):
    model = _model(name, attention_type)
    model.save_pretrained(tmp_path / "model")
    with accelerate.init_empty_weights():
        empty = _model(name, attention_type)
    empty.tie_weights()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    device_map = accelerate.infer_auto_device_map(
        empty, max_memory={"cpu": size * 4 // 5}, no_split_module_classes=empty._no_split_modules
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk"
    )
    torch.testing.assert_close(_output(loaded), _output(model))


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_generation_with_weights_on_disk(attention_type: str, tmp_path: Path):
    model = _model("CottentionGPTForCausalLM", attention_type)
    settings: Any = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(TOKENS, **settings)
    on_disk: Any = accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert torch.equal(on_disk.generate(TOKENS, **settings), expected)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_loop_that_accumulates_and_goes_on_from_its_state(attention_type: str, tmp_path: Path):
    rows = list(some_tokens(8, 9, seed=3))

    def trained(batch_size: int, passes: int, restored: bool = False) -> dict[str, torch.Tensor]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=passes)
        model = _model("CottentionGPTForCausalLM", attention_type)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        loader: Any = DataLoader(rows, batch_size=batch_size)  # pyright: ignore[reportArgumentType]
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if restored:
            accelerator.load_state(str(tmp_path / "state"))
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch, labels=batch).loss)
                optimizer.step()
                optimizer.zero_grad()
        if not restored:
            accelerator.save_state(str(tmp_path / "state"))
        return {name: value.detach().clone() for name, value in accelerator.unwrap_model(model).state_dict().items()}

    at_once, in_parts = trained(8, 1), trained(2, 4)
    torch.testing.assert_close(in_parts, at_once, rtol=1e-4, atol=1e-6)
    further = trained(8, 1, restored=True)
    assert any(not torch.equal(further[name], in_parts[name]) for name in further)
