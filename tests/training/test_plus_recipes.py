"""Recipes of the recommended block and its hybrid: as large as the published ones, their softmax twin one flag away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.errors import SettingsError
from cottention.models import CottentionGPTForCausalLM
from cottention.training import load_recipe
from cottention.training.pretraining import build_model, pretrain
from cottention.training.recipe_files import replace_settings
from cottention.training.recipe_sections import GPTModelSettings
from tests.training.helpers import tiny_recipe
from tests.training.test_trainer import short

SIZES = {"gpt_small": 6, "gpt_300m": 20}
NAMES = [f"{size}_{kind}" for size in SIZES for kind in ("plus", "hybrid")]
SOFTMAX = {"model.attention_type": "softmax"}
PARTS = {"short_conv": 4, "output_norm": True, "output_gate": "silu"}
MEMORY = {"decay": "data", "erase": True, "divisor": "none"}


def _built(recipe: Any) -> tuple[int, Any]:
    """Parameters, counted without memory for them, and the config."""
    with torch.device("meta"):
        model = build_model(recipe)
    return sum(parameter.numel() for parameter in model.parameters()), model.config


def _config(recipe: Any) -> dict[str, Any]:
    config = _built(recipe)[1]
    return {name: getattr(config, name) for name in (*PARTS, *MEMORY)}


@pytest.mark.parametrize("name", NAMES)
def test_they_have_the_parameters_of_the_published_block_and_of_their_twin(name: str) -> None:
    recipe = load_recipe(name)
    published = _built(load_recipe(f"{name.rpartition('_')[0]}_cosine"))[0]
    own = _built(recipe)[0]
    assert own == pytest.approx(published, rel=0.01)
    assert _built(replace_settings(recipe, SOFTMAX))[0] == pytest.approx(own, rel=0.01)


def test_the_exact_counts_that_the_pages_name() -> None:
    counts = [_built(load_recipe(f"gpt_300m_{kind}"))[0] for kind in ("plus", "hybrid")]
    assert counts == [314_002_848, 313_838_768]


@pytest.mark.parametrize("name", NAMES)
def test_one_flag_makes_the_twin_with_the_same_convolution_norm_and_gate(name: str) -> None:
    assert _config(load_recipe(name)) == PARTS | MEMORY
    twin = load_recipe(name, SOFTMAX)
    assert _config(twin) == PARTS | {"decay": "none", "erase": False, "divisor": "key"}
    assert set(_built(twin)[1].layer_types) == {"full_attention"}


@pytest.mark.parametrize(("size", "num_layers"), SIZES.items())
def test_a_hybrid_has_softmax_in_the_last_of_every_four_layers(size: str, num_layers: int) -> None:
    types = _built(load_recipe(f"{size}_hybrid"))[1].layer_types
    assert [i for i, kind in enumerate(types, start=1) if kind == "full_attention"] == list(range(4, num_layers + 1, 4))
    plus, hybrid = load_recipe(f"{size}_plus"), load_recipe(f"{size}_hybrid")
    assert replace_settings(plus, {"model.softmax_every": 4}) == hybrid


def test_at_300m_only_the_block_differs_from_the_published_run() -> None:
    plus, cosine = load_recipe("gpt_300m_plus"), load_recipe("gpt_300m_cosine")
    assert (plus.data, plus.optimizer, plus.training) == (cosine.data, cosine.optimizer, cosine.training)


def test_a_hybrid_and_its_twin_are_trained_and_opened(corpus: Path, tmp_path: Path) -> None:
    options = {f"model__{name}": value for name, value in {**PARTS, **MEMORY, "softmax_every": 2}.items()}
    hybrid = short("gpt", corpus, **options)
    for name, recipe in (("hybrid", hybrid), ("twin", replace_settings(hybrid, SOFTMAX))):
        pretrain(recipe, output_dir=tmp_path / name)
    opened = [CottentionGPTForCausalLM.from_pretrained(tmp_path / name / "model").config for name in ("hybrid", "twin")]
    assert [config.layer_types for config in opened] == [["linear_attention", "full_attention"], ["full_attention"] * 2]
    assert [config.decay for config in opened] == ["data", "none"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"softmax_every": 1}, "model.softmax_every must be from 2 to model.n_layer = 4; got 1"),
        ({"softmax_every": 5}, "model.softmax_every must be from 2 to model.n_layer = 4; got 5"),
        (
            {"softmax_every": 2, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
            "model.softmax_every excludes model.layer_types, which says the same; got both",
        ),
    ],
)
def test_a_number_of_layers_that_makes_no_hybrid_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        GPTModelSettings(n_layer=4, **values)
    assert str(caught.value) == message


def test_states_are_not_carried_through_a_hybrid(corpus: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"^data.carry_state needs layers of linear_attention alone, .*full_attention"
    ):
        tiny_recipe("gpt", corpus, model__softmax_every=2, data__carry_state=True)
