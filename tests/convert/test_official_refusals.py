"""convert_official refuses what is wrong with a source in one clear line, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cottention.convert import convert_official
from tests.convert.helpers import (
    BIN,
    RunsCode,
    change_json,
    change_tensors,
    message_of,
    shard,
    with_another_decoder,
    without_norm_const,
)

Published = Callable[[str], Path]


@pytest.mark.parametrize(
    ("said", "drop", "expected"),
    [("soft", False, "says softmax attention, but the weights hold norm_const"), ("cos", True, "hold no norm_const")],
)
def test_contradiction_between_settings_and_weights_is_refused(
    published: Published, tmp_path: Path, said: str, drop: bool, expected: str
) -> None:
    source = published("gpt_rot8")
    torch.save({"attention_type": said}, source / "config.pt")
    if drop:
        change_tensors(source, without_norm_const)
    assert expected in message_of(source, tmp_path / "converted")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("file_name", [BIN, "config.pt", "tokenizer.pt", "optimizer.pt"])
def test_pickled_code_never_runs(published: Published, tmp_path: Path, file_name: str, legacy: bool) -> None:
    source = published("gpt_rot8")
    harm = tmp_path / "harm"
    payload = {"attention_type": "cos", "x": RunsCode(harm)}
    torch.save(payload, source / file_name, _use_new_zipfile_serialization=not legacy)
    if file_name == BIN:
        message = message_of(source, tmp_path / "converted")
        assert "pickled code (posix.mkdir)" in message
        assert "refused" in message
    else:
        report = convert_official(source, tmp_path / "converted")
        assert file_name in {item.name for item in report.left_out}
    assert not harm.exists()
    # The payload is a real one: an ordinary unpickler runs it.
    torch.load(source / file_name, weights_only=False)
    assert harm.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_weights_are_refused(published: Published, tmp_path: Path, share: float) -> None:
    source = published("gpt_rot8")
    content = (source / BIN).read_bytes()
    (source / BIN).write_bytes(content[: int(share * len(content))])
    assert "damaged or cut short" in message_of(source, tmp_path / "converted")


def test_one_wrong_byte_in_the_weights_is_noticed(published: Published, tmp_path: Path) -> None:
    source = published("gpt_rot8")
    content = bytearray((source / BIN).read_bytes())
    content[len(content) // 2] ^= 0x10
    (source / BIN).write_bytes(content)
    assert "checksum" in message_of(source, tmp_path / "converted")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("lm_head.bias"), "missing: lm_head.bias"),
        (lambda t: t.pop("transformer.h.1.attn.norm_const"), "missing: transformer.h.1.attn.norm_const"),
        (lambda t: t.update({"transformer.extra": torch.zeros(2)}), "unexpected: transformer.extra"),
        (
            lambda t: t.update({"transformer.ln_f.bias": torch.zeros(63)}),
            "wrong shape: transformer.ln_f.bias is [63], expected [64]",
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": torch.zeros(64, dtype=torch.int32)}),
            "not a floating-point tensor: transformer.ln_f.bias is torch.int32",
        ),
        (lambda t: t.update({"transformer.ln_f.bias": 3}), "'transformer.ln_f.bias' is int"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(64).to_sparse()}), "sparse"),
        (
            lambda t: [t.pop(name) for name in list(t) if ".mlp." in name],
            "transformer.h.0.mlp.fc_in.bias, transformer.h.0.mlp.fc_out.weight and 9 more",
        ),
        (lambda t: t.clear(), "no dictionary of tensors"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    published: Published, tmp_path: Path, change: Callable, expected: str
) -> None:
    source = published("gpt_rot8")
    change_tensors(source, change)
    assert expected in message_of(source, tmp_path / "converted")


def test_a_tied_bert_with_two_different_matrices_is_refused(published: Published, tmp_path: Path) -> None:
    source = published("bert")
    change_tensors(source, with_another_decoder)
    assert "must be the same tensor" in message_of(source, tmp_path / "converted")


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("gpt_rot8", {"model_type": "gpt2"}, "model_type must be bert or gptj; got 'gpt2'"),
        ("gpt_rot8", {"model_type": "cottention-gpt"}, "one of ours already"),
        ("gpt_rot8", {"architectures": ["GPTJModel"]}, "architectures must be"),
        ("gpt_rot8", {"n_embd": ...}, "lacks a whole number for n_embd"),
        ("gpt_rot8", {"n_head": 3}, "n_head must divide n_embd"),
        ("gpt_rot8", {"n_layer": 4}, "missing: transformer.h.3."),
        ("gpt_rot8", {"n_layer": 2}, "unexpected: transformer.h.2."),
        ("gpt_rot8", {"rotary": False}, "rotary must be True"),
        ("gpt_rot8", {"vocab_size": 199}, ""),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ("bert", {"hidden_act": "gelu_typo"}, "hidden_act"),
        ("bert", {"pad_token_id": 5}, "pad_token_id is 5, the tokenizer says 0"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(
    published: Published, tmp_path: Path, name: str, fields: dict, expected: str
) -> None:
    source = published(name)
    change_json(source / "config.json", **fields)
    assert expected in message_of(source, tmp_path / "converted")


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "cannot be read as JSON"), ("[1]", "must hold a JSON object"), (None, "no config.json")],
)
def test_a_damaged_config_is_refused(published: Published, tmp_path: Path, content: str | None, expected: str) -> None:
    source = published("bert")
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(content)
    assert expected in message_of(source, tmp_path / "converted")


def test_missing_weights_and_missing_shards_are_named(published: Published, tmp_path: Path) -> None:
    source = published("gpt_rot8")
    shard(source, safetensors=False)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    assert "names pytorch_model-00002-of-00002.bin, which is missing" in message_of(source, tmp_path / "converted")
    (source / "pytorch_model.bin.index.json").unlink()
    assert "has no weights" in message_of(source, tmp_path / "converted")


def test_an_index_cannot_reach_outside_its_directory(published: Published, tmp_path: Path) -> None:
    source = published("gpt_rot8")
    shard(source, safetensors=False)
    index = source / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../elsewhere.bin")
    index.write_text(json.dumps(content))
    assert "outside the directory" in message_of(source, tmp_path / "converted")
