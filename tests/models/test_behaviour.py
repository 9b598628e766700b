"""What both families promise beside their numbers: padding, hidden states, checkpointing, limits, clear errors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from cottention.errors import CottentionError
from cottention.models import (
    CosineCache,
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
from cottention.models.versions import cache_of
from tests.models.helpers import (
    ATTENTION_TYPES,
    bert_config,
    checkpointed,
    gpt_config,
    gradients,
    randomised,
    some_tokens,
)

TOKENS = some_tokens(2, 11)
FAMILIES: list[tuple[Any, Any]] = [(CottentionGPTForCausalLM, gpt_config), (CottentionBertForMaskedLM, bert_config)]
ALL: list[tuple[Any, Any]] = [
    *FAMILIES,
    (CottentionGPTModel, gpt_config),
    (CottentionGPTForSequenceClassification, gpt_config),
    (CottentionBertModel, bert_config),
    (CottentionBertForPreTraining, bert_config),
    (CottentionBertForSequenceClassification, bert_config),
    (CottentionBertForTokenClassification, bert_config),
    (CottentionBertForQuestionAnswering, bert_config),
]


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), FAMILIES)
@pytest.mark.parametrize("mask", [[1] * 8 + [0] * 3, [0] * 3 + [1] * 8, [1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1]], ids=str)
def test_padding_anywhere_changes_nothing(kind: Any, make: Any, attention_type: str, mask: list[int]) -> None:
    model, real = randomised(kind(make(attention_type))), torch.tensor(mask).bool()
    # Positions are given, for learned ones do not shift and float32 rotary angles do a little.
    positions = (torch.tensor(mask).cumsum(0) - 1).clamp(min=0)[None]
    alone = model(TOKENS[:1, real]).logits
    padded = model(TOKENS[:1], attention_mask=torch.tensor([mask]), position_ids=positions).logits
    torch.testing.assert_close(padded[:, real], alone)
    # What stands in the padding is not read.
    other = TOKENS[:1].masked_fill(~real, 3)
    again = model(other, attention_mask=torch.tensor([mask]), position_ids=positions).logits
    assert torch.equal(again[:, real], padded[:, real])


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), FAMILIES)
def test_an_empty_row_has_finite_outputs_and_gradients(kind: Any, make: Any, attention_type: str) -> None:
    model = randomised(kind(make(attention_type)))
    mask = torch.tensor([[1] * 11, [0] * 11])
    out = model(TOKENS, attention_mask=mask, labels=TOKENS.masked_fill(mask == 0, -100))
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_gpt_sees_no_future(attention_type: str) -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config(attention_type)))
    changed = TOKENS.clone()
    changed[:, 6:] = 5
    torch.testing.assert_close(model(changed).logits[:, :6], model(TOKENS).logits[:, :6])


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), ALL)
def test_hidden_states_run_from_embedding_to_last_norm(kind: Any, make: Any, attention_type: str) -> None:
    model = randomised(kind(make(attention_type)))
    hidden = model(TOKENS, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    assert all(x.shape == (2, 11, 32) for x in hidden)
    base = model.base_model
    assert torch.equal(hidden[-1], base(TOKENS).last_hidden_state)
    if make is gpt_config:
        assert torch.equal(hidden[0], base.wte(TOKENS))
        last_block: list[torch.Tensor] = []
        base.h[-1].register_forward_hook(lambda _module, _inputs, output: last_block.append(output))
        base(TOKENS)
        assert torch.equal(hidden[-1], base.ln_f(last_block[0]))
    assert model(TOKENS).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(TOKENS).hidden_states) == 3


@pytest.mark.parametrize(("kind", "make"), ALL)
def test_tuples_hold_the_same_in_the_same_order(kind: Any, make: Any) -> None:
    model = randomised(kind(make()))
    named = model(TOKENS, output_hidden_states=True)
    plain = model(TOKENS, output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == len(named.to_tuple())
    assert torch.equal(plain[0], named[0])
    model.config.return_dict = False
    assert isinstance(model(TOKENS), tuple)


@pytest.mark.parametrize(("kind", "make"), ALL)
def test_embedded_tokens_do_as_well_as_tokens(kind: Any, make: Any) -> None:
    model = randomised(kind(make()))
    embedded = model.get_input_embeddings()(TOKENS)
    assert torch.equal(model(inputs_embeds=embedded)[0], model(TOKENS)[0])
    with pytest.raises(ValueError, match="give exactly one of input_ids and inputs_embeds; got neither"):
        model()
    with pytest.raises(ValueError, match="give exactly one of input_ids and inputs_embeds; got both"):
        model(TOKENS, inputs_embeds=embedded)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), FAMILIES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    kind: Any, make: Any, attention_type: str, use_reentrant: bool
) -> None:
    model = randomised(kind(make(attention_type))).train()
    mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4])

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(TOKENS, attention_mask=mask, labels=TOKENS).loss.backward()
        return gradients(model)

    expected = run()
    checkpointed(model, use_reentrant=use_reentrant)
    calls = []
    for block in model.base_model.h if make is gpt_config else model.base_model.encoder.layer:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    got = run()
    # Each of two blocks once: hooks stay outside of what is computed again. transformers 5.17 has them inside.
    assert len(calls) == (4 if "__call__" in vars(GradientCheckpointingLayer) else 2)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


def test_checkpointing_leaves_a_cache_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        for attention_type in ATTENTION_TYPES:
            model = checkpointed(randomised(CottentionGPTForCausalLM(gpt_config(attention_type))).train())
            out = model(TOKENS, use_cache=True, labels=TOKENS)
            assert cache_of(out) is None
            out.loss.backward()
            empty = CosineCache(2) if attention_type == "cosine" else DynamicCache()
            assert cache_of(model(TOKENS, past_key_values=empty)) is None
            with torch.no_grad():
                filled = cache_of(model(TOKENS[:, :5], use_cache=True))
                rest = model(TOKENS[:, 5:], past_key_values=filled).logits
            torch.testing.assert_close(rest, model(TOKENS).logits[:, 5:])
            with pytest.raises(ValueError, match=r"^a filled past_key_values and gradient checkpointing exclude each"):
                model(TOKENS[:, 5:], past_key_values=filled)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert any("use_cache is left out" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_generate_goes_on_while_training_with_checkpoints(attention_type: str) -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config(attention_type)))
    expected = model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    checkpointed(model.train())
    assert torch.equal(model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0), expected)
    assert model.training


def test_a_class_says_that_it_is_stateful_and_a_model_whether() -> None:
    assert CottentionGPTForCausalLM._is_stateful is True
    assert CottentionGPTForCausalLM(gpt_config())._is_stateful is True
    assert CottentionGPTForCausalLM(gpt_config("softmax"))._is_stateful is False
    assert CottentionBertModel._is_stateful is False


def test_texts_too_long_are_refused_in_one_line() -> None:
    long = some_tokens(1, 65)
    for attention_type in ATTENTION_TYPES:
        bert = CottentionBertForMaskedLM(bert_config(attention_type))
        bert(long[:, :64])
        with pytest.raises(CottentionError) as caught:
            bert(long)
        assert str(caught.value) == (
            "the text must have at most 64 tokens (max_position_embeddings of this model); got 65"
        )
        with pytest.raises(CottentionError, match="got 81"):
            bert(long[:, :3], position_ids=torch.tensor([[0, 1, 80]]))
        bert(long.repeat(1, 2)[:, :128], cu_seqlens=torch.tensor([0, 64, 128]))
        with pytest.raises(CottentionError, match="got 66"):
            bert(long.repeat(1, 2), cu_seqlens=torch.tensor([0, 64, 130]))
    softmax = CottentionGPTForCausalLM(gpt_config("softmax")).eval()
    with pytest.raises(CottentionError) as caught:
        softmax(long)
    assert str(caught.value) == "the text must have at most 64 tokens (n_positions of this model); got 65"
    cache = softmax(long[:, :64]).past_key_values
    with pytest.raises(CottentionError, match="got 65"):
        softmax(long[:, 64:], past_key_values=cache)
    assert CottentionGPTForCausalLM(gpt_config())(some_tokens(1, 200)).logits.shape == (1, 200, 61)


@pytest.mark.parametrize(("kind", "make"), ALL)
def test_a_mask_of_another_shape_is_named(kind: Any, make: Any) -> None:
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[B, T\] = \[2, 11\]; got \[2, 9\]"):
        kind(make())(TOKENS, attention_mask=torch.ones(2, 9, dtype=torch.int64))


def test_a_form_of_the_operation_can_be_chosen_by_name() -> None:
    for kind, make in FAMILIES:
        model = randomised(kind(make()))
        by_auto = model(TOKENS).logits
        model.set_implementation("naive")
        torch.testing.assert_close(model(TOKENS).logits, by_auto)
        with pytest.raises(CottentionError, match=r"implementation must be one of auto, naive.*; got 'fast'"):
            model.set_implementation("fast")


def test_the_classifier_reads_each_rows_last_real_token() -> None:
    model = randomised(CottentionGPTForSequenceClassification(gpt_config(num_labels=3, pad_token_id=0)))
    alone = torch.cat([model(TOKENS[:1]).logits, model(TOKENS[1:, :7]).logits])
    mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4])
    torch.testing.assert_close(model(TOKENS, attention_mask=mask).logits, alone)
    torch.testing.assert_close(model(TOKENS.masked_fill(mask == 0, 0)).logits, alone)  # by pad_token_id
    left = torch.cat([torch.zeros(1, 4, dtype=torch.int64), TOKENS[1:, :7]], dim=1)
    left_mask = torch.tensor([[0] * 4 + [1] * 7])
    positions = (left_mask.cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(model(left, attention_mask=left_mask, position_ids=positions).logits, alone[1:])


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), FAMILIES)
def test_autocast_trains(kind: Any, make: Any, attention_type: str) -> None:
    model = kind(make(attention_type)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(TOKENS, labels=TOKENS)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), FAMILIES)
def test_a_model_compiles_whole(kind: Any, make: Any, attention_type: str) -> None:
    torch.compiler.reset()
    model = randomised(kind(make(attention_type)), torch.float32)
    mask = torch.tensor([[1] * 11, [1] * 7 + [0] * 4])
    eager = model(TOKENS, attention_mask=mask, labels=TOKENS)
    eager.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)(TOKENS, attention_mask=mask, labels=TOKENS)
    compiled.loss.backward()
    torch.testing.assert_close(compiled.loss, eager.loss)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_without_rotary_dims_the_order_of_what_came_before_does_not_matter(attention_type: str) -> None:
    model = CottentionGPTForCausalLM(
        gpt_config(
            attention_type, n_layer=1, rotary_dim=None, position_embedding_type="none", norm_const_init=-20.0
        )  # an exponent of 0: no order either
    ).eval()
    ids = torch.arange(1, 9)[None]
    mixed = torch.cat([ids[:, :7].flip(-1), ids[:, 7:]], dim=-1)
    with torch.no_grad():
        one, other = model(ids).logits[:, -1], model(mixed).logits[:, -1]
        step = model(ids[:, 7:], past_key_values=cache_of(model(ids[:, :7], use_cache=True))).logits[:, -1]
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one, step)
