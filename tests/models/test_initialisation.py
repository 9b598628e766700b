"""New weights follow the published initialisation, wherever a model comes from; sizes are the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.models import (
    CottentionBertConfig,
    CottentionBertForPreTraining,
    CottentionBertForSequenceClassification,
    CottentionBertModel,
    CottentionGPTConfig,
    CottentionGPTForCausalLM,
    CottentionGPTForSequenceClassification,
)
from tests.models.helpers import bert_config, gpt_config

BIG_BERT: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 500}
BIG_GPT: dict[str, Any] = {"n_embd": 128, "n_head": 4, "vocab_size": 500}


def num_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"n_embd": 1024, "n_inner": 3072}, 313_110_048),
        ({"n_embd": 2048, "n_inner": 8192}, 1_213_412_896),
    ],
)
def test_gpt_has_the_published_number_of_parameters(settings: dict[str, Any], expected: int) -> None:
    config = CottentionGPTConfig(n_layer=20, n_head=16, rotary_dim=64, vocab_size=50400, **settings)
    with torch.device("meta"):
        softmax = num_parameters(
            CottentionGPTForCausalLM(CottentionGPTConfig(**{**config.to_dict(), "attention_type": "softmax"}))
        )
        cosine = num_parameters(CottentionGPTForCausalLM(config))
    assert cosine == expected
    assert cosine - softmax == 20 * 16


def test_bert_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        cosine = num_parameters(CottentionBertForPreTraining(CottentionBertConfig()))
        softmax = num_parameters(CottentionBertForPreTraining(CottentionBertConfig(attention_type="softmax")))
    assert cosine - softmax == 144
    assert round(softmax / 1e6, 2) == 108.93


def check_published(model: Any, skip: tuple[str, ...] = ()) -> None:
    """Every weight matrix is normal(0, 0.02), every bias 0, every LayerNorm 1, norm_const as configured."""
    for name, p in model.named_parameters():
        if any(part in name for part in skip):
            continue
        if "norm_const" in name:
            assert (p == model.config.norm_const_init).all(), name
        elif "LayerNorm.weight" in name or ("ln_" in name and name.endswith("weight")):
            assert (p == 1).all(), name
        elif p.dim() == 1:
            assert (p == 0).all(), name
        else:
            values = p[1:] if name.endswith("word_embeddings.weight") else p
            assert abs(values.std().item() / 0.02 - 1) < 0.15, name
            assert abs(values.mean().item()) < 0.002, name


@pytest.mark.parametrize("attention_type", ["cosine", "softmax"])
def test_new_models_are_initialised_as_published(attention_type: str) -> None:
    check_published(CottentionGPTForCausalLM(gpt_config(attention_type, **BIG_GPT)))
    bert = CottentionBertForPreTraining(bert_config(attention_type, norm_const_init=0.25, **BIG_BERT))
    check_published(bert, skip=("token_type", "seq_relationship"))
    assert (bert.bert.embeddings.word_embeddings.weight[0] == 0).all()


def test_original_init_keeps_default_projections_where_the_original_did() -> None:
    gpt = CottentionGPTForCausalLM(gpt_config(original_init=True, **BIG_GPT))
    bert = CottentionBertForPreTraining(bert_config(original_init=True, **BIG_BERT))
    uniform = 1 / 128**0.5
    replaced: list[tuple[Any, tuple[str, ...]]] = [
        (gpt, ("k_proj", "v_proj", "q_proj", "out_proj")),
        (bert, (".query", ".key", ".value")),
    ]
    for model, names in replaced:
        check_published(model, skip=(*names, "token_type", "seq_relationship"))
        for name, p in model.named_parameters():
            if any(part in name for part in names):
                assert 0.9 * uniform < p.abs().max() <= uniform, name
    # The original replaced BERT's inner attention, not the output projection after it.
    assert bert.get_parameter("bert.encoder.layer.0.attention.output.dense.weight").std() < 0.025


@pytest.mark.parametrize("original_init", [False, True])
def test_a_new_head_on_loaded_weights_is_initialised_and_nothing_else(tmp_path: Path, original_init: bool) -> None:
    cases: list[tuple[Any, Any, Any]] = [
        (CottentionBertModel, CottentionBertForSequenceClassification, bert_config),
        (CottentionGPTForCausalLM, CottentionGPTForSequenceClassification, gpt_config),
    ]
    for kind, task, make in cases:
        base = kind(make(original_init=original_init))
        base.save_pretrained(tmp_path / kind.__name__)
        model = task.from_pretrained(tmp_path / kind.__name__, num_labels=400)
        head = model.classifier if hasattr(model, "classifier") else model.score
        assert head.weight.shape[0] == 400
        assert abs(head.weight.std().item() / 0.02 - 1) < 0.1
        loaded, saved = model.base_model.state_dict(), base.base_model.state_dict()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_weights_that_do_not_fit_start_anew_as_published(tmp_path: Path) -> None:
    cases: list[tuple[Any, Any, dict[str, Any], dict[str, Any]]] = [
        (CottentionGPTForCausalLM, gpt_config(), BIG_GPT, {"skip": ("_proj",)}),
        (CottentionBertModel, bert_config(), BIG_BERT, {"skip": (".query", ".key", ".value", "token_type")}),
    ]
    for kind, config, bigger, settings in cases:
        kind(config).save_pretrained(tmp_path / kind.__name__)
        model = kind.from_pretrained(
            tmp_path / kind.__name__,
            ignore_mismatched_sizes=True,
            norm_const_init=0.75,
            original_init=True,
            **bigger,
        )
        check_published(model, **settings)
        first = next(p for name, p in model.named_parameters() if "q_proj" in name or ".query.weight" in name)
        assert 0.9 / 128**0.5 < first.abs().max() <= 1 / 128**0.5


def test_the_seed_decides_the_weights() -> None:
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(CottentionGPTForCausalLM(gpt_config(original_init=True)))
    first, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
