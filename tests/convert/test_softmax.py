"""convert_softmax: with softmax kept, the result is the stock model; with cosine, it holds the very same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cottention import models
from cottention.convert import convert_softmax
from tests import tiny
from tests.convert.helpers import change_json
from tests.convert.stock import (
    BERTS,
    CLASSES,
    assert_same_function,
    batch_for,
    save_stock,
    stock_checkpoint,
    stock_model,
)
from tests.models.helpers import randomised, some_tokens

OURS: dict[str, Any] = {
    "BertForPreTraining": models.CottentionBertForPreTraining,
    "BertForMaskedLM": models.CottentionBertForMaskedLM,
    "BertModel": models.CottentionBertForPreTraining,
    "GPTJForCausalLM": models.CottentionGPTForCausalLM,
}


@pytest.mark.parametrize("name", CLASSES)
def test_with_softmax_kept_values_and_gradients_are_those_of_the_stock_model(tmp_path: Path, name: str) -> None:
    source = stock_checkpoint(tmp_path / "stock", name)
    report = convert_softmax(source, tmp_path / "new", attention_type="softmax")
    assert (report.attention_type, report.model_class) == ("softmax", OURS[name].__name__)
    stock = CLASSES[name].from_pretrained(source, attn_implementation="eager").eval()
    ours = OURS[name].from_pretrained(tmp_path / "new").eval()
    ours = ours.bert if name == "BertModel" else ours

    assert_same_function(ours, stock, batch_for(name))


@pytest.mark.parametrize("name", CLASSES)
def test_a_cosine_model_has_the_weights_of_its_source_bit_for_bit(tmp_path: Path, name: str) -> None:
    source = stock_checkpoint(tmp_path / "stock", name)
    report = convert_softmax(source, tmp_path / "new", norm_const=0.25)
    state = OURS[name].from_pretrained(tmp_path / "new").state_dict()
    stored = {
        key if key.startswith("bert.") or name != "BertModel" else f"bert.{key}": value
        for key, value in load_file(source / "model.safetensors").items()
    }
    for key, value in stored.items():
        assert torch.equal(state[key], value), key
    norm_consts = [key for key in state if key.endswith("norm_const")]
    assert len(norm_consts) == 2
    for key in norm_consts:
        assert torch.equal(state[key], torch.full((1, 2, 1, 1), 0.25))
    tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert set(report.new) == set(state) - set(stored) - tied
    assert report.attention_type == "cosine"
    assert (report.model_class, report.dtype) == (OURS[name].__name__, "float32")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["attention_type"], config["norm_const_init"]) == ("cosine", 0.25)
    assert json.loads((tmp_path / "new" / "conversion.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert any("compute something else" in note for note in report.notes)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPTJForCausalLM"])
def test_the_tokenizer_comes_along(tmp_path: Path, name: str) -> None:
    source = stock_checkpoint(tmp_path / "stock", name)
    convert_softmax(source, tmp_path / "new")
    expected, got = (AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "new"))
    for text in (*tiny.TEXTS, "People [MASK] order <|endoftext|>"):
        assert got(text)["input_ids"] == expected(text)["input_ids"]


def test_a_bare_bert_gets_heads_that_are_named_and_the_same_each_time(tmp_path: Path) -> None:
    source = stock_checkpoint(tmp_path / "stock", "BertModel")
    reports = [convert_softmax(source, tmp_path / new, attention_type="softmax") for new in ("one", "two")]
    first, second = (load_file(tmp_path / new / "model.safetensors") for new in ("one", "two"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    new = set(reports[0].new)
    assert new == {key for key in first if key.startswith("cls.")}
    assert all(torch.isfinite(first[key]).all() for key in new)
    weights = first["cls.predictions.transform.dense.weight"]
    assert 0.015 < weights.std() < 0.025  # initializer_range
    assert torch.equal(first["cls.predictions.transform.LayerNorm.weight"], torch.ones(32))
    assert [note.split(" head")[0] for note in reports[0].notes] == [
        "the source has no masked-token",
        "the source has no next-sentence",
    ]


def test_a_bare_bert_without_pooler_gets_no_next_sentence_head(tmp_path: Path) -> None:
    model = CLASSES["BertModel"](stock_model("BertModel").config, add_pooling_layer=False)
    source = save_stock(tmp_path / "stock", randomised(model, torch.float32))
    report = convert_softmax(source, tmp_path / "new")
    assert report.model_class == "CottentionBertForMaskedLM"
    assert {key.split(".")[1] for key in report.new if key.startswith("cls.")} == {"predictions"}


def test_weights_decide_the_class_so_that_none_is_lost(tmp_path: Path) -> None:
    # The first BERT files name BertForMaskedLM, hold both heads, and LayerNorm's parameters under TensorFlow's names.
    source = stock_checkpoint(tmp_path / "stock", "BertForPreTraining")
    change_json(source / "config.json", architectures=["BertForMaskedLM"])
    weights = load_file(source / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in weights.items()
    }
    assert old.keys() != weights.keys()
    save_file(old, source / "model.safetensors", metadata={"format": "pt"})
    report = convert_softmax(source, tmp_path / "new")
    assert report.model_class == "CottentionBertForPreTraining"
    assert all(key.endswith("norm_const") for key in report.new)
    written = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(written[key], value) for key, value in weights.items())


def test_a_tied_gpt_stays_tied(tmp_path: Path) -> None:
    source = stock_checkpoint(tmp_path / "stock", "GPTJForCausalLM", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    convert_softmax(source, tmp_path / "new", attention_type="softmax")
    model = models.CottentionGPTForCausalLM.from_pretrained(tmp_path / "new")
    assert model.lm_head.weight is model.transformer.wte.weight
    stock = CLASSES["GPTJForCausalLM"].from_pretrained(source)
    tokens = some_tokens(1, 9, 60)
    torch.testing.assert_close(model(tokens).logits, stock(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPTJForCausalLM"])
def test_half_precision_is_kept_but_for_norm_const(tmp_path: Path, name: str) -> None:
    source = stock_checkpoint(tmp_path / "stock", name, torch.bfloat16)
    report = convert_softmax(source, tmp_path / "new")
    assert report.dtype == "bfloat16"
    for key, value in load_file(tmp_path / "new" / "model.safetensors").items():
        assert value.dtype == (torch.float32 if key.endswith("norm_const") else torch.bfloat16)


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_a_softmax_model_of_ours_becomes_cosine(tmp_path: Path, kind: str) -> None:
    model = getattr(tiny, kind)("softmax", torch.float32)
    tokenizer = tiny.wordpiece_tokenizer() if kind == "bert" else tiny.bpe_tokenizer()
    source = tiny.save(tmp_path / "softmax", model, tokenizer)
    report = convert_softmax(source, tmp_path / "new")
    assert report.model_class == type(model).__name__
    assert {key.rsplit(".", 1)[1] for key in report.new} == {"norm_const"}


@pytest.mark.parametrize("name", [*BERTS, "GPTJForCausalLM"])
def test_pickled_weights_are_read_too(tmp_path: Path, name: str) -> None:
    source = stock_checkpoint(tmp_path / "stock", name)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    report = convert_softmax(source, tmp_path / "new")
    assert "pytorch_model.bin" in report.files_read
