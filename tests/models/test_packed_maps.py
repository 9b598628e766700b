"""output_attentions="packed": maps of packed texts are those of each text alone, zero between them, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gptj import GPTJForCausalLM

from cottention.layers import CosineAttention, SoftmaxAttention
from cottention.models import (
    CottentionBertForMaskedLM,
    CottentionBertForSequenceClassification,
    CottentionBertModel,
    CottentionGPTForCausalLM,
    CottentionGPTForSequenceClassification,
    CottentionGPTModel,
)
from tests.models.helpers import ATTENTION_TYPES, bert_config, checkpointed, gpt_config, gradients, randomised
from tests.models.test_packed_names import BOUNDS, FIRST, LENGTHS, POSITIONS, TOKENS, alone, ways
from tests.models.test_softmax_twins import gpt_twins

KINDS: list[tuple[Any, Any, dict[str, Any]]] = [
    (kind, make, settings)
    for kind, make in (
        (CottentionGPTModel, gpt_config),
        (CottentionGPTForCausalLM, gpt_config),
        (CottentionGPTForSequenceClassification, gpt_config),
        (CottentionBertModel, bert_config),
        (CottentionBertForMaskedLM, bert_config),
        (CottentionBertForSequenceClassification, bert_config),
    )
    for settings in ({"attention_type": "cosine"}, {"attention_type": "softmax"})
]
OPTIONS = {"short_conv": 4, "output_norm": True, "output_gate": "sigmoid"}
HYBRID = {"layer_types": ["linear_attention", "sliding_attention", "full_attention"], "sliding_window": 3, "n_layer": 3}
KINDS += [
    (CottentionGPTModel, gpt_config, HYBRID),
    (CottentionGPTModel, gpt_config, {**OPTIONS, "decay": "data", "divisor": "query"}),
    (CottentionGPTModel, gpt_config, {"decay": "learned"}),
    (CottentionBertModel, bert_config, {"layer_types": ["linear_attention", "full_attention"]}),
    (CottentionBertModel, bert_config, {**OPTIONS, "decay": "data", "position_embedding_type": "rotary"}),
]


def blocks(separate: list[Any], layer: int) -> Tensor:
    """The maps of single texts where they stand in rows of packed ones."""
    maps = [out.attentions[layer][0] for out in separate]
    rows = []
    for lengths in LENGTHS:
        row, maps = maps[: len(lengths)], maps[len(lengths) :]
        rows.append(torch.stack([torch.block_diag(*(one[head] for one in row)) for head in range(len(row[0]))]))
    return torch.stack(rows)


@pytest.mark.parametrize(("kind", "make", "settings"), KINDS)
def test_maps_of_packed_texts_are_those_of_each_alone(kind: Any, make: Any, settings: dict[str, Any]) -> None:
    model = randomised(kind(make(**settings)))
    separate = alone(model, TOKENS, output_attentions=True)
    plain = model(TOKENS, position_ids=POSITIONS)[0]
    for way, told in ways(2).items():
        out = model(TOKENS, output_attentions="packed", **told)
        for layer, weights in enumerate(out.attentions):
            torch.testing.assert_close(weights, blocks(separate, layer), msg=lambda m, way=way: f"{way}: {m}")
        torch.testing.assert_close(out[0], plain)  # through the maps, to the same end
    one_row = model(TOKENS[:1], cu_seqlens=FIRST, output_attentions="packed").attentions
    torch.testing.assert_close(one_row, tuple(weights[:1] for weights in out.attentions))
    padded = model(TOKENS, output_attentions="packed").attentions  # nothing packed: as True
    torch.testing.assert_close(padded, model(TOKENS, output_attentions=True).attentions)


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("settings", [{}, {"attention_type": "softmax"}, {"decay": "data", "divisor": "query"}, HYBRID])
@pytest.mark.parametrize("kind", [CottentionGPTModel, CottentionBertModel])
def test_gradients_through_packed_maps_are_those_of_each_text(
    kind: Any, settings: dict[str, Any], checkpoints: bool
) -> None:
    make: Any = gpt_config
    if kind is CottentionBertModel:
        make, settings = bert_config, {key: settings[key] for key in ("attention_type", "decay") if key in settings}
    model = randomised(kind(make(**settings)))
    for out in alone(model, TOKENS, output_attentions=True):
        (out[0].square().sum() + sum(weights.square().sum() for weights in out.attentions)).backward()
    expected = gradients(model)
    model.zero_grad()
    if checkpoints:
        checkpointed(model.train(), use_reentrant=False)
    out = model(TOKENS, position_ids=POSITIONS, output_attentions="packed")
    for weights in out.attentions:
        weights.retain_grad()
    (out[0].square().sum() + sum(weights.square().sum() for weights in out.attentions)).backward()
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert all(weights.grad is not None for weights in out.attentions)


def test_softmax_maps_of_packed_texts_are_stock_gpts() -> None:
    ours, theirs = gpt_twins(CottentionGPTForCausalLM, GPTJForCausalLM)
    theirs.set_attn_implementation("eager")
    told = {"position_ids": POSITIONS, "use_cache": False}
    expected = theirs(TOKENS, output_attentions=True, **told).attentions
    assert not expected[0][0, :, 4:, :4].any()  # stock: zero between texts
    for mine, stock in zip(ours(TOKENS, output_attentions="packed", **told).attentions, expected, strict=True):
        torch.testing.assert_close(mine, stock)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_layer_gives_the_map_of_packed_rows(attention_type: str) -> None:
    kind = CosineAttention if attention_type == "cosine" else SoftmaxAttention
    layer: Any = randomised(kind(32, 4, causal=True, rotary_dim=4))
    x = torch.randn(1, 24, 32, dtype=torch.float64)
    maps: list[Tensor] = []
    o, _ = layer(x, cu_seqlens=BOUNDS, maps=maps, map_rows=2)
    torch.testing.assert_close(o, layer(x, cu_seqlens=BOUNDS)[0])
    layer(x, cu_seqlens=BOUNDS, maps=maps, map_rows=1)
    assert [tuple(each.shape) for each in maps] == [(2, 4, 12, 12), (1, 4, 24, 24)]
    torch.testing.assert_close(maps[0][1], maps[1][0, :, 12:, 12:])


@pytest.mark.slow
def test_a_packed_map_compiles_and_a_text_over_two_rows_has_none() -> None:
    model = randomised(CottentionGPTModel(gpt_config()), dtype=torch.float32)
    told: dict[str, Any] = {"output_attentions": "packed", "use_cache": False}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(TOKENS, seq_idx=POSITIONS.eq(0).cumsum(-1), **told).attentions
    torch.testing.assert_close(compiled(TOKENS, seq_idx=POSITIONS.eq(0).cumsum(-1), **told).attentions, expected)
    over = torch.tensor([0, 5, 15, 24])
    for broken in (model, torch.compile(model, backend="eager")):
        with pytest.raises((ValueError, RuntimeError), match="a map's rows must hold whole texts; one runs on"):
            broken(TOKENS, cu_seq_lens_q=over, **told)


def test_what_a_packed_map_cannot_be_is_one_clear_line() -> None:
    erasing = CottentionGPTModel(gpt_config(erase=True, decay="data"))
    with pytest.raises(ValueError, match=r"^maps need a layer without erase"):
        erasing(TOKENS, position_ids=POSITIONS, output_attentions="packed")
    with pytest.raises(ValueError, match=r"^output_attentions must be True, False or 'packed'; got 'rows'"):
        erasing(TOKENS, output_attentions="rows")
    with pytest.raises(ValueError, match=r"or output_attentions='packed' for maps that are zero between texts"):
        erasing(TOKENS, position_ids=POSITIONS, output_attentions=True)
    layer = CosineAttention(32, 4, causal=True)
    with pytest.raises(ValueError, match=r"^map_rows must divide the number of tokens, 24; got 5"):
        layer(torch.randn(1, 24, 32), cu_seqlens=BOUNDS, maps=[], map_rows=5)
