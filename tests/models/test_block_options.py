"""Models with optional parts in their attention: every way to read a text gives the same, in any combination."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from cottention.errors import CheckpointError, SettingsError
from cottention.models import (
    CosineCache,
    CottentionBertForMaskedLM,
    CottentionGPTForCausalLM,
)
from cottention.models.versions import cache_of
from cottention.training.optimizer import build_optimizer
from cottention.training.recipe_sections import OptimizerSettings
from tests.models.helpers import bert_config, checkpointed, gpt_config, gradients, randomised, some_tokens

ALL_ON: dict[str, Any] = {
    "short_conv": 4,
    "output_norm": True,
    "output_gate": "silu",
    "decay": "data",
    "erase": True,
    "divisor": "none",
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "short_conv": (None, 2, 4, 4),
    "output_norm": (False, True),
    "output_gate": (None, "sigmoid", "silu"),
    "decay": ("none", "fixed", "learned", "data"),
    "erase": (False, True),
    "divisor": ("key", "query", "none"),
}
_MIXES = (None, ["linear_attention", "full_attention"], ["sliding_attention", "linear_attention"])
TOKENS = some_tokens(2, 13)
MASK = torch.tensor([[1] * 13, [0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]])
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0)


def drawn(count: int, seed: int, *, causal: bool) -> list[Any]:
    """Settings of models, any of all combinations."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        settings = {name: source.choice(values) for name, values in _CHOICES.items()}
        settings["attention_type"] = source.choice(["cosine", "cosine", "softmax"])
        if not causal:
            settings["erase"] = False
        elif settings["attention_type"] == "cosine" and (mix := source.choice(_MIXES)):
            settings["layer_types"] = mix
            settings["sliding_window"] = 5 if "sliding_attention" in mix else None
        found.append(pytest.param(settings, id=",".join(str(value) for value in settings.values())))
    return found


def slowly(params: list[Any]) -> list[Any]:
    return [pytest.param(*each.values, id=each.id, marks=pytest.mark.slow) for each in params]


def gpt(settings: dict[str, Any]) -> Any:
    return randomised(CottentionGPTForCausalLM(gpt_config(**settings)))


GPTS = [pytest.param(ALL_ON, id="all"), *drawn(4, 1, causal=True), *slowly(drawn(60, 2, causal=True))]
BERTS = [*drawn(4, 3, causal=False), *slowly(drawn(40, 4, causal=False))]


@pytest.mark.parametrize("settings", GPTS)
def test_a_gpt_reads_alike_whole_padded_packed_and_in_parts(settings: dict[str, Any]) -> None:
    model = gpt(settings)
    real = MASK[1].bool()
    alone = [model(TOKENS[:1]).logits[0], model(TOKENS[1:, real]).logits[0]]
    padded = model(TOKENS, attention_mask=MASK, position_ids=POSITIONS).logits
    torch.testing.assert_close(padded[0], alone[0])
    torch.testing.assert_close(padded[1, real], alone[1])
    packed = torch.cat([TOKENS[0], TOKENS[1, real]])[None]
    bounds = torch.tensor([0, 13, 13 + int(real.sum())], dtype=torch.int32)
    torch.testing.assert_close(model(packed, cu_seqlens=bounds).logits[0], torch.cat(alone))
    for cuts in ([0, 1, 2, 7, 13], [0, 6, 13]):
        cache, found = None, []
        for a, b in itertools.pairwise(cuts):
            told = {"attention_mask": MASK[:, :b], "position_ids": POSITIONS[:, a:b]}
            output = model(TOKENS[:, a:b], past_key_values=cache, use_cache=True, **told)
            cache, found = cache_of(output), [*found, output.logits]
        logits = torch.cat(found, dim=1)
        torch.testing.assert_close(logits[0], alone[0])
        torch.testing.assert_close(logits[1, real], alone[1])


@pytest.mark.parametrize("settings", GPTS)
def test_generation_is_what_whole_forwards_say(settings: dict[str, Any]) -> None:
    model = gpt(settings)
    prompt, options = TOKENS[:, :6], {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(prompt, max_new_tokens=9, **options)
    ids = prompt
    for _ in range(9):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(greedy, ids)
    beams = {**options, "num_beams": 3, "max_new_tokens": 6}
    assert torch.equal(model.generate(prompt, **beams), model.generate(prompt, use_cache=False, **beams))
    # a shorter text beside it, padded on the left, goes on as if it stood alone
    left = torch.cat([torch.zeros(1, 2, dtype=torch.int64), TOKENS[1:, :4]], dim=1)
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    both = model.generate(torch.cat([TOKENS[:1, :6], left]), attention_mask=mask, max_new_tokens=9, **options)
    assert torch.equal(both[0], greedy[0])
    assert torch.equal(both[1, 6:], model.generate(TOKENS[1:, :4], max_new_tokens=9, **options)[0, 4:])


@pytest.mark.parametrize("settings", [each for each in GPTS if each.values[0].get("attention_type") != "softmax"][:4])
def test_states_are_saved_picked_repeated_and_taken_apart(settings: dict[str, Any], tmp_path: Path) -> None:
    model, following = gpt(settings), some_tokens(3, 4, seed=9)
    cache = cache_of(model(TOKENS, use_cache=True))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1]))
    save_file(cache.to_tensors(), tmp_path / "states")
    cache = CosineCache.from_tensors(load_file(tmp_path / "states"))
    leaves, structure = pytree.tree_flatten(cache)
    cache = pytree.tree_unflatten([leaf.clone() for leaf in leaves], structure)
    expected = model(torch.cat([TOKENS[[1, 0, 0]], following], dim=1)).logits[:, -4:]
    for taken in (copy.deepcopy(cache), cache):
        torch.testing.assert_close(model(following, past_key_values=taken).logits, expected)
    with pytest.raises(ValueError, match=r"^a CosineCache cannot forget single tokens"):
        cache.crop(-1)


def test_a_softmax_model_with_short_conv_keeps_what_its_convolutions_read() -> None:
    model = gpt({"attention_type": "softmax", "short_conv": 4})
    cache = cache_of(model(TOKENS, use_cache=True))
    assert isinstance(cache, CosineCache)
    states: Any = cache.states
    assert [tuple(state.inputs.shape) for state in states] == [(2, 3, 96)] * 2
    restored = CosineCache.from_tensors(cache.to_tensors())
    following = some_tokens(2, 3, seed=4)
    expected = model(torch.cat([TOKENS, following], dim=1)).logits[:, -3:]
    torch.testing.assert_close(model(following, past_key_values=restored).logits, expected)


@pytest.mark.parametrize("settings", BERTS)
def test_a_bert_reads_alike_padded_and_packed(settings: dict[str, Any]) -> None:
    model, real = randomised(CottentionBertForMaskedLM(bert_config(**settings))), MASK[1].bool()
    alone = [model(TOKENS[:1]).logits[0], model(TOKENS[1:, real]).logits[0]]
    told = {"attention_mask": MASK, "position_ids": POSITIONS}
    for output in (model(TOKENS, **told), model(TOKENS, output_attentions=True, **told)):
        torch.testing.assert_close(output.logits[0], alone[0])
        torch.testing.assert_close(output.logits[1, real], alone[1])
    packed = torch.cat([TOKENS[0], TOKENS[1, real]])[None]
    bounds = torch.tensor([0, 13, 13 + int(real.sum())], dtype=torch.int32)
    torch.testing.assert_close(model(packed, cu_seqlens=bounds).logits[0], torch.cat(alone))


FAMILIES: list[tuple[Any, Any, dict[str, Any]]] = [
    (CottentionGPTForCausalLM, gpt_config, ALL_ON),
    (CottentionGPTForCausalLM, gpt_config, {**ALL_ON, "attention_type": "softmax"}),
    (CottentionBertForMaskedLM, bert_config, {**ALL_ON, "erase": False, "decay": "learned"}),
]


@pytest.mark.parametrize(("kind", "make", "settings"), FAMILIES)
def test_checkpointing_changes_no_gradient(kind: Any, make: Any, settings: dict[str, Any]) -> None:
    found = []
    for change in (lambda model: model, checkpointed):
        model = change(randomised(kind(make(**settings)))).train()
        model(TOKENS, attention_mask=MASK, labels=TOKENS.masked_fill(MASK == 0, -100)).loss.backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found)
    assert all(gradient.abs().sum() > 0 for name, gradient in found[0].items() if "conv" in name or "decay" in name)


@pytest.mark.parametrize(("kind", "make", "settings"), FAMILIES)
def test_saved_and_opened_it_is_the_same(kind: Any, make: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    model = kind(make(**settings)).eval()
    model.save_pretrained(tmp_path)
    opened, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(opened.eval()(TOKENS).logits, model(TOKENS).logits)
    assert {name: getattr(opened.config, name) for name in settings} == settings
    short = kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {name for name, x in short.state_dict().items() if x.dtype == torch.float32}
    assert kept == {name for name in short.state_dict() if ".decay." in name or name.endswith("norm_const")}
    assert short(TOKENS).logits.isfinite().all()


def test_weights_of_options_that_are_off_are_refused(tmp_path: Path) -> None:
    CottentionGPTForCausalLM(gpt_config(**ALL_ON)).save_pretrained(tmp_path, seal=False)
    with pytest.raises(
        CheckpointError, match=r"holds transformer\.h\.0\.attn\.k_conv\.weight, an option of attention "
    ):
        CottentionGPTForCausalLM.from_pretrained(tmp_path, short_conv=None)
    CottentionGPTForCausalLM(gpt_config()).save_pretrained(tmp_path / "plain", seal=False)
    with pytest.raises(CheckpointError, match=r"must hold every weight of the model; 6 are missing"):
        CottentionGPTForCausalLM.from_pretrained(tmp_path / "plain", short_conv=4)


def test_a_fresh_model_starts_where_its_parts_say() -> None:
    model = CottentionGPTForCausalLM(gpt_config(n_head=4, **{**ALL_ON, "output_gate": "sigmoid"}))
    attn: Any = model.transformer.h[1].attn
    half_lives = -torch.log(torch.tensor(2.0)) / attn.decay(torch.zeros(1, 1, 32))[0, 0]
    torch.testing.assert_close(half_lives, torch.tensor([8.0, 16.0, 32.0, 64.0]))
    assert (attn.gate_proj.bias == 4).all()
    assert (attn.output_norm.weight == 1).all()
    assert (attn.q_conv.weight[:, -1] == 1).all()
    assert 0.01 < attn.q_conv.weight[:, :-1].std() < 0.03


def test_some_parameters_do_not_decay() -> None:
    settings = OptimizerSettings(weight_decay=0.1)
    model = CottentionGPTForCausalLM(gpt_config(**ALL_ON))
    decaying, kept = build_optimizer(model, settings).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decaying["weight_decay"], kept["weight_decay"]) == (0.1, 0)
    assert {names[id(x)] for x in kept["params"]} == {
        name for name in names.values() if ".decay." in name or ".output_norm." in name
    }
    assert len(decaying["params"]) + len(kept["params"]) == len(names)
    assert len(build_optimizer(CottentionGPTForCausalLM(gpt_config()), settings).param_groups) == 1


@pytest.mark.parametrize("attention_type", ["cosine", "softmax"])
def test_with_everything_on_it_learns_a_batch_by_heart(attention_type: str) -> None:
    torch.manual_seed(0)
    model = CottentionGPTForCausalLM(gpt_config(attention_type, **ALL_ON))
    optimizer = build_optimizer(model, OptimizerSettings(learning_rate=5e-3))
    losses = []
    for _ in range(50):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3.5
    assert losses[-1] < 0.5


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"short_conv": 65}, r"short_conv must be at most 64; got 65"),
    ({"short_conv": 10**9}, r"short_conv must be at most 64; got 1000000000"),
    ({"output_gate": "relu"}, r"output_gate must be one of sigmoid, silu; got 'relu'"),
    ({"decay": "lerned"}, r"decay must be one of none, fixed, learned, data; got 'lerned'; did you mean 'learned'\?"),
    ({"divisor": "values"}, r"divisor must be one of key, query, none; got 'values'"),
]


@pytest.mark.parametrize("make", [gpt_config, bert_config])
@pytest.mark.parametrize(("settings", "line"), WRONG, ids=str)
def test_a_wrong_field_is_one_line(make: Any, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingsError, match=f"^{line}"):
        make(**settings)
    for name in ("output_norm", "erase"):
        with pytest.raises(TypeError, match=f"^{name} must be True or False; got 1$"):
            make(**{name: 1})


def test_a_bert_does_not_erase() -> None:
    with pytest.raises(SettingsError, match=r"^erase must be False for a BERT: "):
        bert_config(erase=True)


def test_options_that_are_off_stand_in_no_config() -> None:
    assert not set(ALL_ON) & set(gpt_config().to_dict())
    assert {name: gpt_config(**ALL_ON).to_dict()[name] for name in ALL_ON} == ALL_ON


def test_maps_of_a_model_that_erases_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^maps need a layer without erase"):
        gpt(ALL_ON)(TOKENS, output_attentions=True)
    model = gpt({**ALL_ON, "erase": False})
    maps: tuple[Tensor, ...] = model(TOKENS, output_attentions=True, use_cache=False).attentions
    assert [tuple(each.shape) for each in maps] == [(2, 2, 13, 13)] * 2


@pytest.mark.slow
def test_a_compiled_model_gives_the_same() -> None:
    model = gpt(ALL_ON).float()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = (each(TOKENS, use_cache=False).logits for each in (compiled, model))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
