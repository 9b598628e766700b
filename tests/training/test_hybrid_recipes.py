"""A recipe makes hybrids; what their layers cannot do is one line before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cottention.errors import SettingsError
from cottention.models import CottentionBertForMaskedLM, CottentionGPTForCausalLM
from cottention.models.layer_types import check_carries
from cottention.training.carried import CarriedStates
from cottention.training.pretraining import pretrain
from tests.models.helpers import gpt_config
from tests.training.helpers import metrics_of, tiny_recipe
from tests.training.test_trainer import short

MIX: dict[str, Any] = {"model__layer_types": ["linear_attention", "sliding_attention"], "model__sliding_window": 8}


def test_a_hybrid_is_trained_and_opened(corpus: Path, tmp_path: Path) -> None:
    pretrain(short("gpt", corpus, **MIX), output_dir=tmp_path / "run")
    losses = [line["loss"] for line in metrics_of(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0]
    model = CottentionGPTForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.layer_types == MIX["model__layer_types"]


def test_a_gpt_with_every_option_is_trained_and_opened(corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "short_conv": 3,
        "output_norm": True,
        "output_gate": "silu",
        "decay": "data",
        "erase": True,
        "divisor": "none",
        "position_embedding_type": "none",
    }
    pretrain(short("gpt", corpus, **{f"model__{key}": each for key, each in options.items()}), output_dir=tmp_path)
    config = CottentionGPTForCausalLM.from_pretrained(tmp_path / "model").config
    assert {name: getattr(config, name) for name in options} == options


def test_a_bert_with_options_is_trained_and_opened(corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "layer_types": ["linear_attention", "full_attention"],
        "position_embedding_type": "rotary",
        "norm_first": True,
        "short_conv": 3,
        "output_norm": True,
        "output_gate": "sigmoid",
        "decay": "learned",
        "divisor": "query",
        "max_position_embeddings": 16,  # shorter than its windows, which only learned positions mind
    }
    pretrain(short("bert", corpus, **{f"model__{key}": each for key, each in options.items()}), output_dir=tmp_path)
    config = CottentionBertForMaskedLM.from_pretrained(tmp_path / "model").config
    assert {name: getattr(config, name) for name in options} == options
    with pytest.raises(SettingsError, match=r"^data.sequence_length must not exceed model.max_position_embeddings"):
        short("bert", corpus, model__max_position_embeddings=16)
    with pytest.raises(SettingsError, match=r"^model.rotary_dim needs model.position_embedding_type: rotary"):
        short("bert", corpus, model__rotary_dim=4)
    with pytest.raises(SettingsError, match=r"^model.rotary_dim must be even and at most .*; got 5"):
        short("bert", corpus, model__rotary_dim=5, model__position_embedding_type="rotary")


def test_lists_that_make_no_model_are_refused_in_the_recipe(corpus: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"^layer_types must be .*; got 'linear_atention'; did you mean 'linear_attention'"
    ):
        tiny_recipe("gpt", corpus, model__layer_types=["linear_atention", "full_attention"])


def test_states_of_softmax_layers_are_not_carried(corpus: Path) -> None:
    line = r"^data.carry_state needs layers of linear_attention alone, .*; got sliding_attention in layer_types"
    with pytest.raises(SettingsError, match=line):
        tiny_recipe("gpt", corpus, data__carry_state=True, data__split_by="document", **MIX)
    config = gpt_config(layer_types=["linear_attention", "full_attention"])
    with pytest.raises(SettingsError, match="got full_attention in layer_types"):
        CarriedStates(config, lanes=range(2))
    check_carries(gpt_config().layer_types)
