"""convert_official: what comes out is the published model, whole; what is wrong with the source is one clear line."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForPreTraining, AutoTokenizer

from cottention.convert import convert_official
from tests.convert.helpers import (
    BIN,
    RunsCode,
    change_json,
    change_tensors,
    shard,
    tensors_of,
    with_another_decoder,
)
from tests.convert.stock import CLASSES, assert_same_function, batch_for, stock_checkpoint
from tests.models.helpers import TOLERANCES, errors_against_the_original, published_folder

MODULES = [
    *(("fixtures", name) for name in ("bert", "gpt_rot8", "gpt_rotnone_1head")),
    *(("shared", name) for name in ("bert", "gpt_rot8", "gpt_rot16_full", "gpt_rotnone_1head")),
]
Published = Callable[[str], Path]


def reopened(directory: Path) -> Any:
    """Open with whichever auto class the config asks for."""
    bert = AutoConfig.from_pretrained(directory).model_type == "cottention-bert"
    return (AutoModelForPreTraining if bert else AutoModelForCausalLM).from_pretrained(directory)


@pytest.mark.parametrize(("where", "name"), MODULES)
def test_a_converted_model_gives_the_published_values_and_gradients(
    request: pytest.FixtureRequest, tmp_path: Path, where: str, name: str
) -> None:
    source = published_folder(request, where, name)
    report = convert_official(source, tmp_path / "converted")
    assert report.attention_type == "cosine"
    batches = sorted(source.glob("batch*_grad_norms.json"))
    assert batches
    for dtype, (tolerance, gradient_tolerance) in TOLERANCES.items():
        for batch in (path.name.removesuffix("_grad_norms.json") for path in batches):
            model = reopened(tmp_path / "converted").to(dtype)
            values, gradients = errors_against_the_original(model, source, batch)
            assert max(values.values()) < tolerance, (batch, values)
            assert max(gradients.values()) < gradient_tolerance, (batch, gradients)
            logits = "prediction_logits" if name == "bert" else "logits"
            assert {"loss", "hidden_3"} < set(values)
            assert logits in values or (where, batch) == ("fixtures", "batch0")


@pytest.mark.parametrize("name", ["bert", "gpt_rot8"])
def test_every_tensor_keeps_its_bits_and_the_report_says_what_was_read(
    published: Published, tmp_path: Path, name: str
) -> None:
    source = published(name)
    report = convert_official(source, tmp_path / "converted")
    state = reopened(tmp_path / "converted").state_dict()
    for key, tensor in tensors_of(source).items():
        assert torch.equal(state[key], tensor), key
    assert set(state) == set(tensors_of(source))

    assert json.loads((tmp_path / "converted" / "conversion.json").read_text()) == json.loads(
        json.dumps(report.to_dict())
    )
    assert report.training_step == 7
    assert {"config.json", BIN, "config.pt"} <= set(report.files_read)
    left_out = {item.name: item.reason for item in report.left_out}
    assert "optimiser" in left_out["optimizer.pt"]
    assert "schedule" in left_out["scheduler.pt"]
    assert not {*report.files_read} & {*left_out}
    named = {*report.files_read, *left_out}
    assert {entry.name for entry in source.iterdir()} <= named


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_type_is_kept(published: Published, tmp_path: Path, dtype: torch.dtype) -> None:
    source = published("gpt_rot8")
    change_tensors(source, lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))
    report = convert_official(source, tmp_path / "converted")
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert reopened(tmp_path / "converted").lm_head.weight.dtype == dtype


def test_mixed_types_are_kept_and_noted(published: Published, tmp_path: Path) -> None:
    source = published("gpt_rot8")
    change_tensors(
        source,
        lambda tensors: tensors.update({key: value.bfloat16() for key, value in tensors.items() if "mlp" in key}),
    )
    report = convert_official(source, tmp_path / "converted")
    assert any("several types" in note for note in report.notes)
    stored = load_file(tmp_path / "converted" / "model.safetensors")
    assert {key: value.dtype for key, value in stored.items()} == {
        key: value.dtype for key, value in tensors_of(source).items()
    }


@pytest.mark.parametrize("safetensors", [False, True])
def test_shards_are_put_together(published: Published, tmp_path: Path, safetensors: bool) -> None:
    source = published("gpt_rot8")
    expected = tensors_of(source)
    shard(source, safetensors=safetensors)
    report = convert_official(source, tmp_path / "converted")
    assert sum("-of-00002" in name for name in report.files_read) == 2
    state = reopened(tmp_path / "converted").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_safetensors_alone_are_enough_and_come_before_the_pickle(published: Published, tmp_path: Path) -> None:
    source = published("bert")
    tensors = {name: tensor.clone() for name, tensor in tensors_of(source).items()}  # a tied one has two names
    save_file(tensors, source / "model.safetensors")
    (source / BIN).write_bytes(b"not looked at")
    report = convert_official(source, tmp_path / "both")
    assert "model.safetensors" in report.files_read
    assert {item.name: item.reason for item in report.left_out}[BIN] == "other weights were read"
    (source / BIN).unlink()
    convert_official(source, tmp_path / "alone")
    for directory in ("both", "alone"):
        state = reopened(tmp_path / directory).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("name", "settings", "written"),
    [
        ("BertForPreTraining", {}, {}),
        ("GPTJForCausalLM", {"n_embd": 128, "rotary_dim": 64}, {}),  # as published: the whole head turns
        ("GPTJForCausalLM", {"n_head": 1, "rotary_dim": 32}, {"rotary_dim": None}),  # the same, said in another way
    ],
)
def test_a_softmax_checkpoint_gives_the_stock_values_and_gradients(
    tmp_path: Path, name: str, settings: dict[str, Any], written: dict[str, Any]
) -> None:
    source = stock_checkpoint(tmp_path / "published", name, **settings)
    stock = CLASSES[name].from_pretrained(source, attn_implementation="eager").eval()
    change_json(source / "config.json", **written)
    torch.save(load_file(source / "model.safetensors"), source / BIN)
    (source / "model.safetensors").unlink()
    torch.save({"attention_type": "soft", "step_ckpt": 3}, source / "config.pt")
    report = convert_official(source, tmp_path / "converted")
    assert (report.attention_type, report.training_step) == ("softmax", 3)
    assert_same_function(reopened(tmp_path / "converted").eval(), stock, batch_for(name))


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage"])
def test_unreadable_settings_cost_only_the_step(published: Published, tmp_path: Path, content: bytes) -> None:
    source = published("gpt_rot8")
    (source / "config.pt").write_bytes(content)
    report = convert_official(source, tmp_path / "converted")
    assert report.training_step is None
    assert "damaged" in {item.name: item.reason for item in report.left_out}["config.pt"]


def test_pickled_tokenizer_is_left_alone(published: Published, tmp_path: Path) -> None:
    source = published("bert")
    harm = tmp_path / "harm"
    (source / "tokenizer.pt").write_bytes(pickle.dumps(RunsCode(harm)))
    report = convert_official(source, tmp_path / "converted")
    assert "pickled object" in {item.name: item.reason for item in report.left_out}["tokenizer.pt"]
    assert not harm.exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 100, 101, 102, 103]


def test_constants_of_older_versions_are_left_out(published: Published, tmp_path: Path) -> None:
    source = published("gpt_rot8")
    constants = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128, dtype=torch.bool),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e9),
        "transformer.h.2.attn.embed_positions": torch.zeros(128, 8),
    }
    change_tensors(source, lambda tensors: tensors.update(constants))
    report = convert_official(source, tmp_path / "converted")
    assert constants.keys() <= {item.name for item in report.left_out}


@pytest.mark.parametrize("dropped", ["cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"])
def test_a_tied_bert_needs_only_one_name_of_its_matrix(published: Published, tmp_path: Path, dropped: str) -> None:
    source = published("bert")
    matrix = tensors_of(source)[dropped]
    change_tensors(source, lambda tensors: [tensors.pop(dropped), tensors.pop("cls.predictions.decoder.bias")])
    convert_official(source, tmp_path / "converted")
    model = reopened(tmp_path / "converted")
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, matrix)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_an_untied_bert_keeps_both_matrices(published: Published, tmp_path: Path) -> None:
    source = published("bert")
    change_json(source / "config.json", tie_word_embeddings=False)
    change_tensors(source, with_another_decoder)
    convert_official(source, tmp_path / "converted")
    state = reopened(tmp_path / "converted").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors_of(source).items())


def test_a_checkpoint_without_tokenizer_is_converted_with_a_note(published: Published, tmp_path: Path) -> None:
    source = published("gpt_rot8")
    (source / "vocab.json").unlink()
    report = convert_official(source, tmp_path / "converted")
    assert report.tokenizer is None
    assert any("no tokenizer" in note for note in report.notes)


def test_values_that_are_not_finite_are_noted(published: Published, tmp_path: Path) -> None:
    source = published("gpt_rot8")
    change_tensors(source, lambda tensors: tensors["transformer.wte.weight"][3].fill_(float("nan")))
    report = convert_official(source, tmp_path / "converted")
    assert report.notes == ("NaN or infinite values in transformer.wte.weight",)


@pytest.mark.parametrize("arch", ["bert", "gpt"])
@pytest.mark.parametrize("stage", ["final", "interrupted", "init"])
def test_trained_checkpoints_convert(oracle_dir: Path, tmp_path: Path, arch: str, stage: str) -> None:
    report = convert_official(oracle_dir / "train" / arch / stage, tmp_path / "converted")
    assert (report.architecture, report.attention_type) == (arch, "cosine")
    assert (report.tokenizer is None) == (stage == "init")
