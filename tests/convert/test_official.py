"""convert_official: what comes out is the published model, whole; what is wrong with the source is one clear line."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForPreTraining, AutoTokenizer

from cottention.convert import convert_official
from cottention.errors import CheckpointError
from tests.convert.helpers import (
    BIN,
    RunsCode,
    change_json,
    change_tensors,
    shard,
    tensors_of,
    without_norm_const,
)
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


def message_of(source: Path, destination: Path, overwrite: bool = False) -> str:
    """The one line that refuses `source`; nothing may be left at or beside `destination`."""
    before = set(destination.parent.iterdir())
    with pytest.raises(CheckpointError) as refusal:
        convert_official(source, destination, overwrite=overwrite)
    message = str(refusal.value)
    assert "\n" not in message
    assert set(destination.parent.iterdir()) == before
    return message


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


@pytest.mark.parametrize("name", ["bert", "gpt_rot8"])
def test_softmax_checkpoint_becomes_a_softmax_model(published: Published, tmp_path: Path, name: str) -> None:
    source = published(name)
    change_tensors(source, without_norm_const)
    torch.save({"attention_type": "soft", "step_ckpt": 3}, source / "config.pt")
    report = convert_official(source, tmp_path / "converted")
    assert (report.attention_type, report.training_step) == ("softmax", 3)
    config = AutoConfig.from_pretrained(tmp_path / "converted")
    assert config.attention_type == "softmax"


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


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage"])
def test_unreadable_settings_cost_only_the_step(published: Published, tmp_path: Path, content: bytes) -> None:
    source = published("gpt_rot8")
    (source / "config.pt").write_bytes(content)
    report = convert_official(source, tmp_path / "converted")
    assert report.training_step is None
    assert "damaged" in {item.name: item.reason for item in report.left_out}["config.pt"]


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


def test_pickled_tokenizer_is_left_alone(published: Published, tmp_path: Path) -> None:
    source = published("bert")
    harm = tmp_path / "harm"
    (source / "tokenizer.pt").write_bytes(pickle.dumps(RunsCode(harm)))
    report = convert_official(source, tmp_path / "converted")
    assert "pickled object" in {item.name: item.reason for item in report.left_out}["tokenizer.pt"]
    assert not harm.exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 100, 101, 102, 103]


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


def _with_another_decoder(tensors: dict[str, torch.Tensor]) -> None:
    tensors["cls.predictions.decoder.weight"] = tensors["cls.predictions.decoder.weight"] + 1


def test_a_tied_bert_with_two_different_matrices_is_refused(published: Published, tmp_path: Path) -> None:
    source = published("bert")
    change_tensors(source, _with_another_decoder)
    assert "must be the same tensor" in message_of(source, tmp_path / "converted")


def test_an_untied_bert_keeps_both_matrices(published: Published, tmp_path: Path) -> None:
    source = published("bert")
    change_json(source / "config.json", tie_word_embeddings=False)
    change_tensors(source, _with_another_decoder)
    convert_official(source, tmp_path / "converted")
    state = reopened(tmp_path / "converted").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors_of(source).items())


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


def test_an_existing_destination_is_replaced_only_when_asked(published: Published, tmp_path: Path) -> None:
    source, destination = published("gpt_rot8"), tmp_path / "converted"
    convert_official(source, destination)
    (destination / "mark").touch()
    assert "exists already; pass --overwrite" in message_of(source, destination)
    assert (destination / "mark").exists()
    convert_official(source, destination, overwrite=True)
    assert not (destination / "mark").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["converted", "published-gpt_rot8"]


def test_overwrite_replaces_models_only(published: Published, tmp_path: Path) -> None:
    source = published("gpt_rot8")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    assert "not a model directory" in message_of(source, precious, overwrite=True)
    assert "holds the source itself" in message_of(source, source, overwrite=True)
    assert (precious / "thesis.tex").exists()
    assert (source / BIN).exists()


def test_a_failed_replacement_leaves_the_old_model(published: Published, tmp_path: Path) -> None:
    source, destination = published("gpt_rot8"), tmp_path / "converted"
    convert_official(source, destination)
    change_tensors(source, lambda tensors: tensors.pop("lm_head.bias"))
    message_of(source, destination, overwrite=True)
    assert (destination / "model.safetensors").is_file()


def test_a_full_disk_leaves_nothing(published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerBase

    def fails(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    source = published("gpt_rot8")
    # The weights are on disk by then, the tokenizer is not.
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fails)
    assert "No space left on device" in message_of(source, tmp_path / "converted")


def test_a_written_tensor_that_reads_back_differently_is_noticed(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerBase

    save = PreTrainedTokenizerBase.save_pretrained

    def save_and_spoil(self: PreTrainedTokenizerBase, directory: Path, **options: Any) -> object:
        weights = load_file(Path(directory) / "model.safetensors")
        weights["lm_head.bias"][0] += 1
        save_file(weights, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        return save(self, directory, **options)

    source = published("gpt_rot8")
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_and_spoil)
    assert "reads back differently: lm_head.bias" in message_of(source, tmp_path / "converted")


def test_a_killed_conversion_leaves_no_destination_and_is_cleared_up(published: Published, tmp_path: Path) -> None:
    source, destination = published("gpt_rot8"), tmp_path / "converted"
    script = textwrap.dedent(
        """
        import os, signal, sys
        from transformers import PreTrainedTokenizerBase
        from cottention.convert import convert_official
        PreTrainedTokenizerBase.save_pretrained = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
        convert_official(sys.argv[1], sys.argv[2])
        """
    )
    killed = subprocess.run([sys.executable, "-c", script, source, destination], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not destination.exists()
    leftovers = [entry for entry in tmp_path.iterdir() if entry.name.startswith(".converted.partial-")]
    assert len(leftovers) == 1
    convert_official(source, destination)
    assert destination.is_dir()
    assert not leftovers[0].exists()


@pytest.mark.parametrize("arch", ["bert", "gpt"])
@pytest.mark.parametrize("stage", ["final", "interrupted", "init"])
def test_trained_checkpoints_convert(oracle_dir: Path, tmp_path: Path, arch: str, stage: str) -> None:
    report = convert_official(oracle_dir / "train" / arch / stage, tmp_path / "converted")
    assert (report.architecture, report.attention_type) == (arch, "cosine")
    assert (report.tokenizer is None) == (stage == "init")
