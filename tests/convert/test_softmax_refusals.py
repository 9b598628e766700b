"""convert_softmax refuses what it cannot carry over, in one line that names it, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from cottention.convert import DistillationSettings, convert_softmax
from cottention.convert import softmax as softmax_module
from cottention.errors import CheckpointError, CottentionError, DataError, SettingsError
from tests import tiny
from tests.convert.helpers import change_json
from tests.convert.stock import stock_checkpoint

WEIGHTS = "model.safetensors"
GPT2 = (
    ", which has learned positions (wpe), biases in its attention, and a second LayerNorm for a feed-forward part that "
    "reads the attention's output"
)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return stock_checkpoint(tmp_path / "stock", "BertForMaskedLM")


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    return stock_checkpoint(tmp_path / "stock", "GPTJForCausalLM")


def refusal(source: str | Path, kind: type[CottentionError] = CheckpointError, **options: Any) -> str:
    """The one line that refuses `source`, its place written SRC; nothing may be left at or beside the destination."""
    destination = Path(source).parent / "new" if Path(source).exists() else Path("new")
    before = set(destination.parent.iterdir())
    with pytest.raises(kind) as caught:
        convert_softmax(source, destination, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert set(destination.parent.iterdir()) == before
    return message.replace(str(source), "SRC")


def change_weights(source: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("gpt2", GPT2),
        ("gpt_neox", ", which has biases in its attention, a second LayerNorm, and rotary pairs of another order"),
        ("t5", ""),
        (None, ""),
    ],
)
def test_another_architecture_is_told_what_is_supported(gpt: Path, model_type: str | None, why: str) -> None:
    change_json(gpt / "config.json", model_type=model_type)
    assert refusal(gpt) == (
        f"SRC/config.json: cannot carry over a model of type {model_type!r}{why}; supported: BERT (BertForPreTraining, "
        "BertForMaskedLM, BertModel) and GPT-J (GPTJForCausalLM)"
    )


@pytest.mark.parametrize("named", [["BertForSequenceClassification"], ["BertModel", "BertForMaskedLM"], "BertModel"])
def test_another_class_is_told_what_is_supported(bert: Path, named: Any) -> None:
    change_json(bert / "config.json", architectures=named)
    assert refusal(bert) == (
        "SRC/config.json: architectures must be ['BertForPreTraining'] or ['BertForMaskedLM'] or ['BertModel']; "
        f"got {named!r}"
    )


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'; got 'relative_key'"),
        ({"is_decoder": True}, "is_decoder must be False; got True"),
        ({"add_cross_attention": True}, "add_cross_attention must be False; got True"),
    ],
)
def test_a_bert_that_computes_something_else_is_named(bert: Path, fields: dict[str, Any], expected: str) -> None:
    change_json(bert / "config.json", **fields)
    assert refusal(bert) == f"SRC/config.json: {expected}"


def test_a_model_that_is_cosine_already_is_named(tmp_path: Path, gpt: Path) -> None:
    ours = tiny.save(tmp_path / "ours", tiny.bert(dtype=torch.float32), tiny.wordpiece_tokenizer())
    assert refusal(ours) == "SRC is cosine already (attention_type in config.json): nothing to convert"
    change_weights(gpt, lambda tensors: tensors.update({"transformer.h.0.attn.norm_const": torch.zeros(1, 2, 1, 1)}))
    assert refusal(gpt) == (
        "SRC is cosine already: its weights hold norm_const; `cottention convert official` reads it"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("bert.encoder.layer.1.attention.self.key.bias"), "missing: bert.encoder.layer.1.attention."),
        (lambda t: t.pop("cls.predictions.transform.dense.bias"), "missing: cls.predictions.transform.dense.bias"),
        (lambda t: t.update(classifier=torch.zeros(2)), "unexpected: classifier"),
        (
            lambda t: t.update({"bert.encoder.layer.0.crossattention.self.key.bias": torch.zeros(32)}),
            "unexpected: bert.encoder.layer.0.crossattention.self.key.bias",
        ),
        (
            lambda t: t.update({"cls.predictions.bias": torch.zeros(7)}),
            "wrong shape: cls.predictions.bias is [7], expected [60]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(bert: Path, change: Callable[..., Any], expected: str) -> None:
    change_weights(bert, change)
    assert expected in refusal(bert)


def test_a_gpt_without_its_head_is_incomplete(gpt: Path) -> None:
    change_weights(gpt, lambda tensors: [tensors.pop("lm_head.weight"), tensors.pop("lm_head.bias")])
    assert "missing: lm_head.weight, lm_head.bias" in refusal(gpt)


def test_missing_and_truncated_weights_are_named(bert: Path) -> None:
    content = (bert / WEIGHTS).read_bytes()
    for share in (0, 0.3, 0.99):
        (bert / WEIGHTS).write_bytes(content[: int(share * len(content))])
        assert "model.safetensors cannot be read, it is damaged or cut short" in refusal(bert)
    (bert / WEIGHTS).unlink()
    assert "SRC has no weights: expected model.safetensors or pytorch_model.bin" in refusal(bert)


def test_a_hub_name_without_network_and_a_wrong_path_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal("somebody/some-bert").startswith("no directory SRC here, and the Hugging Face Hub cannot be reached")
    assert refusal("nowhere") == "no directory SRC"


def test_settings_without_sense_are_named(bert: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.TEXTS) * 20)
    taught = DistillationSettings(text=(str(text),))
    assert refusal(bert, SettingsError, norm_const=float("nan")) == "norm_const must be from -inf to inf; got nan"
    assert refusal(bert, SettingsError, attention_type="cosin").endswith("got 'cosin'; did you mean 'cosine'?")
    assert refusal(bert, SettingsError, attention_type="softmax", distillation=taught) == (
        "a distillation teaches cosine attention; got attention_type 'softmax'"
    )
    long = DistillationSettings(text=(str(text),), window=65)
    assert refusal(bert, SettingsError, distillation=long) == (
        "window must be at most the 64 positions of the source; got 65"
    )
    short = DistillationSettings(text=(str(text),), window=16)
    assert refusal(bert, SettingsError, distillation=short, device="cuda:77").startswith("device 'cuda:77' cannot")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ()}, "a distillation needs text; got none"),
        ({"steps": -1}, "steps must be at least 0; got -1"),
        ({"end_to_end_steps": -1}, "end_to_end_steps must be at least 0; got -1"),
        ({"window": 3}, "window must be at least 4; got 3"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"learning_rate": -1.0}, "learning_rate must be from 0 to inf; got -1.0"),
    ],
)
def test_distillation_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        DistillationSettings(**{"text": ("a.txt",), **changes})
    assert str(caught.value) == message


def test_text_that_cannot_teach_is_named(bert: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    taught = DistillationSettings(text=(str(text),), window=64)
    assert "text.txt" in refusal(bert, DataError, distillation=taught)
    text.write_text("The people of the United States, in order")
    message = refusal(bert, DataError, distillation=taught)
    assert message.startswith("the corpus has ")
    assert message.endswith(" tokens, too few for one window of 64; shorten the window")
    text.write_text("The")
    assert refusal(bert, DataError, distillation=taught) == (
        "the text must hold enough words to keep some for the scores; got 3 characters"
    )


def test_a_distillation_needs_the_tokenizer(bert: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bert / name).unlink()
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.TEXTS) * 20)
    taught = DistillationSettings(text=(str(text),), window=16)
    assert refusal(bert, distillation=taught) == "SRC has no tokenizer files, which a distillation needs"


@pytest.mark.parametrize("moment", ["while it learns", "while it writes"])
def test_an_interrupt_leaves_nothing(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    places: dict[str, tuple[Any, str]] = {
        "while it learns": (softmax_module, "distil"),
        "while it writes": (PreTrainedTokenizerBase, "save_pretrained"),
    }
    monkeypatch.setattr(*places[moment], interrupted)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.TEXTS) * 20)
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert_softmax(
            bert, tmp_path / "new", distillation=DistillationSettings(text=(str(text),), window=16, steps=1)
        )
    assert set(tmp_path.iterdir()) == before
