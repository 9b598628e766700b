"""Every transformers that we support: the cache under either of its names, given and returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.models.gptj import GPTJConfig, GPTJForCausalLM

from cottention.models import CottentionGPTForCausalLM, CottentionGPTModel
from cottention.models.versions import CACHE_NAME, CACHE_NAMES, cache_of, either_name, with_one_name
from tests.models.helpers import ATTENTION_TYPES, gpt_config, randomised, some_tokens

TOKENS = some_tokens(2, 9)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("kind", [CottentionGPTForCausalLM, CottentionGPTModel])
def test_a_forward_takes_its_cache_under_either_name(kind: Any, attention_type: str, name: str) -> None:
    model = randomised(kind(gpt_config(attention_type)))
    whole = model(TOKENS)[0]
    cache = cache_of(model(TOKENS[:, :4]))
    out = model(TOKENS[:, 4:], **{name: cache})
    torch.testing.assert_close(out[0], whole[:, 4:])
    assert cache_of(out) is cache
    assert out[CACHE_NAME] is cache
    out = model(TOKENS[:, :1], **dict.fromkeys(CACHE_NAMES, cache))
    assert cache_of(out).get_seq_length() == 10, "one cache under both names is one cache"


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_generate_takes_and_returns_its_cache_under_either_name(attention_type: str, name: str) -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config(attention_type)))
    settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    whole = model.generate(TOKENS, max_new_tokens=8, **settings).sequences
    first = model.generate(TOKENS, max_new_tokens=3, **settings)
    rest = model.generate(first.sequences, max_new_tokens=5, **{name: cache_of(first)}, **settings)
    assert torch.equal(rest.sequences, whole)
    assert cache_of(rest) is cache_of(first)


def test_two_different_caches_are_one_clear_line() -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config()))
    one, other = (cache_of(model(TOKENS)) for _ in range(2))
    for call in (model, model.transformer, model.generate):
        with pytest.raises(ValueError, match=r"^past_key_values and cache are two names of one argument; got two"):
            call(TOKENS, past_key_values=one, cache=other)
    assert either_name(None, one) is either_name(one, None) is one
    assert with_one_name({"a": 1, "cache": None}) == {"a": 1}


def test_stock_models_of_this_version_read_the_same_name() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "rotary_dim": 8,
    }
    out = GPTJForCausalLM(GPTJConfig(**sizes)).eval()(TOKENS)
    assert cache_of(out) is not None
    assert CACHE_NAME in out


def test_the_trainer_gathers_no_cache(tmp_path: Any) -> None:
    model = CottentionGPTForCausalLM(gpt_config())
    rows = [{"input_ids": row} for row in TOKENS]
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", use_cache=True)
    trainer = Trainer(model=model, args=arguments)
    predictions: Any = trainer.predict(rows).predictions  # type: ignore[arg-type]
    assert predictions.shape == (2, 9, 61), "the logits alone"
