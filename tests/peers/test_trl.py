"""TRL's trainers on our GPTs: the same texts give the same loss, padded or packed, as with stock GPT-J."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests import tiny
from tests.peers import clients

trl = pytest.importorskip("trl", reason="`make test-peers` installs it")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

_TEXTS = [*tiny.TEXTS, "In order to form a more perfect Union.", "Order the tea!"]
_PREFERENCES = {"prompt": ["The", "In order"], "chosen": [" people", " to form"], "rejected": [" tea", " crème"]}
_OURS = ("cosine", "softmax")


def _settings(kind: type, folder: Path, **settings: Any) -> Any:
    """Settings of a trainer that runs one step on a CPU."""
    common: Any = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    common |= {"logging_steps": 1, "gradient_checkpointing": False, "output_dir": str(folder)}
    return kind(**{**common, "per_device_train_batch_size": 8, **settings})


def _losses(trainer: Any) -> list[float]:
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses
    assert all(map(math.isfinite, losses))
    return losses


def _sft(model: Any, folder: Path, **settings: Any) -> Any:
    return trl.SFTTrainer(
        model=model,
        args=_settings(trl.SFTConfig, folder, **{"max_length": 128, **settings}),
        train_dataset=Dataset.from_dict({"text": _TEXTS}),
        processing_class=clients.tokenizer(),
    )


@pytest.mark.parametrize("kind", clients.GPTS)
def test_sft_has_one_loss_padded_padding_free_and_packed(kind: str, tmp_path: Path):
    losses = {}
    for name, settings in {
        "padded": {},
        "padding_free": {"padding_free": True, "max_length": None},
        "packed": {"packing": True, "packing_strategy": "bfd"},
    }.items():
        losses[name] = _losses(_sft(clients.gpt(kind, n_positions=256), tmp_path / name, **settings))[0]
    assert losses["padding_free"] == pytest.approx(losses["padded"], abs=1e-5)
    assert losses["packed"] == pytest.approx(losses["padded"], abs=1e-5)


@pytest.mark.parametrize("kind", clients.GPTS)
def test_sft_learns_from_wrapped_texts(kind: str, tmp_path: Path):
    settings: Any = {"packing": True, "packing_strategy": "wrapped", "max_steps": 8, "learning_rate": 1e-2}
    losses = _losses(_sft(clients.gpt(kind), tmp_path, **settings))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", _OURS)
def test_sft_opens_a_directory(kind: str, tmp_path: Path):
    directory = clients.saved(tmp_path / "model", clients.gpt(kind), clients.tokenizer())
    trainer = _sft(str(directory), tmp_path / "run", model_init_kwargs={"trust_remote_code": True, "dtype": "float32"})
    assert _losses(trainer)[0] == pytest.approx(_losses(_sft(clients.gpt(kind), tmp_path / "run"))[0], abs=1e-5)


@pytest.mark.parametrize("kind", clients.GPTS)
@pytest.mark.parametrize("with_reference", [True, False])
def test_dpo_begins_at_the_reference(kind: str, with_reference: bool, tmp_path: Path):
    directory = clients.saved(tmp_path / "model", clients.gpt(kind), clients.tokenizer())
    model = type(clients.gpt(kind)).from_pretrained(directory)
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=clients.gpt(kind) if with_reference else None,
        args=_settings(trl.DPOConfig, tmp_path / "run", max_steps=3, learning_rate=1e-3),
        train_dataset=Dataset.from_dict(_PREFERENCES),
        processing_class=clients.tokenizer(),
    )
    losses = _losses(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # model and reference are the same
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", clients.GPTS)
def test_a_reward_model_learns_preferences(kind: str, tmp_path: Path):
    trainer = trl.RewardTrainer(
        model=clients.gpt(kind, classifies=True, num_labels=1),
        args=_settings(trl.RewardConfig, tmp_path, max_steps=6, learning_rate=1e-2),
        train_dataset=Dataset.from_dict({name: _PREFERENCES[name] for name in ("chosen", "rejected")}),
        processing_class=clients.tokenizer(),
    )
    losses = _losses(trainer)
    assert losses[-1] < losses[0]
    assert torch.isfinite(trainer.model.score.weight).all()
