"""BERT's options: rotary positions, LayerNorm first, softmax in some layers; each by a stock control, all together."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormModel
from transformers.models.gptj import modeling_gptj

from cottention.errors import CheckpointError, CottentionError, SettingsError
from cottention.models import (
    CottentionBertForMaskedLM,
    CottentionBertForMultipleChoice,
    CottentionBertForNextSentencePrediction,
    CottentionBertForPreTraining,
    CottentionBertForQuestionAnswering,
    CottentionBertForSequenceClassification,
    CottentionBertForTokenClassification,
    CottentionBertModel,
)
from tests.models.helpers import ATTENTION_TYPES, bert_config, checkpointed, gradients, randomised, some_tokens

LINEAR, FULL = "linear_attention", "full_attention"
TOKENS = some_tokens(2, 19)
MASK = torch.tensor([[1] * 19, [1] * 12 + [0] * 7])
EVERYTHING: dict[str, Any] = {
    "layer_types": [LINEAR, FULL, LINEAR],
    "num_hidden_layers": 3,
    "position_embedding_type": "rotary",
    "rotary_dim": 8,
    "norm_first": True,
}


def test_norm_first_is_the_stock_block_with_its_names() -> None:
    ours = randomised(CottentionBertModel(bert_config("softmax", norm_first=True)))
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    settings: dict[str, Any] = {name: getattr(ours.config, name) for name in shared}
    eager: dict[str, Any] = {"attn_implementation": "eager"}
    # RoBERTa counts positions from behind the padding token on.
    stock = RobertaPreLayerNormConfig(
        **settings,
        max_position_embeddings=64 + 1,
        type_vocab_size=2,
        pad_token_id=0,
        layer_norm_eps=ours.config.layer_norm_eps,
        **eager,
    )
    theirs = RobertaPreLayerNormModel(stock).double().eval()
    weights = dict(ours.state_dict())
    positions = weights["embeddings.position_embeddings.weight"]
    weights["embeddings.position_embeddings.weight"] = torch.cat([torch.zeros_like(positions[:1]), positions])
    theirs.load_state_dict(weights, strict=True)
    mine = ours(TOKENS, attention_mask=MASK)
    his = theirs(TOKENS, attention_mask=MASK, position_ids=torch.arange(19)[None].expand(2, -1) + 1)
    real = MASK.bool()
    torch.testing.assert_close(mine.last_hidden_state[real], his.last_hidden_state[real], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine.pooler_output, his.pooler_output, rtol=1e-10, atol=1e-10)


def test_rotary_turns_queries_and_keys_as_stock_gptj() -> None:
    model = randomised(CottentionBertModel(bert_config("softmax", position_embedding_type="rotary", rotary_dim=8)))
    assert not any("position_embeddings" in name for name in model.state_dict())
    out = model(TOKENS, output_attentions=True, output_hidden_states=True)
    x, attention = out.hidden_states[0], model.encoder.layer[0].attention.self
    q, k = (projection(x).unflatten(-1, (2, 16)) for projection in (attention.query, attention.key))
    sin, cos = modeling_gptj.create_sinusoidal_positions(64, 8)[:19][None].chunk(2, dim=-1)
    q, k = (torch.cat([modeling_gptj.apply_rotary_pos_emb(y[..., :8], sin, cos), y[..., 8:]], dim=-1) for y in (q, k))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / 4
    torch.testing.assert_close(out.attentions[0], scores.softmax(-1), rtol=1e-5, atol=1e-6)  # their table is float32


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_rotary_sees_distances_alone_and_has_no_longest_text(attention_type: str) -> None:
    model = randomised(CottentionBertModel(bert_config(attention_type, position_embedding_type="rotary")))
    near = model(TOKENS).last_hidden_state
    far = model(TOKENS, position_ids=torch.arange(19)[None] + 1000).last_hidden_state
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)  # angles are rounded to float32
    assert not torch.allclose(model(TOKENS, position_ids=torch.arange(19)[None] * 2).last_hidden_state, near)
    assert model(some_tokens(1, 200)).last_hidden_state.shape == (1, 200, 32)
    with pytest.raises(CottentionError, match="at most 64 tokens"):
        CottentionBertModel(bert_config(attention_type))(some_tokens(1, 65))


def test_layer_types_choose_the_attention_of_each_layer() -> None:
    model = CottentionBertModel(bert_config(layer_types=[LINEAR, FULL]))
    names = [name for name in model.state_dict() if name.endswith("norm_const")]
    assert names == ["encoder.layer.0.attention.self.norm_const"]
    softmax = randomised(CottentionBertModel(bert_config("softmax")))
    listed = randomised(CottentionBertModel(bert_config("softmax", layer_types=[FULL, FULL])))
    assert torch.equal(listed(TOKENS).last_hidden_state, softmax(TOKENS).last_hidden_state)


def drawn(seed: int) -> tuple[Any, random.Random]:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    layers = [LINEAR, *[draw.choice([LINEAR, FULL]) for _ in range(draw.choice([1, 2]))]]
    draw.shuffle(layers)
    settings: dict[str, Any] = {"layer_types": layers, "num_hidden_layers": len(layers)}
    settings["norm_first"] = draw.choice([True, False])
    if draw.choice([True, False]):
        settings |= {"position_embedding_type": "rotary", "rotary_dim": draw.choice([None, 2, 8])}
    config = bert_config(**settings, num_labels=3)
    return randomised(CottentionBertForTokenClassification(config)), draw


def check_all_ways(model: Any, draw: random.Random) -> None:
    labels = some_tokens(2, 19, vocab_size=3, seed=draw.randrange(99))
    whole = model(TOKENS, labels=labels)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()

    packed = model(
        TOKENS.view(1, -1), labels=labels.view(1, -1), cu_seqlens=torch.tensor([0, 19, 38], dtype=torch.int32)
    )
    torch.testing.assert_close(packed.logits.view_as(whole.logits), whole.logits)
    packed.loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])
    model.zero_grad()
    flattened = model(
        TOKENS, position_ids=torch.arange(19)[None], cu_seq_lens_q=torch.tensor([0, 19, 38], dtype=torch.int32)
    )
    torch.testing.assert_close(flattened.logits, whole.logits)

    ids, mask = torch.zeros(2, 30, dtype=torch.int64), torch.zeros(2, 30, dtype=torch.int64)
    for row, text in enumerate(TOKENS):
        where = sorted(draw.sample(range(30), 19))
        ids[row, where], mask[row, where] = text, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    torch.testing.assert_close(padded.view_as(whole.logits), whole.logits)

    seen = model(TOKENS, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(seen.logits, whole.logits)
    assert len(seen.hidden_states) == len(seen.attentions) + 1
    checkpointed(model.train())
    model(TOKENS, labels=labels).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("seed", range(4))
def test_drawn_options_agree_every_way(seed: int) -> None:
    check_all_ways(*drawn(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 40))
def test_more_drawn_options_agree_every_way(seed: int) -> None:
    check_all_ways(*drawn(seed))


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (CottentionBertForMaskedLM, {"labels": TOKENS}),
        (CottentionBertForPreTraining, {"labels": TOKENS, "next_sentence_label": torch.tensor([0, 1])}),
        (CottentionBertForSequenceClassification, {"labels": torch.tensor([0, 1])}),
        (CottentionBertForTokenClassification, {"labels": (TOKENS % 2)}),
        (
            CottentionBertForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        ),
        (CottentionBertForNextSentencePrediction, {"labels": torch.tensor([0, 1])}),
        (CottentionBertForMultipleChoice, {"labels": torch.tensor([1])}),
    ],
)
def test_every_head_trains_saves_and_loads(kind: Any, labels: dict[str, Tensor], tmp_path: Path) -> None:
    model = randomised(kind(bert_config(**EVERYTHING)), torch.float32)
    multiple = kind is CottentionBertForMultipleChoice
    tokens, mask = (TOKENS[None], MASK[None]) if multiple else (TOKENS, MASK)
    out = model(tokens, attention_mask=mask, **labels)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in EVERYTHING} == EVERYTHING
    again = kind.from_pretrained(tmp_path)
    torch.testing.assert_close(again(tokens, attention_mask=mask, **labels).loss, out.loss)


def test_weights_of_another_block_are_refused(tmp_path: Path) -> None:
    CottentionBertForMaskedLM(bert_config()).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"must hold every weight .*; 10 are missing, first bert\.LayerNorm\.bias"
    ):
        CottentionBertForMaskedLM.from_pretrained(tmp_path, norm_first=True)
    with pytest.raises(CheckpointError, match=r"holds learned positions; got position_embedding_type='rotary'$"):
        CottentionBertForMaskedLM.from_pretrained(tmp_path, position_embedding_type="rotary")
    with pytest.raises(CheckpointError, match="its cosine layers are others than those of layer_types"):
        CottentionBertForMaskedLM.from_pretrained(tmp_path, layer_types=[LINEAR, FULL])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"position_embedding_type": "rotery"},
            "position_embedding_type must be one of absolute, rotary; got 'rotery'",
        ),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be one of absolute, rotary"),
        ({"rotary_dim": 8}, "rotary_dim needs position_embedding_type='rotary'; got 8 and 'absolute'"),
        ({"position_embedding_type": "rotary", "rotary_dim": 3}, "rotary_dim must be even, from 2 to the head dim 16"),
        ({"position_embedding_type": "rotary", "rotary_dim": 18}, "rotary_dim must be even, from 2 to the head dim 16"),
        ({"norm_first": 1}, "norm_first must be True or False; got 1"),
    ],
)
def test_settings_that_make_no_model_are_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises((SettingsError, TypeError), match=f"^{line}"):
        bert_config(**settings)


def test_a_config_without_options_is_written_as_before(tmp_path: Path) -> None:
    bert_config().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {"position_embedding_type", "rotary_dim", "norm_first", "sliding_window"} & set(written)
    assert "layer_types" not in bert_config().to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_it_is_exported_for_any_batch_and_length(attention_type: str) -> None:
    settings = EVERYTHING if attention_type == "cosine" else {**EVERYTHING, "layer_types": [FULL] * 3}
    model = randomised(CottentionBertForMaskedLM(bert_config(attention_type, **settings)), torch.float32)
    free = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=512)}
    shapes = {"input_ids": free, "attention_mask": free}
    program = torch.export.export(
        model, (), {"input_ids": TOKENS, "attention_mask": MASK}, dynamic_shapes=shapes
    ).module()
    tokens = some_tokens(3, 150)
    mask = torch.ones_like(tokens)
    mask[0, 100:] = 0
    found = program(input_ids=tokens, attention_mask=mask).logits[mask.bool()]
    expected = model(tokens, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
