"""layer_types, by which transformers and accelerate know a recurrent model, and the caches that are made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import big_modeling
from transformers import AutoConfig, DynamicCache

from cottention.errors import SettingsError
from cottention.models import CosineCache, CottentionGPTForCausalLM
from cottention.models.versions import CACHE_NAMES, cache_of
from tests.models.helpers import ATTENTION_TYPES, bert_config, gpt_config, randomised, some_tokens

TOKENS = some_tokens(2, 9)
EXPECTED = {"cosine": ["linear_attention"] * 2, "softmax": ["full_attention"] * 2}
PLAIN: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("make", [gpt_config, bert_config])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_layer_types_follow_the_attention_type_through_save_and_load(
    make: Any, attention_type: str, tmp_path: Path
) -> None:
    config = make(attention_type)
    assert config.layer_types == EXPECTED[attention_type]
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == EXPECTED[attention_type]
    again = type(config).from_pretrained(tmp_path)
    assert again.layer_types == EXPECTED[attention_type]
    assert again.to_dict() == {**config.to_dict(), "_name_or_path": again._name_or_path} or again == config
    other = "softmax" if attention_type == "cosine" else "cosine"
    assert AutoConfig.from_pretrained(tmp_path, attention_type=other).layer_types == EXPECTED[other]
    assert make(attention_type, layer_types=EXPECTED[attention_type]).layer_types == EXPECTED[attention_type]


@pytest.mark.parametrize("make", [gpt_config, bert_config])
@pytest.mark.parametrize(
    "layer_types",
    [
        ["full_attention"] * 2,
        ["linear_attention"],
        ["linear_attention", "sliding_attention"],
        ["no_such"] * 2,
        "linear",
    ],
)
def test_other_layer_types_are_refused(make: Any, layer_types: Any) -> None:
    with pytest.raises(SettingsError, match=r"^layer_types must be 'linear_attention' for each of 2 layers with"):
        make(layer_types=layer_types)
    with pytest.raises(SettingsError, match=r"^layer_types must be 'full_attention' for each of 2 layers with"):
        make("softmax", layer_types=["linear_attention"] * 2)


@pytest.mark.skipif(not hasattr(big_modeling, "_attach_context_parallel_hooks"), reason="an older accelerate")
def test_accelerate_does_not_cut_the_sequences_of_a_recurrent_model() -> None:
    cosine = CottentionGPTForCausalLM(gpt_config())
    attach = big_modeling._attach_context_parallel_hooks
    if "layer_types" not in attach.__code__.co_consts:
        pytest.skip("this accelerate does not ask for layer_types")
    with pytest.raises(ValueError, match="linear_attention"):
        attach(cosine)
    with pytest.raises(ValueError, match="linear_attention"):
        attach(CottentionGPTForCausalLM(gpt_config(layer_types=["full_attention", "linear_attention"])))
    attach(CottentionGPTForCausalLM(gpt_config("softmax")))


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_cache_made_from_the_config_serves_a_loop_and_generate(attention_type: str, name: str) -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config(attention_type)))
    whole = model(TOKENS).logits
    cache = DynamicCache(config=model.config)
    parts = [
        model(TOKENS[:, a:b], position_ids=torch.arange(a, b)[None], **{name: cache}).logits
        for a, b in ((0, 4), (4, 5), (5, 9))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert isinstance(cache, CosineCache if attention_type == "cosine" else DynamicCache)
    assert cache.get_seq_length() == 9
    expected = model.generate(TOKENS, **PLAIN)
    cache = DynamicCache(config=model.config)
    out = model.generate(TOKENS, return_dict_in_generate=True, **{name: cache}, **PLAIN)
    assert torch.equal(out.sequences, expected)
    assert cache_of(out) is cache
    assert cache.get_seq_length() == 9 + 4
    assert torch.equal(model.generate(TOKENS, cache_implementation="dynamic", **PLAIN), expected)


def test_caches_of_other_models_are_one_clear_line() -> None:
    model = CottentionGPTForCausalLM(gpt_config()).eval()
    filled = DynamicCache(config=model.config)
    filled.update_recurrent_state(torch.ones(2, 2, 16, 16), 0)
    caches = [
        (filled, "past_key_values must be a CosineCache for attention_type='cosine'; got DynamicCache"),
        (
            DynamicCache(config=gpt_config("softmax")),
            "past_key_values must be a CosineCache for attention_type='cosine'",
        ),
        (DynamicCache(config=gpt_config(n_layer=3)), "past_key_values must have 2 layers; got 3"),
    ]
    for cache, message in caches:
        with pytest.raises(ValueError, match=f"^{message}"):
            model(TOKENS, past_key_values=cache)
    softmax = CottentionGPTForCausalLM(gpt_config("softmax")).eval()
    with pytest.raises(ValueError, match=r"^past_key_values must hold the tokens so far and no more; got DynamicCache"):
        softmax(TOKENS, past_key_values=DynamicCache(config=model.config))
