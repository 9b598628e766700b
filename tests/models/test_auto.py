"""transformers' Auto classes and pipelines know our models, in whatever order things are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

from cottention import models as ours
from tests import tiny
from tests.models.helpers import ATTENTION_TYPES, bert_config, gpt_config, randomised

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", **names)


AUTO: list[tuple[Any, Any, Any]] = [
    (AutoModel, "CottentionGPTModel", gpt_config),
    (AutoModelForCausalLM, "CottentionGPTForCausalLM", gpt_config),
    (AutoModelForPreTraining, "CottentionGPTForCausalLM", gpt_config),
    (AutoModelForSequenceClassification, "CottentionGPTForSequenceClassification", gpt_config),
    (AutoModelForTokenClassification, "CottentionGPTForTokenClassification", gpt_config),
    (AutoModelForQuestionAnswering, "CottentionGPTForQuestionAnswering", gpt_config),
    (AutoModel, "CottentionBertModel", bert_config),
    (AutoModelForPreTraining, "CottentionBertForPreTraining", bert_config),
    (AutoModelForMaskedLM, "CottentionBertForMaskedLM", bert_config),
    (AutoModelForSequenceClassification, "CottentionBertForSequenceClassification", bert_config),
    (AutoModelForTokenClassification, "CottentionBertForTokenClassification", bert_config),
    (AutoModelForQuestionAnswering, "CottentionBertForQuestionAnswering", bert_config),
    (AutoModelForMultipleChoice, "CottentionBertForMultipleChoice", bert_config),
    (AutoModelForNextSentencePrediction, "CottentionBertForNextSentencePrediction", bert_config),
    (AutoModelForTextEncoding, "CottentionBertModel", bert_config),
]


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize(("auto", "name", "make"), AUTO)
def test_auto_classes_open_a_saved_directory(
    auto: Any, name: str, make: Any, attention_type: str, tmp_path: Path
) -> None:
    kind = getattr(ours, name)
    kind(make(attention_type)).save_pretrained(tmp_path)
    model = auto.from_pretrained(tmp_path)
    assert type(model) is kind
    assert model.config.attention_type == attention_type
    assert type(AutoConfig.from_pretrained(tmp_path)) is kind.config_class
    assert type(auto.from_config(model.config)) is kind


@pytest.mark.parametrize(
    "first",
    [
        "import cottention, transformers",
        "import transformers.models.auto.modeling_auto, cottention",
        "import cottention.models.gpt.modeling_gpt",
        "from cottention.models import CottentionBertForSequenceClassification",
        "import transformers.models.auto.configuration_auto, cottention.models.gpt.configuration_gpt",
    ],
)
@pytest.mark.slow
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    code = f"""
{first}
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
gpt = AutoConfig.for_model("cottention-gpt", vocab_size=9, n_embd=8, n_layer=1, n_head=2)
bert = AutoConfig.for_model("cottention-bert", vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
assert type(AutoModelForCausalLM.from_config(gpt)).__name__ == "CottentionGPTForCausalLM"
assert type(AutoModelForSequenceClassification.from_config(gpt)).__name__ == "CottentionGPTForSequenceClassification"
assert type(AutoModelForSequenceClassification.from_config(bert)).__name__ == "CottentionBertForSequenceClassification"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "The", "cat", "##s"]
ALONE: dict[str, dict[str, str]] = {
    "cased": {"vocab.txt": "\n".join(VOCABULARY)},
    "lowercased": {"vocab.txt": "\n".join(token for token in VOCABULARY if token != "The")},
    "recorded": {"vocab.txt": "\n".join(VOCABULARY), "tokenizer_config.json": '{"do_lower_case": true}'},
    "gpt2": {
        "vocab.json": '{"<|endoftext|>": 0, "T": 1, "h": 2, "e": 3, "Th": 4, "The": 5}',
        "merges.txt": "T h\nTh e",
    },
}


@pytest.mark.parametrize("config", [gpt_config(), bert_config()], ids=["gpt", "bert"])
@pytest.mark.parametrize(
    ("files", "kind", "ids"),
    [
        ("cased", BertTokenizer, [2, 6, 7, 8, 3]),
        ("lowercased", BertTokenizer, [2, 5, 6, 7, 3]),
        ("recorded", BertTokenizer, [2, 5, 7, 8, 3]),
        ("gpt2", GPT2Tokenizer, [5]),
    ],
)
def test_a_tokenizer_opens_by_its_files_alone(
    config: Any, files: str, kind: Any, ids: list[int], tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    for name, text in ALONE[files].items():
        (tmp_path / name).write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is kind
    assert tokenizer("The" if kind is GPT2Tokenizer else "The cats").input_ids == ids


@pytest.mark.parametrize("config", [gpt_config(), bert_config()], ids=["gpt", "bert"])
def test_a_tokenizer_json_is_read_as_it_stands(config: Any, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    for settings in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / settings).unlink(missing_ok=True)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is PreTrainedTokenizerFast
    assert again("the cat sat").input_ids == tokenizer("the cat sat").input_ids


def test_a_directory_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    gpt_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Couldn't instantiate the backend tokenizer"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_registering_again_does_no_harm() -> None:
    ours.register_auto_classes()
    ours.register_auto_classes()


def test_every_public_name_can_be_imported() -> None:
    for name in ours.__all__:
        assert getattr(ours, name).__name__ == name
    assert set(ours.__all__) <= set(dir(ours))
    with pytest.raises(AttributeError, match="has no attribute 'CottentionLlama'"):
        ours.CottentionLlama  # noqa: B018


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_text_generation_pipeline_writes_text(attention_type: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = gpt_config(attention_type, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=3)
    model = randomised(ours.CottentionGPTForCausalLM(config), torch.float32)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path))
    prompts = ["the cat sat", "a dog ran to the mat and"]
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    alone = [write(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    assert all(alone)
    batched = write(prompts, batch_size=2, **settings)
    assert [out[0]["generated_text"] for out in batched] == alone


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_pipeline_samples_streams_stops_and_searches(attention_type: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, tiny.gpt(attention_type, torch.float32), tiny.bpe_tokenizer())
    write = pipeline("text-generation", model=str(tmp_path))
    tokenizer: Any = write.tokenizer
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": True, "top_k": 4, "return_full_text": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(0)
    text = write("The people", streamer=streamer, **settings)[0]["generated_text"]
    assert "".join(streamer) == text
    torch.manual_seed(0)
    stop = next(text[i : i + 2] for i in range(3, 20) if text[i : i + 2].isascii())  # no half of a character
    stopped = write("The people", stop_strings=[stop], tokenizer=tokenizer, **settings)[0]["generated_text"]
    assert text.startswith(stopped)
    assert stop in stopped
    assert len(stopped) < len(text)
    beams = write("The people", max_new_tokens=5, num_beams=3, num_return_sequences=3)
    assert len({beam["generated_text"] for beam in beams}) == 3


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_fill_mask_pipeline_fills_the_mask(attention_type: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = ours.CottentionBertForMaskedLM(bert_config(attention_type, vocab_size=len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sentence = "the cat sat on [MASK] mat"
    batch = tokenizer(sentence, return_tensors="pt")
    labels = tokenizer("the cat sat on a mat", return_tensors="pt").input_ids
    for _ in range(30):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    best = pipeline("fill-mask", model=str(tmp_path))(sentence)[0]
    assert best["token_str"] == "a"


def test_classification_pipelines_run(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tasks: list[tuple[Any, str]] = [
        ("text-classification", "CottentionBertForSequenceClassification"),
        ("token-classification", "CottentionBertForTokenClassification"),
        ("token-classification", "CottentionGPTForTokenClassification"),
    ]
    for task, name in tasks:
        make = gpt_config if "GPT" in name else bert_config
        model = getattr(ours, name)(make(vocab_size=len(tokenizer), num_labels=3))
        model.save_pretrained(tmp_path / task)
        tokenizer.save_pretrained(tmp_path / task)
        run: Any = pipeline(task, model=str(tmp_path / task))
        assert run("the cat sat")
