"""A model directory opens as it was saved; anything else is one line that says what is wrong and what to do."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, GPTJConfig, GPTJForCausalLM

from cottention.errors import CheckpointError, CottentionError
from cottention.generation import load_model_and_tokenizer
from cottention.models import CottentionBertForPreTraining
from tests import tiny
from tests.convert.helpers import change_json
from tests.models.helpers import ATTENTION_TYPES, bert_config, randomised, some_tokens

KINDS: list[tuple[Any, Any, Any]] = [
    ("causal-lm", tiny.gpt, tiny.bpe_tokenizer),
    ("masked-lm", tiny.bert, tiny.wordpiece_tokenizer),
]


@pytest.fixture
def gpt_dir(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "gpt", tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer())


@pytest.fixture
def bert_dir(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "bert", tiny.bert(dtype=torch.float32), tiny.wordpiece_tokenizer())


def refusal(source: str | Path, kind: Any = "causal-lm", **settings: Any) -> str:
    with pytest.raises(CottentionError) as caught:
        load_model_and_tokenizer(source, kind, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("kind", "make", "tokenizer"), KINDS)
def test_a_saved_model_opens_as_it_was(kind: Any, make: Any, tokenizer: Any, attention_type: str, tmp_path: Path):
    model = make(attention_type, torch.float32)
    tiny.save(tmp_path, model, tokenizer())
    opened, opened_tokenizer = load_model_and_tokenizer(str(tmp_path), kind)
    assert not opened.training
    assert opened.dtype == torch.float32
    assert opened.config.attention_type == attention_type
    tokens = some_tokens(2, 9, vocab_size=60)
    assert torch.equal(opened(tokens).logits, model(tokens).logits)
    for text in tiny.TEXTS:
        assert opened_tokenizer(text)["input_ids"] == tokenizer()(text)["input_ids"]


def test_the_stored_type_is_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.gpt(dtype=torch.bfloat16), tiny.bpe_tokenizer())
    assert load_model_and_tokenizer(tmp_path, "causal-lm")[0].dtype == torch.bfloat16
    assert load_model_and_tokenizer(tmp_path, "causal-lm", dtype=torch.float32)[0].dtype == torch.float32


def test_a_pretrained_bert_opens_for_its_masked_head(tmp_path: Path) -> None:
    model = randomised(CottentionBertForPreTraining(bert_config(vocab_size=60)), torch.float32)
    tiny.save(tmp_path, model, tiny.wordpiece_tokenizer())
    opened, _ = load_model_and_tokenizer(tmp_path, "masked-lm")
    tokens = some_tokens(1, 9, vocab_size=60)
    assert torch.equal(opened(tokens).logits, model(tokens).prediction_logits)


def test_a_path_is_named_as_it_was_given(gpt_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(gpt_dir.parent)
    assert refusal("gtp") == "no directory gtp; did you mean 'gpt'?"
    assert refusal("gpt/config.json") == "gpt/config.json is a file; expected a model directory"
    # With a folder of that name here it is a path, not somebody's repository on the Hub.
    assert refusal("gpt/modle") == "no directory gpt/modle"
    assert refusal("/nowhere/at/all") == "no directory /nowhere/at/all (nor /nowhere/at)"


def test_home_is_expanded(gpt_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(gpt_dir.parent))
    load_model_and_tokenizer("~/gpt", "causal-lm")


def test_a_hub_name_without_a_network_is_one_line() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    name = "somebody/a-model"
    reason = f"the Hugging Face Hub cannot be reached (nor is {name} in its local cache); HF_HUB_OFFLINE is set"
    assert refusal(name) == f"no directory {name} here, and {reason}"


def test_a_hub_name_opens_its_snapshot_and_fetches_no_pickles(gpt_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(gpt_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load_model_and_tokenizer("somebody/a-model", "causal-lm")
    assert asked["name"] == "somebody/a-model"
    fetched = [
        name
        for name in [*(path.name for path in gpt_dir.iterdir()), "pytorch_model.bin", "optimizer.pt", "tokenizer.pt"]
        if any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"])
    ]
    assert sorted(fetched) == sorted(path.name for path in gpt_dir.iterdir())


@pytest.mark.parametrize(
    ("inside", "hint"),
    [
        ([], ""),
        (["model"], "; it holds the model {}/model"),
        (["model", "checkpoints/checkpoint-50"], "; it holds the model {}/model"),
        (
            ["checkpoints/checkpoint-50", "checkpoints/checkpoint-100"],
            "; it holds the model {}/checkpoints/checkpoint-100",
        ),
        (["a/b/c"], ""),
    ],
)
def test_a_run_directory_is_told_from_the_model_in_it(tmp_path: Path, inside: list[str], hint: str) -> None:
    for age, name in enumerate(inside):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (age, age))
    assert refusal(tmp_path) == (f"{tmp_path} is not a model directory: it has no config.json{hint.format(tmp_path)}")


def test_the_other_kind_is_named(gpt_dir: Path, bert_dir: Path) -> None:
    gpt, bert = "a GPT, which generates text", "a BERT, which fills masks"
    assert refusal(gpt_dir, "masked-lm") == f"{gpt_dir} is {gpt}; needed is {bert}"
    assert refusal(bert_dir, "causal-lm") == f"{bert_dir} is {bert}; needed is {gpt}"


@pytest.mark.parametrize("model_type", ["gptj", "bert"])
def test_a_stock_checkpoint_is_told_how_to_convert(tmp_path: Path, model_type: str) -> None:
    if model_type == "gptj":
        config = GPTJConfig(vocab_size=9, n_embd=8, n_layer=1, n_head=1, rotary_dim=4)
        GPTJForCausalLM(config).save_pretrained(tmp_path)
    else:
        BertConfig().save_pretrained(tmp_path)
    assert refusal(tmp_path) == (
        f"{tmp_path} is a checkpoint of a stock class ({model_type}); convert it first: cottention convert softmax "
        f"{tmp_path} NEW_DIRECTORY (official, not softmax, if the published code wrote it)"
    )


def test_a_model_of_other_code_is_named(gpt_dir: Path) -> None:
    for changed, shown in ({"model_type": "llama"}, "'llama'"), ({"model_type": ...}, "None"):
        change_json(gpt_dir / "config.json", **changed)
        assert refusal(gpt_dir) == f"{gpt_dir} is not one of our models: model_type is {shown}, not cottention-gpt"


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_a_damaged_config_is_one_line(gpt_dir: Path, content: str) -> None:
    (gpt_dir / "config.json").write_text(content, encoding="latin-1")
    message = refusal(gpt_dir)
    assert "config.json cannot be read as JSON" in message or "model_type is None" in message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_head": 3}, "n_head must divide n_embd; got 3 and 32"),
        ({"n_embd": "wide"}, "n_embd"),
        ({"attention_type": "linear"}, "attention_type must be one of cosine, softmax; got 'linear'"),
        ({"n_layer": 3}, "11 are missing, first transformer.h.2.attn.k_proj.weight"),
        ({"n_inner": 64}, "must have shape"),
        ({"attention_type": "softmax"}, "holds cosine attention (it has norm_const weights)"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_one_line(gpt_dir: Path, fields: Any, expected: str) -> None:
    change_json(gpt_dir / "config.json", **fields)
    assert expected in refusal(gpt_dir)


@pytest.mark.parametrize(("kind", "make", "tokenizer"), KINDS)
def test_a_softmax_checkpoint_is_not_opened_as_cosine(kind: Any, make: Any, tokenizer: Any, tmp_path: Path) -> None:
    tiny.save(tmp_path, make("softmax"), tokenizer())
    change_json(tmp_path / "config.json", attention_type="cosine")
    assert "holds softmax attention (it has no norm_const); got attention_type='cosine'" in refusal(tmp_path, kind)


def drop_one(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop("transformer.h.1.attn.q_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "has no weights (model.safetensors)"),
        (lambda path: path.write_bytes(b""), "holds damaged weights"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "holds damaged weights"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "holds damaged weights"),
        (lambda path: path.write_bytes(b"\xff" * 4000), "holds damaged weights"),
        (drop_one, "1 are missing, first transformer.h.1.attn.q_proj.weight"),
    ],
    ids=["missing", "empty", "cut by one byte", "cut in half", "garbage", "a tensor missing"],
)
def test_damaged_weights_are_one_line(gpt_dir: Path, damage: Callable[[Path], Any], expected: str) -> None:
    damage(gpt_dir / "model.safetensors")
    assert expected in refusal(gpt_dir)


def test_pickled_weights_alone_are_not_opened(gpt_dir: Path) -> None:
    (gpt_dir / "model.safetensors").rename(gpt_dir / "pytorch_model.bin")
    assert refusal(gpt_dir) == f"{gpt_dir} has no weights (model.safetensors)"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "has no tokenizer (tokenizer.json)"),
        (lambda path: path.write_text(""), "has a damaged tokenizer"),
        (lambda path: path.write_text("{}"), "has a damaged tokenizer"),
        (lambda path: path.write_text('{"model": {"type": "BPE"}}'), "has a damaged tokenizer"),
        (lambda path: change_json(path, model={"type": "Other"}), "has a damaged tokenizer"),
        (lambda path: change_json(path, decoder={"type": "Other"}), "has a damaged tokenizer"),
        (lambda path: change_json(path, added_tokens=[{"id": "x"}]), "has a damaged tokenizer"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "has a damaged tokenizer"),
        (lambda path: path.write_text(path.read_text()[:500]), "has a damaged tokenizer"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(gpt_dir: Path, damage: Callable[[Path], Any], expected: str) -> None:
    damage(gpt_dir / "tokenizer.json")
    assert expected in refusal(gpt_dir)


def test_damaged_tokenizer_settings_are_one_line(gpt_dir: Path) -> None:
    (gpt_dir / "tokenizer_config.json").write_text("{")
    assert "has a damaged tokenizer" in refusal(gpt_dir)


def test_a_tokenizer_of_another_model_is_one_line(gpt_dir: Path, tmp_path: Path) -> None:
    tiny.save(tmp_path / "small", tiny.gpt(dtype=torch.float32, vocab_size=100), tiny.bpe_tokenizer())
    assert refusal(tmp_path / "small") == f"{tmp_path / 'small'} has a tokenizer of 290 tokens but 100 embeddings"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_one_line(gpt_dir: Path, device: str) -> None:
    assert f"device {device!r} cannot be used here" in refusal(gpt_dir, device=device)


def test_nothing_is_left_open_and_nothing_is_written(gpt_dir: Path) -> None:
    before = {path.name: path.read_bytes() for path in gpt_dir.iterdir()}
    load_model_and_tokenizer(gpt_dir, "causal-lm")
    assert {path.name: path.read_bytes() for path in gpt_dir.iterdir()} == before
    shutil.rmtree(gpt_dir)


def test_code_beside_a_model_never_runs(gpt_dir: Path, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    (gpt_dir / "evil.py").write_text(f"import os; os.mkdir({str(harm)!r}); Thing = None\n")
    change_json(gpt_dir / "config.json", auto_map={"AutoModelForCausalLM": "evil.Thing", "AutoConfig": "evil.Thing"})
    settings = json.loads((gpt_dir / "tokenizer_config.json").read_text())
    (gpt_dir / "tokenizer_config.json").write_text(
        json.dumps({**settings, "auto_map": {"AutoTokenizer": ["evil.Thing", "evil.Thing"]}})
    )
    with contextlib.suppress(CheckpointError):
        load_model_and_tokenizer(gpt_dir, "causal-lm")
    assert not harm.exists()


def test_a_config_without_a_size_does_not_fit(gpt_dir: Path) -> None:
    change_json(gpt_dir / "config.json", vocab_size=...)
    assert "must have shape [50400], by its config; got [290]" in refusal(gpt_dir)


def test_a_missing_head_is_one_line_and_no_table(bert_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert refusal(bert_dir, "classifier") == f"{bert_dir} has no classifier; fine-tune it first: cottention finetune"
    assert not caplog.records


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"eos_token_id": "x"}, "eos_token_id must be an int or None; got 'x'"),
        ({"bos_token_id": {}}, "bos_token_id must be an int or None; got {}"),
        ({"pad_token_id": 290}, "pad_token_id must be from 0 to vocab_size - 1 = 289; got 290"),
        ({"eos_token_id": [0, 5000]}, "eos_token_id must be from 0 to vocab_size - 1 = 289; got 5000"),
    ],
)
def test_special_tokens_of_a_generation_config_are_checked(gpt_dir: Path, fields: dict, expected: str) -> None:
    change_json(gpt_dir / "generation_config.json", **fields)
    assert expected in refusal(gpt_dir)


def test_a_generation_config_decides_nothing_but_its_special_tokens(gpt_dir: Path) -> None:
    """A stranger's file might ask for a thousand million beams, or for a bias of its own."""
    change_json(
        gpt_dir / "generation_config.json", num_beams=10**9, sequence_bias=[[5, -1]], stop_strings=[5], eos_token_id=7
    )
    model, _ = load_model_and_tokenizer(gpt_dir, "causal-lm")
    config: Any = model.generation_config
    assert (config.num_beams, config.sequence_bias, config.stop_strings, config.eos_token_id) in (
        (1, None, None, 7),
        (None, None, None, 7),  # newer versions leave what nobody chose
    )


@pytest.mark.parametrize("content", ["[]", "null", "[" * 100_000, '{"eos_token_id": 1' + "0" * 5000 + "}"])
def test_a_generation_config_that_is_none_is_one_line(gpt_dir: Path, content: str) -> None:
    (gpt_dir / "generation_config.json").write_text(content)
    assert "generation_config.json" in refusal(gpt_dir)
