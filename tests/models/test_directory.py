"""A model directory of a stranger: nothing in it is fetched, run, read from elsewhere, or built beyond its files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, pipeline

from cottention.errors import CheckpointError, CottentionError
from cottention.generation import load_model_and_tokenizer
from cottention.models import (
    CottentionBertConfig,
    CottentionBertForMaskedLM,
    CottentionGPTConfig,
    CottentionGPTForCausalLM,
)
from tests import tiny

KERNEL = "kernels-community/flash-attn"


def unsealed(directory: Path) -> Path:
    """Without its hashes: a stranger writes what fits, or none."""
    (directory / "MANIFEST.json").unlink(missing_ok=True)
    return directory


@pytest.fixture
def gpt_dir(tmp_path: Path) -> Path:
    return unsealed(tiny.save(tmp_path / "gpt", tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer()))


@pytest.fixture
def bert_dir(tmp_path: Path) -> Path:
    return unsealed(tiny.save(tmp_path / "bert", tiny.bert(dtype=torch.float32), tiny.wordpiece_tokenizer()))


def change(directory: Path, **fields: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def openers() -> dict[str, Any]:
    """Every way that a GPT's directory is opened, for text or for its numbers."""
    return {
        "ours": CottentionGPTForCausalLM.from_pretrained,
        "auto": AutoModelForCausalLM.from_pretrained,
        "base": AutoModel.from_pretrained,
        "commands": lambda directory: load_model_and_tokenizer(directory, "causal-lm")[0],
        "pipeline": lambda directory: pipeline("text-generation", model=str(directory)).model,
    }


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", [KERNEL, "flash_attention_2", {"": KERNEL}])
def test_a_kernel_named_in_a_config_is_never_looked_for(name: str, value: Any, gpt_dir: Path) -> None:
    change(gpt_dir, **{name: value, "experts_implementation": KERNEL, "_experts_implementation": KERNEL})
    for opened in openers().values():
        config = opened(gpt_dir).config
        assert config._attn_implementation in (None, "eager", "sdpa")
        assert config._experts_implementation in (None, "eager", "grouped_mm")


def test_a_kernel_named_in_a_berts_config_is_never_looked_for(bert_dir: Path) -> None:
    change(bert_dir, _attn_implementation=KERNEL, attn_implementation=KERNEL)
    for opened in (CottentionBertForMaskedLM.from_pretrained, AutoModelForMaskedLM.from_pretrained):
        assert opened(bert_dir).config._attn_implementation != KERNEL


def test_who_opens_a_model_may_still_name_an_attention(gpt_dir: Path) -> None:
    assert CottentionGPTForCausalLM.from_pretrained(gpt_dir, attn_implementation="eager").config.n_layer == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization_config", 5),
        ("quantization_config", []),
        ("compression_config", {"quant_method": "compressed-tensors"}),
        ("transformers_weights", "../outside.safetensors"),
        ("configuration_files", ["../config.1.0.0.json"]),
        ("fusion_config", {"patch_embeddings": True}),
        ("per_layer_config", {"0": {"n_head": 1}}),
        ("distributed_config", {"tp_size": 2}),
    ],
)
def test_what_our_models_do_not_have_is_refused_in_one_line(field: str, value: Any, gpt_dir: Path) -> None:
    change(gpt_dir, **{field: value})
    for name, opened in openers().items():
        if name == "pipeline" and field == "configuration_files":
            continue  # transformers reads that file before it knows whose config it is
        with pytest.raises(CheckpointError, match=rf"asks for .* \({field}\), which our models do not have") as caught:
            opened(gpt_dir)
        assert "\n" not in str(caught.value)


def test_a_config_that_names_code_is_opened_without_it(gpt_dir: Path) -> None:
    change(gpt_dir, auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"})
    (gpt_dir / "evil.py").write_text("raise SystemExit('ran')\n")
    for opened in openers().values():
        assert opened(gpt_dir).config.n_layer == 2


@pytest.mark.parametrize("dtype", ["nn", "float33", "int8", "load", ""])
def test_a_type_that_is_none_is_refused(dtype: str, gpt_dir: Path) -> None:
    for field in ("dtype", "torch_dtype"):
        config = json.loads((gpt_dir / "config.json").read_text())
        config = {name: value for name, value in config.items() if name != "dtype"} | {field: dtype}
        (gpt_dir / "config.json").write_text(json.dumps(config))
        with pytest.raises(CottentionError, match="dtype must be one of float64"):
            CottentionGPTForCausalLM.from_pretrained(gpt_dir)


# Files elsewhere


def sharded(directory: Path) -> Path:
    model = tiny.gpt(dtype=torch.float32)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    unsealed(directory)
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    return directory / "model.safetensors.index.json"


def test_shards_open_and_so_do_the_links_of_a_hub_cache(gpt_dir: Path) -> None:
    sharded(gpt_dir)
    truth = CottentionGPTForCausalLM.from_pretrained(gpt_dir).state_dict()
    snapshot, blobs = gpt_dir.parent / "repo" / "snapshots" / "abc", gpt_dir.parent / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(gpt_dir.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    linked = CottentionGPTForCausalLM.from_pretrained(snapshot).state_dict()
    assert all(torch.equal(linked[name], tensor) for name, tensor in truth.items())


@pytest.mark.parametrize("way", ["parent", "absolute", "inside a folder", "link", "empty", "number"])
def test_an_index_names_no_file_outside(way: str, gpt_dir: Path) -> None:
    index = sharded(gpt_dir)
    content = json.loads(index.read_text())
    shard = sorted(set(content["weight_map"].values()))[0]
    outside = gpt_dir.parent / "outside.safetensors"
    (gpt_dir / shard).rename(outside)
    named: Any = {
        "parent": "../outside.safetensors",
        "absolute": str(outside),
        "inside a folder": "sub/outside.safetensors",
        "link": shard,
        "empty": "",
        "number": 3,
    }[way]
    (gpt_dir / "sub").mkdir()
    os.link(outside, gpt_dir / "sub" / "outside.safetensors")
    if way == "link":
        (gpt_dir / shard).symlink_to(outside)
    weight_map = {name: named if file == shard else file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content | {"weight_map": weight_map}))
    for opened in openers().values():
        with pytest.raises(ValueError, match=r"names a shard outside the directory|names 3 as a file"):
            opened(gpt_dir)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "{"])
def test_an_index_that_is_none_is_one_line(content: str, gpt_dir: Path) -> None:
    sharded(gpt_dir).write_text(content)
    with pytest.raises(CheckpointError, match=r"no index of shards|must hold a JSON object|cannot be read as JSON"):
        CottentionGPTForCausalLM.from_pretrained(gpt_dir)


# Sizes


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_layer": 1_000_000_000},
        {"n_layer": 200_000},
        {"n_embd": 1_000_000_000, "n_head": 1},
        {"n_embd": 1 << 24, "n_head": 1},
        {"vocab_size": 1 << 24},
        {"n_inner": 1 << 23},
        {"n_inner": 1 << 60},
        {"num_labels": 1_000_000_000, "id2label": None},
    ],
)
def test_a_model_that_cannot_be_in_the_file_is_never_built(sizes: dict[str, Any], gpt_dir: Path, monkeypatch) -> None:
    change(gpt_dir, **sizes)
    monkeypatch.setattr(CottentionGPTForCausalLM, "__init__", lambda *_: pytest.fail("built"))
    with pytest.raises(CottentionError, match=r"must be at most|describes a model of"):
        CottentionGPTForCausalLM.from_pretrained(gpt_dir)
    with pytest.raises(CottentionError, match=r"must be at most|describes a model of"):
        AutoModelForCausalLM.from_pretrained(gpt_dir)


def test_a_table_of_positions_counts_too(bert_dir: Path) -> None:
    for name in ("max_position_embeddings", "type_vocab_size"):
        before = (bert_dir / "config.json").read_text()
        change(bert_dir, **{name: 1 << 24})
        with pytest.raises(CheckpointError, match="describes a model of"):
            CottentionBertForMaskedLM.from_pretrained(bert_dir)
        (bert_dir / "config.json").write_text(before)


def test_no_model_has_fewer_numbers_than_its_config_says() -> None:
    configs: list[Any] = [
        CottentionGPTConfig(vocab_size=11, n_embd=8, n_layer=3, n_head=1, n_inner=5, rotary_dim=4),
        CottentionGPTConfig(vocab_size=11, n_embd=8, n_layer=3, n_head=1, rotary_dim=4, tie_word_embeddings=True),
        CottentionBertConfig(
            vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=3
        ),
    ]
    for config in configs:
        model = (CottentionGPTForCausalLM if config.model_type == "cottention-gpt" else CottentionBertForMaskedLM)(
            config
        )
        num_parameters = sum(parameter.numel() for parameter in model.base_model.parameters())
        assert 0.4 * num_parameters < config.least_parameters() <= num_parameters


# Types


@pytest.mark.parametrize("fields", [{"model_type": []}, {"model_type": {}}, {"id2label": 5}, {"id2label": {"a": "b"}}])
def test_fields_of_another_type_are_one_line(fields: dict[str, Any], gpt_dir: Path) -> None:
    change(gpt_dir, **fields)
    with pytest.raises(CottentionError) as caught:
        load_model_and_tokenizer(gpt_dir, "causal-lm")
    assert "\n" not in str(caught.value)


def test_a_deeply_nested_config_is_one_line(gpt_dir: Path) -> None:
    (gpt_dir / "config.json").write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
    for opened in (CottentionGPTForCausalLM.from_pretrained, openers()["commands"]):
        with pytest.raises(CheckpointError, match="nested too deeply"):
            opened(gpt_dir)
