"""What others put around or into a model leaves its numbers alone: NEFTune's noise, int8 weights, DataParallel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from cottention.models import CottentionBertForMaskedLM, CottentionGPTForCausalLM
from tests.models.helpers import ATTENTION_TYPES, bert_config, gpt_config, some_tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.parametrize("attention_type", ATTENTION_TYPES),
    pytest.mark.parametrize(
        ("kind", "make"), [(CottentionGPTForCausalLM, gpt_config), (CottentionBertForMaskedLM, bert_config)]
    ),
]

TOKENS = some_tokens(4, 11)


def _model(kind: Any, make: Any, attention_type: str) -> Any:
    torch.manual_seed(0)
    return kind(make(attention_type)).float()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def _trained(model: Any, folder: Path, **settings: Any) -> tuple[Any, float]:
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, **settings
    )
    trainer = Trainer(model, arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]
    return model, trainer.train().training_loss


def test_the_noise_of_neftune_is_there_in_training_alone(
    kind: Any, make: Any, attention_type: str, tmp_path: Path
) -> None:
    _, plain = _trained(_model(kind, make, attention_type), tmp_path / "plain")
    assert _trained(_model(kind, make, attention_type), tmp_path / "again")[1] == plain
    model, noisy = _trained(_model(kind, make, attention_type), tmp_path / "noisy", neftune_noise_alpha=5.0)
    assert noisy != plain
    assert not model.get_input_embeddings()._forward_hooks
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(_logits(kind.from_pretrained(tmp_path / "saved").eval()), _logits(model.eval()))


def test_dynamic_int8_keeps_the_logits_to_some_per_cent(kind: Any, make: Any, attention_type: str) -> None:
    model = _model(kind, make, attention_type).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(module).__module__ for module in quantized.modules())
    expected, found = _logits(model), _logits(quantized)
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_data_parallel_gives_the_output_and_gradients_of_the_model(kind: Any, make: Any, attention_type: str) -> None:
    model = _model(kind, make, attention_type).eval()
    gradients = []
    for wrapped in (model, torch.nn.DataParallel(model)):
        model.zero_grad()
        wrapped(input_ids=TOKENS, labels=TOKENS).loss.mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])
