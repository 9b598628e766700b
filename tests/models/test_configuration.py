"""Configs refuse what makes no sense, in one line that names the field, the rule and the value."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, GPTJConfig
from transformers.activations import ACT2FN

from cottention.errors import CheckpointError, SettingsError
from cottention.models import CottentionBertConfig, CottentionGPTConfig
from cottention.models.configuration import ACTIVATIONS
from tests.models.helpers import bert_config, gpt_config


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"n_embd": 770, "n_head": 12}, SettingsError, "n_head must divide n_embd; got 12 and 770"),
        ({"n_layer": 0}, SettingsError, "n_layer must be at least 1; got 0"),
        ({"vocab_size": "many"}, TypeError, "vocab_size must be an int; got 'many'"),
        ({"n_positions": True}, TypeError, "n_positions must be an int; got True"),
        ({"n_inner": 0}, SettingsError, "n_inner must be at least 1; got 0"),
        ({"rotary_dim": 7}, SettingsError, "rotary_dim must be even, from 2 to the head dim 16; got 7"),
        ({"rotary_dim": 18}, SettingsError, "rotary_dim must be even, from 2 to the head dim 16; got 18"),
        ({"rotary_dim": 8.0}, TypeError, "rotary_dim must be an int or None; got 8.0"),
        (
            {"attention_type": "cosin"},
            SettingsError,
            "attention_type must be one of cosine, softmax; got 'cosin'; did you mean 'cosine'?",
        ),
        ({"attention_type": None}, TypeError, "attention_type must be a string; got None"),
        ({"norm_const_init": float("nan")}, SettingsError, "norm_const_init must be from -inf to inf; got nan"),
        ({"original_init": "yes"}, TypeError, "original_init must be True or False; got 'yes'"),
        ({"resid_pdrop": 1.5}, SettingsError, "resid_pdrop must be from 0 to 1; got 1.5"),
        ({"embd_pdrop": "0.1"}, TypeError, "embd_pdrop must be a number; got '0.1'"),
        ({"eos_token_id": 61}, SettingsError, "eos_token_id must be from 0 to vocab_size - 1 = 60; got 61"),
        ({"eos_token_id": [3, -1]}, SettingsError, "eos_token_id must be from 0 to vocab_size - 1 = 60; got -1"),
        ({"initializer_range": -1}, SettingsError, "initializer_range must be from 0 to inf; got -1"),
    ],
)
def test_gpt_settings_that_make_no_sense_are_named(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        gpt_config(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"hidden_size": 770, "num_attention_heads": 12},
            SettingsError,
            "num_attention_heads must divide hidden_size; got 12 and 770",
        ),
        ({"max_position_embeddings": 0}, SettingsError, "max_position_embeddings must be at least 1; got 0"),
        ({"type_vocab_size": 0}, SettingsError, "type_vocab_size must be at least 1; got 0"),
        ({"intermediate_size": 1.5}, TypeError, "intermediate_size must be an int; got 1.5"),
        (
            {"attention_probs_dropout_prob": -0.1},
            SettingsError,
            "attention_probs_dropout_prob must be from 0 to 1; got -0.1",
        ),
        ({"classifier_dropout": 2}, SettingsError, "classifier_dropout must be from 0 to 1; got 2"),
        ({"pad_token_id": 100}, SettingsError, "pad_token_id must be from 0 to vocab_size - 1 = 60; got 100"),
        ({"layer_norm_eps": "tiny"}, TypeError, "layer_norm_eps must be a number; got 'tiny'"),
    ],
)
def test_bert_settings_that_make_no_sense_are_named(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        bert_config(**settings)
    assert str(caught.value) == message


def test_an_unknown_activation_brings_a_suggestion() -> None:
    with pytest.raises(
        SettingsError, match=r"activation_function must be one of .*; got 'gelu_nwe'; did you mean 'gelu_new'\?"
    ):
        gpt_config(activation_function="gelu_nwe")
    with pytest.raises(SettingsError, match=r"hidden_act must be one of .*; got 'relux'; did you mean 'relu'\?"):
        bert_config(hidden_act="relux")


def test_every_activation_that_is_offered_exists() -> None:
    for name in ACTIVATIONS:
        assert name in ACT2FN


@pytest.mark.parametrize(("ours", "stock"), [(CottentionBertConfig, BertConfig), (CottentionGPTConfig, GPTJConfig)])
def test_fields_carry_the_stock_names(ours: Any, stock: Any) -> None:
    decoder_only_in_bert = {"is_decoder", "add_cross_attention", "use_cache"}
    assert set(stock().to_dict()) - set(ours().to_dict()) - decoder_only_in_bert == set()
    own = {"attention_type", "norm_const_init", "original_init"}
    if ours is CottentionBertConfig:
        own.add("sparse_prediction")
    assert set(ours().to_dict()) - set(stock().to_dict()) == own


def test_gpt_answers_to_the_names_that_hugging_face_uses_everywhere() -> None:
    config = gpt_config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 2)
    assert config.max_position_embeddings == 64
    by_other_names: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4}
    assert CottentionGPTConfig(**by_other_names).n_embd == 64


@pytest.mark.parametrize("make", [gpt_config, bert_config])
@pytest.mark.parametrize("attention_type", ["cosine", "softmax"])
def test_a_saved_config_comes_back_whole(make: Any, attention_type: str, tmp_path: Path) -> None:
    config = make(attention_type, norm_const_init=0.25, original_init=True, num_labels=5)
    config.save_pretrained(tmp_path)
    assert f'"attention_type": "{attention_type}"' in (tmp_path / "config.json").read_text()
    back = type(config).from_pretrained(tmp_path)
    assert back.to_dict() == config.to_dict()
    assert back.num_labels == 5


def test_another_models_config_is_refused(tmp_path: Path) -> None:
    gpt_config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="must hold a model of type 'cottention-bert'; got 'cottention-gpt'"):
        CottentionBertConfig.from_pretrained(tmp_path)
    GPTJConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="got 'gptj'; `cottention convert` turns"):
        CottentionGPTConfig.from_pretrained(tmp_path)


def test_a_damaged_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": ')
    with pytest.raises(CheckpointError, match=r"config\.json of .* must be valid JSON; it is not"):
        CottentionGPTConfig.from_pretrained(tmp_path)


def test_a_config_imports_no_modelling() -> None:
    code = (
        "import sys; from cottention.models import CottentionBertConfig, CottentionGPTConfig; "
        "bad = [m for m in sys.modules if m.endswith(('modeling_gpt', 'modeling_bert', 'modeling_utils'))]; "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
