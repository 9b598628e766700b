"""Hybrids: a whole pass, cached decoding, padding with holes and packing agree, whatever kinds of layers are mixed."""

from __future__ import annotations

import json
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree
from transformers import AutoConfig, DynamicCache

from cottention.errors import CheckpointError, SettingsError
from cottention.layers import KeyValueState, WindowState
from cottention.models import CosineCache, CottentionGPTConfig, CottentionGPTForCausalLM
from cottention.models.model_card import write_model_card
from cottention.models.versions import CACHE_NAMES, cache_of
from cottention.ops import CosineState
from tests.models.helpers import bert_config, checkpointed, gpt_config, gradients, randomised, some_tokens

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
STATES = {LINEAR: CosineState, FULL: KeyValueState, SLIDING: WindowState}
PLAIN: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
MIX = [LINEAR, FULL, SLIDING]
TOKENS = some_tokens(2, 21)


def hybrid(layer_types: list[str], window: int | None = 4, **settings: Any) -> Any:
    window = window if SLIDING in layer_types else None
    kind = "cosine" if LINEAR in layer_types else "softmax"
    config = gpt_config(kind, n_layer=len(layer_types), layer_types=layer_types, sliding_window=window, **settings)
    return randomised(CottentionGPTForCausalLM(config))


def drawn(seed: int) -> tuple[Any, random.Random]:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    layer_types = [draw.choice(MIX) for _ in range(draw.choice([2, 3, 4]))]
    if set(layer_types) == {FULL}:
        layer_types[draw.randrange(len(layer_types))] = draw.choice([LINEAR, SLIDING])
    settings: dict[str, Any] = {"rotary_dim": draw.choice([None, 4, 8]), "n_head": draw.choice([1, 2, 4])}
    options: dict[str, list[Any]] = {
        "short_conv": [None, 2, 4],
        "output_norm": [False, True],
        "output_gate": [None, "sigmoid", "silu"],
        "decay": ["none", "fixed", "learned", "data"],
        "erase": [False, True],
        "divisor": ["key", "query", "none"],
    }
    if seed % 2:
        settings |= {name: draw.choice(choices) for name, choices in options.items()}
    return hybrid(layer_types, draw.choice([1, 2, 3, 7, 64]), **settings), draw


def spread(tokens: Tensor, length: int, draw: random.Random) -> tuple[Tensor, Tensor]:
    """The same tokens with holes anywhere, and where they are real."""
    ids, mask = torch.zeros(len(tokens), length, dtype=torch.int64), torch.zeros(len(tokens), length, dtype=torch.int64)
    for row, text in enumerate(tokens):
        where = sorted(draw.sample(range(length), len(text)))
        ids[row, where], mask[row, where] = text, 1
    return ids, mask


def check_all_ways(model: Any, draw: random.Random) -> None:
    tokens = some_tokens(2, 21, seed=draw.randrange(99))
    whole = model(tokens, labels=tokens, num_items_in_batch=40)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()

    # Cached, in any pieces.
    cuts = [0, *sorted(draw.sample(range(1, 21), 4)), 20, 21]
    cache: Any = None
    parts = []
    for a, b in pairwise(cuts):
        out = model(tokens[:, a:b], past_key_values=cache, use_cache=True)
        cache = cache_of(out)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits)
    if not model.config.short_conv:
        assert [type(state) for state in cache.states] == [STATES[name] for name in model.config.layer_types]

    # Padded with holes, whole and in pieces.
    ids, mask = spread(tokens, 33, draw)
    where = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    padded = model(ids, attention_mask=mask, **where, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
    torch.testing.assert_close(padded.logits[mask.bool()].view_as(whole.logits), whole.logits)
    cache, parts = None, []
    for a, b in pairwise([0, 5, 6, 20, 33]):
        seen = draw.choice([mask[:, :b], mask[:, a:b]])
        positions = where["position_ids"][:, a:b]
        out = model(ids[:, a:b], seen, position_ids=positions, past_key_values=cache, use_cache=True)
        cache = cache_of(out)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask.bool()].view_as(whole.logits), whole.logits)

    # Packed, with gradients.
    bounds = torch.tensor([0, 21, 42], dtype=torch.int32)
    packed = model(tokens.view(1, -1), labels=tokens.view(1, -1), cu_seqlens=bounds)
    torch.testing.assert_close(packed.logits.view_as(whole.logits), whole.logits)
    packed.loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])
    model.zero_grad()

    # The maps, which there are none of where tokens are erased, tell the same, and checkpoints change nothing.
    erases = model.config.erase and LINEAR in model.config.layer_types
    seen = model(tokens, output_attentions=not erases, use_cache=False)
    torch.testing.assert_close(seen.logits, whole.logits)
    window = model.config.sliding_window
    for name, weights in () if erases else zip(model.config.layer_types, seen.attentions, strict=True):
        assert weights.shape == (2, model.config.n_head, 21, 21)
        if name == SLIDING:
            assert torch.equal(weights != 0, torch.ones(21, 21).tril().triu(1 - window).bool().expand_as(weights))
    checkpointed(model.train())
    model(tokens, labels=tokens, num_items_in_batch=40).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("seed", range(4))
def test_drawn_hybrids_agree_every_way(seed: int) -> None:
    check_all_ways(*drawn(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 60))
def test_more_drawn_hybrids_agree_every_way(seed: int) -> None:
    check_all_ways(*drawn(seed))


def test_full_attention_alone_is_the_softmax_model_bit_for_bit() -> None:
    twin = randomised(CottentionGPTForCausalLM(gpt_config("softmax")))
    ours = hybrid([FULL, FULL])
    assert ours.config.to_dict() == twin.config.to_dict()
    assert torch.equal(ours(TOKENS).logits, twin(TOKENS).logits)
    assert type(cache_of(ours(TOKENS, use_cache=True))) is DynamicCache


@pytest.mark.parametrize("layer_types", [[SLIDING, SLIDING], [SLIDING, FULL]])
def test_a_window_wider_than_the_text_is_full_attention(layer_types: list[str]) -> None:
    twin = randomised(CottentionGPTForCausalLM(gpt_config("softmax")))
    torch.testing.assert_close(hybrid(layer_types, 21)(TOKENS).logits, twin(TOKENS).logits)
    assert not torch.allclose(hybrid(layer_types, 20)(TOKENS).logits, twin(TOKENS).logits)


@pytest.mark.parametrize("layer_types", [MIX, [SLIDING, LINEAR], [SLIDING, FULL]])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"prefill_chunk_size": 4}],
    ids=["greedy", "beams", "sampling", "chunked"],
)
def test_generate_equals_decoding_without_a_cache(layer_types: list[str], settings: dict[str, Any]) -> None:
    model = hybrid(layer_types)
    short, long = TOKENS[:1, :9], some_tokens(1, 13, seed=5)
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], dim=1), long])
    mask = torch.tensor([[0] * 4 + [1] * 9, [1] * 13])
    torch.manual_seed(1)
    got = model.generate(ids, attention_mask=mask, **{**PLAIN, **settings})
    torch.manual_seed(1)
    without = {name: value for name, value in settings.items() if name != "prefill_chunk_size"}
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **{**PLAIN, **without})
    assert torch.equal(got, expected)
    if not settings.get("do_sample"):
        assert torch.equal(got[:1, 4:], model.generate(short, **{**PLAIN, **settings}))


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("layer_types", [MIX, [FULL, LINEAR], [SLIDING, FULL]])
def test_a_cache_made_from_the_config_serves_a_loop_and_generate(layer_types: list[str], name: str) -> None:
    model = hybrid(layer_types)
    cache = DynamicCache(config=model.config)
    parts = [model(TOKENS[:, a:b], **{name: cache}).logits for a, b in ((0, 4), (4, 5), (5, 21))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(TOKENS).logits)
    assert isinstance(cache, CosineCache)
    assert cache.get_seq_length() == 21
    given: Any = DynamicCache(config=model.config)
    out = model.generate(TOKENS, return_dict_in_generate=True, **{name: given}, **PLAIN)
    assert torch.equal(out.sequences, model.generate(TOKENS, **PLAIN))
    assert cache_of(out) is given
    assert cache_of(out).get_seq_length() == 21 + 11


def test_rows_of_a_cache_are_picked_repeated_saved_and_forgotten(tmp_path: Path) -> None:
    model = hybrid(MIX)
    texts = some_tokens(3, 12)
    cache = cache_of(model(texts, use_cache=True))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 0, 2, 2]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    cache.layers[1].offload()
    cache.layers[1].prefetch()
    save_file(cache.to_tensors(), tmp_path / "states")
    cache = CosineCache.from_tensors(load_file(tmp_path / "states"))
    leaves, structure = pytree.tree_flatten(cache)
    assert pytree.tree_unflatten(leaves, structure) is cache
    cache = pytree.tree_unflatten([leaf.clone() for leaf in leaves], structure)
    following = some_tokens(3, 5, seed=3)
    got = model(following, past_key_values=cache).logits
    texts = texts[[2, 0, 1]]
    torch.testing.assert_close(got, model(torch.cat([texts, following], dim=1)).logits[:, -5:])
    held = cache.nbytes
    assert held == sum(part.nbytes for state in cache.states for part in state if part is not None)
    with pytest.raises(ValueError, match=r"^a CosineCache cannot forget single tokens; got crop\(-1\)"):
        cache.crop(-1)
    cache.reset()
    assert cache.states == (None,) * 3
    torch.testing.assert_close(model(following, past_key_values=cache).logits, model(following).logits)


def test_columns_that_are_counted_anew_change_nothing() -> None:
    model = hybrid(MIX)
    cache = cache_of(model(TOKENS[:, :9], use_cache=True))
    cache.restart_columns()
    rest = model(TOKENS[:, 9:], attention_mask=torch.ones(2, 12, dtype=torch.int64), past_key_values=cache).logits
    torch.testing.assert_close(rest, model(TOKENS).logits[:, 9:])


def test_what_a_sliding_hybrid_keeps_has_one_size() -> None:
    model = hybrid([LINEAR, SLIDING], 5)
    caches = [cache_of(model(some_tokens(1, T), use_cache=True)) for T in (5, 50, 200)]
    assert len({cache.nbytes for cache in caches}) == 1
    assert not model.config.keeps_every_key


def test_settings_go_through_save_and_load(tmp_path: Path) -> None:
    model = hybrid(MIX).float()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["layer_types"], written["sliding_window"]) == (MIX, 4)
    assert "_layer_types" not in written
    config = AutoConfig.from_pretrained(tmp_path)
    assert config == model.config or config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    again = CottentionGPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert CottentionGPTConfig(**model.config.to_dict()).layer_types == MIX
    write_model_card(tmp_path, metrics={})
    words = "cosine (1 of 3 layers) and softmax (1 of 3 layers) and sliding-window softmax (1 of 3 layers) attention"
    assert words in (tmp_path / "README.md").read_text()


def test_a_config_without_a_mix_is_written_as_before(tmp_path: Path) -> None:
    for kind in ("cosine", "softmax"):
        gpt_config(kind).save_pretrained(tmp_path)
        assert "sliding_window" not in json.loads((tmp_path / "config.json").read_text())
        assert "layer_types" not in gpt_config(kind).to_dict()


@pytest.mark.parametrize(
    ("layer_types", "line"),
    [([FULL, LINEAR, LINEAR], "holds transformer.h.2.attn.norm_const"), ([LINEAR] * 3, "lacks")],
)
def test_layers_of_other_kinds_than_the_weights_are_one_line(layer_types: list[str], line: str, tmp_path: Path) -> None:
    hybrid([LINEAR, FULL, LINEAR]).save_pretrained(tmp_path)
    mine = [LINEAR, LINEAR, FULL] if line.startswith("holds") else [LINEAR, LINEAR, SLIDING]
    window: dict[str, Any] = {"sliding_window": 4} if SLIDING in mine else {}
    with pytest.raises(CheckpointError, match=r"its cosine layers are others than those of layer_types$"):
        CottentionGPTForCausalLM.from_pretrained(tmp_path, layer_types=mine, **window)


def refusals() -> list[tuple[dict[str, Any], str]]:
    cosine = "layer_types must be 'linear_attention' for each of 2 layers with attention_type='cosine', or "
    softmax = "layer_types must be 'full_attention' for each of 2 layers with attention_type='softmax', or "
    names = "one of linear_attention, full_attention, sliding_attention for each; got "
    return [
        ({"layer_types": [LINEAR]}, f"{cosine}a list of so many names; got 1"),
        ({"layer_types": [LINEAR] * 100_000}, f"{cosine}a list of so many names; got 100000"),
        ({"layer_types": {"a": 1}}, f"{cosine}a list of so many names; got dict"),
        ({"layer_types": [LINEAR, "ful_attention"]}, f"{cosine}{names}'ful_attention'; did you mean 'full_attention'?"),
        ({"layer_types": [LINEAR, 7]}, f"{cosine}{names}7"),
        ({"layer_types": [LINEAR, "x" * 10_000]}, f"{cosine}{names}'{'x' * 39}..."),
        ({"layer_types": [FULL, FULL]}, f"{cosine}others beside it (attention_type='softmax' has none); got no"),
        ({"layer_types": [LINEAR, SLIDING]}, f"{cosine}'sliding_attention' beside a sliding_window"),
        ({"layer_types": [LINEAR, FULL], "attention_type": "softmax"}, f"{softmax}'sliding_attention'"),
        ({"layer_types": [LINEAR, FULL], "sliding_window": 4}, "sliding_window needs 'sliding_attention' in"),
        ({"sliding_window": 4}, "sliding_window needs 'sliding_attention' in layer_types; got 4"),
        ({"layer_types": [LINEAR, SLIDING], "sliding_window": 0}, "sliding_window must be at least 1; got 0"),
        ({"layer_types": [LINEAR, SLIDING], "sliding_window": 1 << 40}, "sliding_window must be at most"),
    ]


@pytest.mark.parametrize(("settings", "line"), refusals())
def test_lists_that_make_no_model_are_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(line)}") as caught:
        gpt_config(settings.pop("attention_type", "cosine"), **settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_edited_settings_are_checked_where_a_model_is_built(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^sliding_window must be an int; got '4'"):
        gpt_config(layer_types=[LINEAR, SLIDING], sliding_window="4")
    config = gpt_config(n_layer=3, layer_types=MIX, sliding_window=4)
    config.n_layer = 2
    with pytest.raises(SettingsError, match=r"got 3$"):
        CottentionGPTForCausalLM(config)
    hybrid(MIX).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=r"^layer_types must be 'full_attention' for each of 3 layers"):
        AutoConfig.from_pretrained(tmp_path, attention_type="softmax")
    own = {"attention_type": "softmax", "layer_types": [SLIDING, FULL, FULL]}
    assert AutoConfig.from_pretrained(tmp_path, **own).layer_types == [SLIDING, FULL, FULL]
    with pytest.raises(SettingsError, match="or one of linear_attention, full_attention for each; got 'sliding_atten"):
        bert_config(layer_types=[LINEAR, SLIDING], sliding_window=4)


def test_caches_of_other_models_are_one_line() -> None:
    model = hybrid(MIX)
    other = cache_of(hybrid([LINEAR, SLIDING, SLIDING])(TOKENS, use_cache=True))
    with pytest.raises(
        ValueError, match=r"^layer 1 of past_key_values must hold a KeyValueState, as it is full_attent"
    ):
        model(TOKENS, past_key_values=other)
    filled = DynamicCache(config=model.config)
    filled.update(torch.ones(2, 2, 1, 16), torch.ones(2, 2, 1, 16), 1)
    with pytest.raises(ValueError, match=r"^past_key_values must be a CosineCache for a mix of layer_types; got Dyn"):
        model(TOKENS, past_key_values=filled)
    bounds = torch.tensor([0, 9, 21])
    with pytest.raises(ValueError, match=r"^use_cache and past_key_values exclude cu_seqlens"):
        model(TOKENS[:1], cu_seqlens=bounds, use_cache=True)
    with pytest.raises(ValueError, match=r"^output_attentions needs every key"):
        model(TOKENS, past_key_values=cache_of(model(TOKENS)), output_attentions=True)
    with pytest.raises(ValueError, match=r"^cache_implementation must be left out or 'dynamic' for a hybrid"):
        model.generate(TOKENS, cache_implementation="static", **PLAIN)


def test_it_is_stateful_unless_every_layer_keeps_every_key() -> None:
    assert hybrid(MIX)._is_stateful is True
    assert hybrid([SLIDING, FULL])._is_stateful is True
    assert hybrid([FULL, FULL])._is_stateful is False


def test_a_hybrid_reads_past_its_window_of_training() -> None:
    model = hybrid(MIX)
    assert model(some_tokens(1, 200)).logits.shape == (1, 200, 61)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's compiler uses it itself
@pytest.mark.parametrize("packed", [False, True])
def test_a_hybrid_compiles_whole(packed: bool) -> None:
    torch.compiler.reset()
    model = hybrid(MIX).float()
    tokens = some_tokens(1, 200) if packed else some_tokens(2, 200)
    given: dict[str, Any] = {"labels": tokens}
    if packed:
        given["cu_seqlens"] = torch.tensor([0, 50, 200], dtype=torch.int32)
    else:
        given["attention_mask"] = (torch.rand(2, 200) > 0.2).long()
    eager = model(tokens, **given)
    eager.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)(tokens, **given)
    compiled.loss.backward()
    torch.testing.assert_close(compiled.loss, eager.loss)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_hybrid_is_exported_for_any_batch_and_length() -> None:
    model = hybrid(MIX, use_cache=False).float()
    free = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=512)}
    shapes = {"input_ids": free, "attention_mask": free}

    def inputs(B: int, T: int) -> dict[str, Tensor]:
        mask = torch.ones(B, T, dtype=torch.int64)
        mask[0, : T // 3] = 0
        return {"input_ids": some_tokens(B, T), "attention_mask": mask}

    program = torch.export.export(model, (), inputs(2, 7), dynamic_shapes=shapes).module()
    for B, T in ((1, 3), (3, 200)):
        given = inputs(B, T)
        real = given["attention_mask"].bool()
        found, expected = program(**given).logits[real], model(**given).logits[real]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
