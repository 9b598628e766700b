"""What transformers' clients hand to every forward is read, or refused in one line; float masks are masks, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cottention import models as ours
from cottention.ops import cosine_attention
from tests.models.helpers import ATTENTION_TYPES
from tests.models.test_heads import HEADS, TOKENS, head, inputs_of

MASK = torch.tensor([[1] * 11, [0] * 2 + [1] * 5 + [0] * 4])
MODELS = [*HEADS, "CottentionGPTModel", "CottentionBertModel"]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def mask_of(name: str) -> Tensor:
    return MASK[:, None].expand(-1, 3, -1) if name.endswith("MultipleChoice") else MASK


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_float_mask_is_a_mask(name: str, attention_type: str) -> None:
    model, inputs, mask = head(name, attention_type), inputs_of(name), mask_of(name)
    expected = model(inputs, attention_mask=mask, return_dict=False)[0]
    assert not torch.equal(expected, model(inputs, return_dict=False)[0])
    for dtype in FLOATS:
        assert torch.equal(model(inputs, attention_mask=mask.to(dtype), return_dict=False)[0], expected)
    ones = torch.ones(inputs.shape)
    torch.testing.assert_close(
        model(inputs, attention_mask=ones, return_dict=False)[0], model(inputs, return_dict=False)[0]
    )


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, float("nan"), float("-inf"), -1e-30])
def test_a_float_mask_of_other_values_is_refused(name: str, attention_type: str, value: float) -> None:
    mask = mask_of(name).double()
    mask[-1, -1] = value
    with pytest.raises(ValueError, match=rf"attention_mask must hold 0 .* and 1 .* alone; got {value:g}"):
        head(name, attention_type)(inputs_of(name), attention_mask=mask)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_decoding_takes_a_float_mask(attention_type: str) -> None:
    model = head("CottentionGPTForCausalLM", attention_type, pad_token_id=0)
    mask = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])
    arguments: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(TOKENS, attention_mask=mask, **arguments)
    assert torch.equal(model.generate(TOKENS, attention_mask=mask.float(), **arguments), expected)


@pytest.mark.slow
def test_a_compiled_model_takes_a_float_mask_and_refuses_others() -> None:
    model = head("CottentionBertModel")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(TOKENS, attention_mask=MASK).last_hidden_state
    found = compiled(TOKENS, attention_mask=MASK.float()).last_hidden_state
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match=r"attention_mask must hold 0 .* and 1 .* alone"):
        compiled(TOKENS, attention_mask=MASK / 2)


def test_the_operation_stays_strict() -> None:
    x = torch.ones(1, 3, 1, 2)
    with pytest.raises(TypeError, match="attention_mask must be bool or int"):
        cosine_attention(x, x, x, None, causal=True, attention_mask=torch.ones(1, 3))


@pytest.mark.parametrize("name", MODELS)
def test_words_of_the_library_that_ask_for_nothing_are_taken(name: str) -> None:
    model, inputs = head(name), inputs_of(name)
    expected = model(inputs, return_dict=False)[0]
    words: dict[str, Any] = {
        "use_cache": False,
        "past_key_values": None,
        "cache": None,
        "num_items_in_batch": torch.tensor(7),
        "encoder_hidden_states": None,
        "encoder_attention_mask": None,
        "output_router_logits": False,
        "is_causal": "GPT" in name,
        "token_type_ids": None,
        "output_attentions": False,
        "output_hidden_states": False,
    }
    assert torch.equal(model(inputs, **words, return_dict=False)[0], expected)


@pytest.mark.parametrize("name", MODELS)
def test_words_that_ask_for_what_is_not_there_are_refused(name: str) -> None:
    model, inputs = head(name), inputs_of(name)
    is_gpt = "GPT" in name
    wrong: list[tuple[str, Any, str]] = [
        ("encoder_hidden_states", torch.ones(2, 3, 32), "None.*got Tensor"),
        ("output_router_logits", True, "None or False.*got True"),
        ("is_causal", not is_gpt, f"None or {is_gpt}.*got {not is_gpt}"),
    ]
    wrong += [("token_type_ids", inputs, "None.*got Tensor")] if is_gpt else []
    wrong += [] if is_gpt else [("past_key_values", ours.CosineCache(2), "None.*got CosineCache")]
    for word, value, message in wrong:
        with pytest.raises(ValueError, match=f"{word} of .*forward must be {message}"):
            model(inputs, **{word: value})
    with pytest.raises(TypeError, match="forward got an unexpected keyword argument 'attention_maks'"):
        model(inputs, attention_maks=None)
