"""Saving and loading: bit for bit, strictly by name, and never with a silent gap."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForPreTraining

from cottention.errors import CheckpointError
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
from tests.models.helpers import ATTENTION_TYPES, bert_config, gpt_config, randomised, some_tokens

CLASSES: list[tuple[Any, Any]] = [
    (CottentionGPTModel, gpt_config),
    (CottentionGPTForCausalLM, gpt_config),
    (CottentionGPTForSequenceClassification, gpt_config),
    (CottentionBertModel, bert_config),
    (CottentionBertForPreTraining, bert_config),
    (CottentionBertForMaskedLM, bert_config),
    (CottentionBertForSequenceClassification, bert_config),
    (CottentionBertForTokenClassification, bert_config),
    (CottentionBertForQuestionAnswering, bert_config),
]
# One of each family.
PAIRS: list[tuple[Any, Any]] = [(CottentionGPTForCausalLM, gpt_config), (CottentionBertForPreTraining, bert_config)]


class LogCatcher(logging.Handler):
    """What transformers' loading says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def said() -> Any:
    logger, catcher = logging.getLogger("transformers.modeling_utils"), LogCatcher()
    level = logger.level
    logger.addHandler(catcher)
    logger.setLevel(logging.WARNING)  # a training in the same process may have asked transformers for errors alone
    yield catcher.lines
    logger.setLevel(level)
    logger.removeHandler(catcher)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), CLASSES)
def test_a_saved_model_comes_back_bit_for_bit(
    kind: Any, make: Any, attention_type: str, tmp_path: Path, said: list[str]
) -> None:
    model = randomised(kind(make(attention_type)), torch.float32)
    model.save_pretrained(tmp_path)
    back = kind.from_pretrained(tmp_path)
    assert {name: p.dtype for name, p in back.state_dict().items()} == {
        name: p.dtype for name, p in model.state_dict().items()
    }
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    tokens = some_tokens(2, 9)
    assert torch.equal(back(tokens)[0], model(tokens)[0])
    assert not back.training
    assert said == []


@pytest.mark.parametrize(("kind", "make"), CLASSES)
def test_bfloat16_weights_come_back_bit_for_bit(kind: Any, make: Any, tmp_path: Path) -> None:
    model = randomised(kind(make()), torch.float32)
    model.save_pretrained(tmp_path / "float32")
    half = kind.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    # The exponent of the length stays exact.
    exact = {name: p for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert exact
    assert all(name.endswith("norm_const") for name in exact)
    tokens = some_tokens(2, 9)
    logits = half(tokens)[0]
    assert logits.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "bfloat16")
    back = kind.from_pretrained(tmp_path / "bfloat16")
    assert torch.equal(back(tokens)[0], logits)


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    kinds: list[Any] = [CottentionBertForPreTraining, CottentionBertForMaskedLM]
    for kind in kinds:
        model = kind(bert_config())
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            assert not [name for name in list(file.keys()) if "decoder" in name]
        back = kind.from_pretrained(tmp_path)
        assert back.cls.predictions.decoder.weight is back.bert.embeddings.word_embeddings.weight
        assert back.cls.predictions.decoder.bias is back.cls.predictions.bias
    gpt = CottentionGPTForCausalLM(gpt_config(tie_word_embeddings=True))
    gpt.save_pretrained(tmp_path)
    back = CottentionGPTForCausalLM.from_pretrained(tmp_path)
    assert back.lm_head.weight is back.transformer.wte.weight
    untied = CottentionGPTForCausalLM(gpt_config())
    assert untied.lm_head.weight is not untied.transformer.wte.weight


def test_old_buffers_do_not_break_strict_loading(tmp_path: Path, said: list[str]) -> None:
    bert = CottentionBertForPreTraining(bert_config())
    weights = bert.state_dict() | {"bert.embeddings.position_ids": torch.arange(64)[None]}
    bert.load_state_dict(weights, strict=True)
    bert.config.save_pretrained(tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    CottentionBertForPreTraining.from_pretrained(tmp_path)
    assert said == []


@pytest.mark.parametrize("new_size", [61, 50, 80])
def test_embeddings_can_be_resized(new_size: int) -> None:
    for kind, make in PAIRS:
        model = kind(make())
        model.resize_token_embeddings(new_size)
        assert model(some_tokens(1, 5, vocab_size=50))[0].shape[-1] == new_size
        assert model.get_output_embeddings().bias.shape == (new_size,)
        assert model.config.vocab_size == new_size


def test_a_softmax_checkpoint_is_not_opened_as_cosine_nor_the_reverse(tmp_path: Path, said: list[str]) -> None:
    for kind, make in PAIRS:
        kind(make("cosine")).save_pretrained(tmp_path / "cosine")
        kind(make("softmax")).save_pretrained(tmp_path / "softmax")
        with pytest.raises(CheckpointError) as caught:
            kind.from_pretrained(tmp_path / "cosine", attention_type="softmax")
        assert str(caught.value) == (
            f"{tmp_path / 'cosine'} holds cosine attention (it has norm_const weights); got attention_type='softmax'"
        )
        with pytest.raises(CheckpointError) as caught:
            kind.from_pretrained(tmp_path / "softmax", attention_type="cosine")
        assert str(caught.value) == (
            f"{tmp_path / 'softmax'} holds softmax attention (it has no norm_const); got attention_type='cosine'"
        )
    CottentionGPTForCausalLM(gpt_config("softmax")).save_pretrained(tmp_path / "auto")
    with pytest.raises(CheckpointError, match="holds softmax attention"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "auto", attention_type="cosine")
    # One line means one line: transformers' table of missing weights is held back.
    assert said == []


def test_missing_weights_of_the_model_itself_are_an_error(tmp_path: Path) -> None:
    CottentionGPTForCausalLM(gpt_config()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        CottentionGPTForSequenceClassification.from_pretrained(tmp_path, n_layer=3)
    assert "must hold every weight of the model; 11 are missing, first transformer.h.2.attn.k_proj.weight" in str(
        caught.value
    )


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make"), PAIRS)
def test_a_file_without_any_weight_of_the_model_says_so(
    kind: Any, make: Any, attention_type: str, tmp_path: Path
) -> None:
    make(attention_type).save_pretrained(tmp_path)
    for tensors in ({}, {"something.else": torch.ones(2)}):
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"must hold the weights of {kind.__name__}; it holds none of them"):
            kind.from_pretrained(tmp_path)


def test_scripts_that_catch_what_transformers_raises_catch_ours(tmp_path: Path) -> None:
    CottentionGPTForCausalLM(gpt_config()).save_pretrained(tmp_path)
    for caught in (RuntimeError, ValueError, CheckpointError):
        with pytest.raises(caught, match=r"must have shape \[50\]"):
            CottentionGPTForCausalLM.from_pretrained(tmp_path, vocab_size=50)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("new_size", [40, 61, 97])
@pytest.mark.parametrize(("kind", "make"), [*PAIRS, (CottentionBertForMaskedLM, bert_config)])
def test_a_resized_model_comes_back_with_its_biases(
    kind: Any, make: Any, new_size: int, tied: bool, tmp_path: Path
) -> None:
    model = randomised(kind(make(tie_word_embeddings=tied)), torch.float32)
    before = model(some_tokens(2, 9, vocab_size=40))[0]
    model.resize_token_embeddings(new_size)
    for again in (model, None):
        if again is None:
            model.save_pretrained(tmp_path)
            again = kind.from_pretrained(tmp_path)
        kept = min(new_size, 61)
        torch.testing.assert_close(again(some_tokens(2, 9, vocab_size=40))[0][..., :kept], before[..., :kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "make"), PAIRS)
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_norm_const_alone_stays_float32(
    kind: Any, make: Any, attention_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = kind(make(attention_type))
    assert model._keep_in_fp32_modules_strict == ({"norm_const"} if attention_type == "cosine" else set())
    model.save_pretrained(tmp_path)
    auto = AutoModelForPreTraining
    for back in (kind.from_pretrained(tmp_path, dtype=dtype), auto.from_config(model.config, dtype=dtype)):
        for name, parameter in back.named_parameters():
            assert parameter.dtype == (torch.float32 if name.endswith("norm_const") else dtype)
        assert back(some_tokens(2, 9))[0].dtype == dtype


@pytest.mark.parametrize(("kind", "make"), PAIRS)
def test_attn_implementation_is_what_runs(kind: Any, make: Any, tmp_path: Path) -> None:
    softmax, cosine = randomised(kind(make("softmax"))), randomised(kind(make("cosine")))
    expected = softmax(some_tokens(2, 9))[0]
    for name in ("eager", "sdpa"):
        model = kind(make("softmax", attn_implementation=name)).double()
        model.load_state_dict(softmax.state_dict())
        assert model.config._attn_implementation == name
        assert torch.equal(model.eval()(some_tokens(2, 9))[0], expected)
        softmax.set_attn_implementation(name)
        assert softmax.config._attn_implementation == name
    cosine.set_attn_implementation("eager")
    cosine.save_pretrained(tmp_path)
    for wrong in ("sdpa", "flash_attention_2", "kernels-community/flash-attn"):
        expected_line = rf"attn_implementation must be 'eager' for attention_type='cosine'.*; got '{wrong}'"
        with pytest.raises(ValueError, match=expected_line):
            kind(make("cosine", attn_implementation=wrong))
        with pytest.raises(ValueError, match=expected_line):
            kind.from_pretrained(tmp_path, attn_implementation=wrong)
        with pytest.raises(ValueError, match=expected_line):
            cosine.set_attn_implementation(wrong)
    with pytest.raises(
        ValueError, match=r"must be 'eager' or 'sdpa' for attention_type='softmax'.*got 'flex_attention'"
    ):
        softmax.set_attn_implementation("flex_attention")


def test_other_shapes_are_an_error_unless_allowed(tmp_path: Path) -> None:
    CottentionGPTForCausalLM(gpt_config()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head\.bias in .* must have shape \[70\], by its config; got \[61\]"):
        CottentionGPTForCausalLM.from_pretrained(tmp_path, vocab_size=70)
    model = CottentionGPTForCausalLM.from_pretrained(tmp_path, vocab_size=70, ignore_mismatched_sizes=True)
    assert model.lm_head.bias.shape == (70,)


def test_a_new_head_is_reported_and_allowed(tmp_path: Path, said: list[str]) -> None:
    CottentionBertForMaskedLM(bert_config()).save_pretrained(tmp_path)
    _, info = CottentionBertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert len(said) == 1
    assert "classifier.weight" in said[0]


@pytest.mark.parametrize("kept", [0, 5, 100, 20_000, -1])
def test_a_cut_safetensors_file_is_one_line(tmp_path: Path, kept: int) -> None:
    CottentionGPTForCausalLM(gpt_config()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="holds damaged weights: ") as caught:
        CottentionGPTForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


class RunsCode:
    """What a malicious pickle does."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("the pickle ran",))


def test_a_bad_pytorch_file_is_one_line_and_never_run(tmp_path: Path) -> None:
    model = CottentionGPTForCausalLM(gpt_config())
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), file)
    CottentionGPTForCausalLM.from_pretrained(tmp_path)
    whole = file.read_bytes()
    for content in (b"", b"no tensors here", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            CottentionGPTForCausalLM.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
    torch.save({"a": RunsCode()}, file)
    with pytest.raises(CheckpointError, match=r"must hold plain tensors; .* would run code, so it was not loaded"):
        CottentionGPTForCausalLM.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors; there is no such file"):
        CottentionGPTForCausalLM.from_pretrained(tmp_path)
