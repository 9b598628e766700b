"""generate with the recurrent cache: every way of decoding, batches, padding, continuation, at constant memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from cottention.models import CosineCache, CottentionGPTForCausalLM
from cottention.ops import CosineState
from tests.models.helpers import ATTENTION_TYPES, gpt_config, randomised, some_tokens

PROMPT = some_tokens(2, 9)
PLAIN: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def gpt(attention_type: str = "cosine", **settings: Any) -> Any:
    return randomised(CottentionGPTForCausalLM(gpt_config(attention_type, **settings)))


def by_hand(model: Any, prompt: Tensor, num_tokens: int) -> Tensor:
    """Greedy decoding without any cache."""
    tokens = prompt
    for _ in range(num_tokens):
        following = model(tokens, use_cache=False).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, following[:, None]], dim=1)
    return tokens


def padded_left(prompt: Tensor, pads: int) -> tuple[Tensor, Tensor]:
    tokens = torch.cat([torch.zeros(len(prompt), pads, dtype=torch.int64), prompt], dim=1)
    return tokens, (torch.arange(tokens.shape[1]) >= pads).long().expand(len(prompt), -1)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_greedy_text_equals_text_without_a_cache(attention_type: str) -> None:
    model = gpt(attention_type)
    expected = by_hand(model, PROMPT, 12)
    for settings in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        assert torch.equal(model.generate(PROMPT, **PLAIN, **settings), expected)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"prefill_chunk_size": 4}],
    ids=["greedy", "beams", "sampling", "chunked"],
)
def test_a_left_padded_batch_writes_what_each_text_writes_alone(attention_type: str, settings: dict[str, Any]) -> None:
    model, long = gpt(attention_type), some_tokens(1, 13, seed=5)
    short, mask = padded_left(PROMPT[:1], 4)
    arguments = {**PLAIN, **settings}
    batch = {"input_ids": torch.cat([short, long]), "attention_mask": torch.cat([mask, torch.ones_like(long)])}
    if settings.get("do_sample"):
        # One random draw per row and step: rows are compared by what a batch of the same shape draws.
        torch.manual_seed(1)
        alone = model.generate(torch.cat([long, long]), **arguments)[1:]
        torch.manual_seed(1)
        assert torch.equal(model.generate(**batch, **arguments)[1:], alone)
        return
    got = model.generate(**batch, **arguments)
    assert torch.equal(got[:1, 4:], model.generate(PROMPT[:1], **arguments))
    assert torch.equal(got[1:], model.generate(long, **arguments))


def test_beams_equal_beams_without_a_cache() -> None:
    model = gpt()
    settings = {**PLAIN, "num_beams": 4, "num_return_sequences": 2}
    assert torch.equal(model.generate(PROMPT, **settings), model.generate(PROMPT, use_cache=False, **settings))


def test_sampling_equals_sampling_without_a_cache() -> None:
    model, texts = gpt(), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(
            model.generate(PROMPT, max_new_tokens=12, do_sample=True, num_return_sequences=3, use_cache=use_cache)
        )
    assert texts[0].shape == (6, 21)
    assert torch.equal(*texts)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_continuing_from_a_cache_equals_writing_on(attention_type: str, padded: bool) -> None:
    model = gpt(attention_type)
    tokens, mask = padded_left(PROMPT, 3) if padded else (PROMPT, torch.ones_like(PROMPT))
    whole = model.generate(tokens, attention_mask=mask, **{**PLAIN, "max_new_tokens": 20})
    first = model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, **{**PLAIN, "max_new_tokens": 8})
    seen = torch.cat([mask, torch.ones(2, 8, dtype=torch.int64)], dim=1)
    again = model.generate(first.sequences, attention_mask=seen, past_key_values=first.past_key_values, **PLAIN)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prefill_chunk_size", [None, 2])
def test_generate_goes_on_where_a_forward_stopped(padded: bool, prefill_chunk_size: int | None) -> None:
    # A forward counts padding in its positions, generate does not: the cache must know which it was.
    model = gpt()
    tokens, mask = padded_left(PROMPT, 3) if padded else (PROMPT, torch.ones_like(PROMPT))
    expected = model.generate(tokens, attention_mask=mask, **PLAIN)
    cache = model(tokens[:, :6], mask[:, :6]).past_key_values
    arguments = {"attention_mask": mask, "past_key_values": cache, "prefill_chunk_size": prefill_chunk_size, **PLAIN}
    if prefill_chunk_size is not None and transformers.__version__ < "5.23":
        with pytest.raises(ValueError, match=r"a filled past_key_values needs transformers 5\.23"):
            model.generate(tokens, **arguments)
        return
    assert torch.equal(model.generate(tokens, **arguments), expected)


def test_new_tokens_alone_continue_with_a_mask_over_everything() -> None:
    model = gpt()
    cache = model(PROMPT[:, :6]).past_key_values
    mask = torch.ones_like(PROMPT)
    got = model.generate(PROMPT[:, 6:], attention_mask=mask, past_key_values=cache, **PLAIN)
    assert torch.equal(got, model.generate(PROMPT, **PLAIN)[:, 6:])
    cache = model(PROMPT[:, :6]).past_key_values
    with pytest.raises(ValueError, match=r"give input_ids of the whole text.* the cache holds 6 tokens, got 3"):
        model.generate(PROMPT[:, 6:], past_key_values=cache, **PLAIN)


def test_positions_go_on_after_explicit_ones() -> None:
    model = gpt()
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 6, 7, 8, 9, 10]])
    mask = torch.ones_like(PROMPT)
    mask[0, :3] = 0
    whole = model(PROMPT, mask, position_ids=positions).logits
    for cut in (2, 4, 8):
        cache = model(PROMPT[:, :cut], mask[:, :cut], position_ids=positions[:, :cut]).past_key_values
        rest = model(PROMPT[:, cut:], mask, past_key_values=cache).logits
        torch.testing.assert_close(rest, whole[:, cut:])


def test_decoding_memory_does_not_grow() -> None:
    model = gpt(n_positions=16)
    sizes = []
    for length in (1, 15, 200):
        out = model.generate(PROMPT, **{**PLAIN, "max_new_tokens": length}, return_dict_in_generate=True)
        cache = out.past_key_values
        assert isinstance(cache, CosineCache)
        assert cache.get_seq_length() == 9 + length - 1
        sizes.append(cache.nbytes)
    # 2 layers x 2 rows x (2 heads x 16 x 16 float64 numbers and one count)
    assert sizes == [2 * 2 * (2 * 16 * 16 * 8 + 8)] * 3


def test_cosine_writes_past_n_positions_and_softmax_refuses() -> None:
    model = gpt(n_positions=12)
    assert torch.equal(model.generate(PROMPT, **PLAIN), by_hand(model, PROMPT, 12))
    with pytest.raises(ValueError) as caught:
        gpt("softmax", n_positions=12).generate(PROMPT, **PLAIN)
    assert str(caught.value) == "the text must have at most 12 tokens (n_positions of this model); got 13"


def test_the_cache_keeps_no_gradient() -> None:
    model = gpt()
    out = model(PROMPT, use_cache=True)
    assert out.logits.requires_grad
    assert all(not state.kv.requires_grad for state in out.past_key_values.states)
    model.train()
    assert model(PROMPT).past_key_values is None


def test_rows_can_be_reordered_repeated_and_selected() -> None:
    model = gpt()

    def after(change: Any) -> Tensor:
        tokens, mask = padded_left(PROMPT, 2)
        mask = mask.clone()
        mask[1] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = model(tokens, mask, position_ids=positions).past_key_values
        change(cache)
        return model(torch.full((len(cache.next_position), 1), 7), past_key_values=cache).logits

    plain = after(lambda cache: None)
    assert not torch.allclose(plain[0], plain[1])
    changes: list[tuple[list[int], Any]] = [
        ([1, 1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0]))),
        ([0, 0, 1, 1], lambda cache: cache.batch_repeat_interleave(2)),
        ([1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
    ]
    for rows, change in changes:
        torch.testing.assert_close(after(change), plain[rows])


def test_a_reset_cache_is_a_new_one() -> None:
    model = gpt()
    cache = model(PROMPT).past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.states == (None, None)
    torch.testing.assert_close(model(PROMPT, past_key_values=cache).logits, model(PROMPT).logits)
    CosineCache(2).reset()


def test_a_cache_can_be_saved_and_restored(tmp_path: Path) -> None:
    model = gpt()
    tokens, mask = padded_left(PROMPT, 2)
    cache = model(tokens, mask).past_key_values
    assert all(isinstance(state, CosineState) for state in cache.states)
    save_file(cache.to_tensors(), tmp_path / "state.safetensors")
    restored = CosineCache.from_tensors(load_file(tmp_path / "state.safetensors"))
    assert restored.get_seq_length() == 11
    step = torch.full((2, 1), 7)
    assert torch.equal(model(step, past_key_values=restored).logits, model(step, past_key_values=cache).logits)
    with pytest.raises(ValueError, match="got an empty one"):
        CosineCache(2).to_tensors()


def test_a_cache_can_be_offloaded_and_is_never_changed_in_place() -> None:
    model = gpt()
    cache = model(PROMPT).past_key_values
    before = [state.kv for state in cache.states]
    copies = [kv.clone() for kv in before]
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    model(torch.full((2, 1), 7), past_key_values=cache)
    assert all(torch.equal(kv, copy) for kv, copy in zip(before, copies, strict=True))


def test_caches_that_do_not_fit_are_named() -> None:
    cosine, softmax = gpt(), gpt("softmax")
    with pytest.raises(ValueError, match="must be a CosineCache for attention_type='cosine'; got DynamicCache"):
        cosine(PROMPT, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="must be a DynamicCache for attention_type='softmax'; got CosineCache"):
        softmax(PROMPT, past_key_values=CosineCache(2))
    with pytest.raises(ValueError, match="past_key_values must have 2 layers; got 3"):
        cosine(PROMPT, past_key_values=CosineCache(3))
    with pytest.raises(ValueError, match=r"cache_implementation must be left out .*; got 'static'"):
        cosine.generate(PROMPT, cache_implementation="static", **PLAIN)
    with pytest.raises(ValueError, match="past_key_values must hold the tokens so far and no more; got StaticCache"):
        softmax.generate(PROMPT, cache_implementation="static", **PLAIN)
    cache = softmax(PROMPT).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask must cover the 9 cached tokens too, 10 columns.*; got 1"):
        softmax(PROMPT[:, :1], torch.ones(2, 1), past_key_values=cache)


def test_a_recurrent_cache_cannot_be_rolled_back() -> None:
    model = gpt()
    cache = model(PROMPT).past_key_values
    cache.crop(0)
    with pytest.raises(ValueError, match=r"a CosineCache cannot forget single tokens; got crop\(-1\)"):
        cache.crop(-1)
    with pytest.raises(TypeError, match="stores recurrent states"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(PROMPT[:1], prompt_lookup_num_tokens=2, **PLAIN)


def test_logits_to_keep_computes_the_last_ones_only() -> None:
    model = gpt()
    whole = model(PROMPT).logits
    torch.testing.assert_close(model(PROMPT, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(PROMPT, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])


def test_embedded_prompts_generate_the_same() -> None:
    model = gpt()
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(PROMPT), **PLAIN)
    assert torch.equal(embedded, model.generate(PROMPT, **PLAIN)[:, 9:])


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_continuous_batching_is_refused_before_it_starts(attention_type: str) -> None:
    with pytest.raises(
        ValueError, match=r"^generate_batch needs a paged cache of keys and values, which our models have"
    ):
        gpt(attention_type).generate_batch([[5, 6, 7], [8, 9]])
