"""The BERT recipes with the recommended block: twins of one size, and a model that leaves word frequencies behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cottention.training.pretraining import build_model
from cottention.training.recipe_files import load_recipe, replace_settings


def _model_of(name: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return build_model(replace_settings(load_recipe(name), {f"model.{key}": each for key, each in changes.items()}))


@pytest.mark.parametrize("name", ["bert_small_plus", "quickstart_bert"])
def test_the_softmax_twin_differs_in_its_attention_alone(name: str) -> None:
    cosine, softmax = _model_of(name), _model_of(name, attention_type="softmax")
    own = {key: value.shape for key, value in softmax.named_parameters()}
    shapes = {key: value.shape for key, value in cosine.named_parameters()}
    assert {key: shapes[key] for key in own} == own, "the same convolutions, norms, gates and matrices"
    assert {key.rpartition(".decay.")[1] for key in shapes.keys() - own.keys()} == {".decay."}
    assert 1 <= cosine.num_parameters() / softmax.num_parameters() < 1.01


def test_the_hybrid_is_the_linear_model_with_softmax_in_every_third_layer() -> None:
    plus, hybrid = load_recipe("bert_small_plus"), load_recipe("bert_small_hybrid")
    assert replace_settings(hybrid, {"model.layer_types": None}) == plus
    model = _model_of("bert_small_hybrid")
    kinds = [layer.attention.self.is_cosine for layer in model.bert.encoder.layer]
    assert kinds == [(number + 1) % 3 != 0 for number in range(4)]
    assert 0.99 < model.num_parameters() / _model_of("bert_small_plus").num_parameters() <= 1


def test_the_convolution_is_centred_and_positions_have_no_end() -> None:
    model = _model_of("bert_small_plus")
    conv = model.bert.encoder.layer[0].attention.self.v_conv
    assert (conv.width, conv.num_before) == (3, 1)
    assert model.config.longest_text is None
