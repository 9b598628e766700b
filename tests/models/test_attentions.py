"""output_attentions: maps that give each layer's context, stock BERT's and GPT-J's where attention is softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bert import modeling_bert as stock_bert
from transformers.models.gptj import modeling_gptj as stock_gpt

from cottention.layers import CosineAttention, SoftmaxAttention, cosine_map
from cottention.models import (
    CottentionBertForMaskedLM,
    CottentionBertForPreTraining,
    CottentionBertForQuestionAnswering,
    CottentionBertForSequenceClassification,
    CottentionBertForTokenClassification,
    CottentionBertModel,
    CottentionGPTForCausalLM,
    CottentionGPTForSequenceClassification,
    CottentionGPTModel,
)
from tests.models.helpers import ATTENTION_TYPES, bert_config, checkpointed, gpt_config, randomised, some_tokens
from tests.models.test_softmax_twins import MASKS, assert_same, bert_twins, gpt_twins

TOKENS = some_tokens(2, 11)
ALL: list[tuple[Any, Any]] = [
    (CottentionBertModel, bert_config),
    (CottentionBertForPreTraining, bert_config),
    (CottentionBertForMaskedLM, bert_config),
    (CottentionBertForSequenceClassification, bert_config),
    (CottentionBertForTokenClassification, bert_config),
    (CottentionBertForQuestionAnswering, bert_config),
    (CottentionGPTModel, gpt_config),
    (CottentionGPTForCausalLM, gpt_config),
    (CottentionGPTForSequenceClassification, gpt_config),
]


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), ALL)
def test_every_model_returns_a_map_per_layer_by_argument_and_by_config(
    kind: Any, make: Any, attention_type: str
) -> None:
    model = randomised(kind(make(attention_type)))
    plain, asked = model(TOKENS), model(TOKENS, output_attentions=True)
    assert plain.attentions is None
    assert [weights.shape for weights in asked.attentions] == [(2, 2, 11, 11)] * 2
    torch.testing.assert_close(asked[0], plain[0])  # the maps change nothing else
    model.config.output_attentions = True
    torch.testing.assert_close(model(TOKENS).attentions, asked.attentions)
    assert model(TOKENS, output_attentions=False).attentions is None
    torch.testing.assert_close(model(TOKENS, return_dict=False)[-1], asked.attentions)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_map_times_the_values_is_the_context(causal: bool, attention_type: str, mask: str) -> None:
    kind = CosineAttention if attention_type == "cosine" else SoftmaxAttention
    layer: Any = randomised(kind(32, 4, causal=causal))
    x, given = torch.randn(2, 11, 32, dtype=torch.float64), MASKS[mask]
    maps: list[Tensor] = []
    contexts: list[Tensor] = []
    layer.out_proj.register_forward_pre_hook(lambda _module, inputs: contexts.append(inputs[0]))
    layer(x, attention_mask=given)
    layer(x, attention_mask=given, maps=maps)
    v = layer.project(x)[2]
    recomputed = torch.einsum("bhts,bshv->bthv", maps[0], v).flatten(-2)
    for context in contexts:  # of the fast form, and of the call that was asked for the map
        torch.testing.assert_close(recomputed, context, rtol=1e-10, atol=1e-12)
    if given is not None and attention_type == "cosine":
        assert not maps[0].transpose(1, 2)[given == 0].any()
        assert not maps[0].permute(0, 3, 1, 2)[given == 0].any()


def test_the_models_maps_are_those_of_their_layers() -> None:
    """BERT's own attention, layer by layer, from the hidden states that the model returns."""
    for attention_type in ATTENTION_TYPES:
        model = randomised(CottentionBertModel(bert_config(attention_type)))
        mask = MASKS["right"]
        out = model(TOKENS, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        for layer, x, weights in zip(model.encoder.layer, out.hidden_states, out.attentions, strict=False):
            v = layer.attention.self.value(x).unflatten(-1, (2, 16))
            context = layer.attention.self(x, mask, None, None)
            torch.testing.assert_close(torch.einsum("bhts,bshv->bthv", weights, v).flatten(-2), context)


def test_a_cosine_map_by_hand() -> None:
    q = torch.tensor([3.0, 0, 0, 2, 1, 1], dtype=torch.float64).reshape(1, 3, 1, 2)
    m = torch.zeros(1, dtype=torch.float64)  # p = 1/2
    root = 0.5**0.5
    similarity = torch.tensor([[1, 0, root], [0, 1, root], [root, root, 1]], dtype=torch.float64)
    count = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    causal = cosine_map(q, q, m, causal=True)[0, 0]
    torch.testing.assert_close(causal, (similarity / count.sqrt()).tril())
    torch.testing.assert_close(cosine_map(q, q, m, causal=False)[0, 0], similarity / 3**0.5)
    torch.testing.assert_close(cosine_map(q, q, None, causal=False)[0, 0], similarity)
    padded = cosine_map(q, q, m, causal=True, attention_mask=torch.tensor([[0, 1, 1]]))[0, 0]
    torch.testing.assert_close(padded[1:, 1:], (similarity[1:, 1:] / torch.tensor([1, 2**0.5])).tril())


@pytest.mark.parametrize("mask", MASKS)
def test_softmax_maps_are_stock_berts(mask: str) -> None:
    ours, theirs = bert_twins(CottentionBertForMaskedLM, stock_bert.BertForMaskedLM)
    real = MASKS[mask]
    got = ours(TOKENS, attention_mask=real, output_attentions=True).attentions
    expected = theirs(TOKENS, attention_mask=real, output_attentions=True).attentions
    assert len(got) == len(expected) == 2
    for mine, stock in zip(got, expected, strict=True):
        assert_same(mine.transpose(1, 2), stock.transpose(1, 2), real)


@pytest.mark.parametrize("mask", MASKS)
def test_softmax_maps_are_stock_gpts(mask: str) -> None:
    ours, theirs = gpt_twins(CottentionGPTForCausalLM, stock_gpt.GPTJForCausalLM)
    theirs.set_attn_implementation("eager")  # from transformers 5.24 on it has SDPA too, which gives no maps
    real = MASKS[mask]
    got = ours(TOKENS, attention_mask=real, output_attentions=True).attentions
    expected = theirs(TOKENS, attention_mask=real, output_attentions=True).attentions
    for mine, stock in zip(got, expected, strict=True):
        assert_same(mine.transpose(1, 2), stock.transpose(1, 2), real)


def test_dropped_weights_are_missing_from_the_map_as_in_stock_bert() -> None:
    model = randomised(CottentionBertModel(bert_config("softmax", attention_probs_dropout_prob=0.5))).train()
    (weights, *_) = model(TOKENS, output_attentions=True).attentions
    assert 0.3 < (weights == 0).double().mean() < 0.7


def test_gradients_flow_through_maps_with_and_without_checkpointing() -> None:
    gradients = []
    for checkpoints in (False, True):
        model = randomised(CottentionBertModel(bert_config())).train()
        if checkpoints:
            checkpointed(model, use_reentrant=False)
        out = model(TOKENS, output_attentions=True)
        assert len(out.attentions) == 2
        (out.last_hidden_state.sum() + sum(weights.square().sum() for weights in out.attentions)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), ALL)
def test_a_map_has_a_gradient_of_what_depends_on_it(
    kind: Any, make: Any, attention_type: str, checkpoints: bool
) -> None:
    model = randomised(kind(make(attention_type))).train()
    if checkpoints:
        checkpointed(model, use_reentrant=False)
    mask = torch.ones_like(TOKENS)
    mask[1, -3:] = 0
    out = model(TOKENS, attention_mask=mask, output_attentions=True)
    for weights in out.attentions:
        weights.retain_grad()
    out[0].square().sum().backward()
    for weights in out.attentions:
        assert weights.grad is not None
        assert weights.grad.abs().sum() > 0


def test_a_cosine_maps_gradient_is_that_of_its_context() -> None:
    attention = CosineAttention(32, 4, causal=True).double()
    x, maps = torch.randn(2, 7, 32, dtype=torch.float64), []
    o, _ = attention(x, maps=maps)
    maps[0].retain_grad()
    direction = torch.randn_like(o)
    (o * direction).sum().backward()
    v = attention.v_proj(x).unflatten(-1, (4, 8))
    expected = torch.einsum("bthv,bshv->bhts", (direction @ attention.out_proj.weight).unflatten(-1, (4, 8)), v)
    torch.testing.assert_close(maps[0].grad, expected)


def test_a_softmax_map_covers_the_keys_of_the_cache() -> None:
    model = randomised(CottentionGPTModel(gpt_config("softmax")))
    whole = model(TOKENS, output_attentions=True).attentions
    past = model(TOKENS[:, :6]).past_key_values
    continued = model(TOKENS[:, 6:], past_key_values=past, output_attentions=True).attentions
    for part, full in zip(continued, whole, strict=True):
        torch.testing.assert_close(part, full[:, :, 6:], rtol=1e-5, atol=1e-6)


def test_what_has_no_map_is_one_clear_line() -> None:
    bounds = torch.tensor([0, 4, 11], dtype=torch.int32)
    for kind, make in ALL[:1] + ALL[-3:-2]:
        with pytest.raises(
            ValueError, match=r"^output_attentions and cu_seqlens exclude each other: give texts as padded"
        ):
            kind(make())(TOKENS[:1], cu_seqlens=bounds, output_attentions=True)
    model = randomised(CottentionGPTModel(gpt_config()))
    past = model(TOKENS[:, :6]).past_key_values
    with pytest.raises(
        ValueError, match=r"^output_attentions needs every key, of which a CosineCache keeps none; got a"
    ):
        model(TOKENS[:, 6:], past_key_values=past, output_attentions=True)
    for attention in (CosineAttention(32, 4, causal=True), SoftmaxAttention(32, 4, causal=True)):
        with pytest.raises(ValueError, match=r"^maps and cu_seqlens exclude each other"):
            attention(torch.randn(1, 11, 32), cu_seqlens=bounds, maps=[])
    cosine = CosineAttention(32, 4, causal=True)
    _, state = cosine(torch.randn(1, 3, 32), output_final_state=True)
    with pytest.raises(ValueError, match=r"^maps need every key, of which a state of cosine attention keeps none"):
        cosine(torch.randn(1, 3, 32), initial_state=state, maps=[])
