"""convert_softmax makes hybrids, reads softmax models of ours with options, and refuses stock files that name them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cottention.cli.main import main
from cottention.convert import DistillationSettings, convert_softmax
from cottention.errors import CheckpointError, SettingsError
from cottention.models import CottentionBertForMaskedLM, CottentionGPTForCausalLM
from tests import tiny
from tests.convert.helpers import change_json
from tests.convert.stock import stock_checkpoint
from tests.models.helpers import some_tokens

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
TOKENS = some_tokens(2, 20, 60)


def saved_gpt(directory: Path, **settings: Any) -> tuple[Path, Any]:
    model = tiny.gpt("softmax", torch.float32, **settings)
    return tiny.save(directory, model, tiny.bpe_tokenizer()), model


@pytest.mark.parametrize(("name", "sizes"), [("GPTJForCausalLM", "n_layer"), ("BertForMaskedLM", "num_hidden_layers")])
def test_every_nth_layer_keeps_the_attention_of_its_source(name: str, sizes: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {sizes: 5}
    source = stock_checkpoint(tmp_path / "stock", name, **settings)
    report = convert_softmax(source, tmp_path / "new", keep_every=2)
    kind: Any = CottentionGPTForCausalLM if name.startswith("GPT") else CottentionBertForMaskedLM
    model = kind.from_pretrained(tmp_path / "new")
    assert model.config.layer_types == [LINEAR, FULL, LINEAR, FULL, LINEAR]
    assert len([key for key in report.new if key.endswith("norm_const")]) == 3
    assert "layers 2, 4 of 5 keep the attention of the source" in report.notes
    stored, state = load_file(source / "model.safetensors"), model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in stored.items())
    # Of the same tokens the kept layer makes what the source makes.
    convert_softmax(source, tmp_path / "twin", attention_type="softmax")
    twin = kind.from_pretrained(tmp_path / "twin")
    x = torch.randn(2, 7, 32)
    if name.startswith("GPT"):
        mine, his = (each.transformer.h[1].attn(x)[0] for each in (model, twin))
    else:
        mine, his = (each.bert.encoder.layer[1].attention.self(x, None, None, None) for each in (model, twin))
    assert torch.equal(mine, his)


def test_windows_of_a_source_stay_or_go(tmp_path: Path) -> None:
    layers = {"n_layer": 4, "layer_types": [SLIDING, SLIDING, FULL, SLIDING], "sliding_window": 5}
    source, model = saved_gpt(tmp_path / "source", **layers)
    convert_softmax(source, tmp_path / "same", attention_type="softmax")
    same = CottentionGPTForCausalLM.from_pretrained(tmp_path / "same")
    assert torch.equal(same(TOKENS).logits, model(TOKENS).logits)
    convert_softmax(source, tmp_path / "mixed", keep_every=2)
    config = CottentionGPTForCausalLM.from_pretrained(tmp_path / "mixed").config
    assert (config.layer_types, config.sliding_window) == ([LINEAR, SLIDING, LINEAR, SLIDING], 5)
    convert_softmax(source, tmp_path / "cosine")
    config = CottentionGPTForCausalLM.from_pretrained(tmp_path / "cosine").config
    assert (config.layer_types, config.sliding_window) == ([LINEAR] * 4, None)
    convert_softmax(source, tmp_path / "full", keep_every=3)
    assert CottentionGPTForCausalLM.from_pretrained(tmp_path / "full").config.layer_types == [
        LINEAR,
        LINEAR,
        FULL,
        LINEAR,
    ]


def test_kept_layers_become_windows_of_the_source(tmp_path: Path) -> None:
    source = stock_checkpoint(tmp_path / "stock", "GPTJForCausalLM")
    report = convert_softmax(source, tmp_path / "window", keep_every=2, sliding_window=6)
    assert "layers 2 of 2 keep the attention of the source, within 6 tokens" in report.notes
    convert_softmax(source, tmp_path / "whole", keep_every=2)
    window, whole = (CottentionGPTForCausalLM.from_pretrained(tmp_path / name) for name in ("window", "whole"))
    assert (window.config.layer_types, window.config.sliding_window) == ([LINEAR, SLIDING], 6)
    torch.testing.assert_close(window(TOKENS[:, :6]).logits, whole(TOKENS[:, :6]).logits)
    assert not torch.allclose(window(TOKENS).logits[:, 10:], whole(TOKENS).logits[:, 10:])
    own, _ = saved_gpt(tmp_path / "own", n_layer=2, layer_types=[SLIDING, FULL], sliding_window=5)
    convert_softmax(own, tmp_path / "other", keep_every=2, sliding_window=9)
    assert CottentionGPTForCausalLM.from_pretrained(tmp_path / "other").config.sliding_window == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["GPTJForCausalLM", "BertForMaskedLM"])
def test_an_added_gate_changes_nothing_until_it_is_trained(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = stock_checkpoint(tmp_path / "stock", name, dtype)
    kind: Any = CottentionGPTForCausalLM if name.startswith("GPT") else CottentionBertForMaskedLM
    models = []
    for output_gate in (False, True):
        report = convert_softmax(source, tmp_path / f"{output_gate}", keep_every=2, output_gate=output_gate)
        assert len([key for key in report.new if "gate_proj" in key]) == 4 * output_gate
        models.append(kind.from_pretrained(tmp_path / f"{output_gate}", dtype=dtype))
    tokens = TOKENS % 60
    without, gated = (each(tokens).logits for each in models)
    assert torch.equal(gated, without)
    gated.float().square().mean().backward()
    gradients = {key: each.grad for key, each in models[1].named_parameters() if "gate_proj" in key}
    assert len(gradients) == 4
    assert all(each is not None and each.abs().max() > 0 for each in gradients.values())


def test_a_gate_is_taught_with_its_layer(tmp_path: Path) -> None:
    source, _ = saved_gpt(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.TEXTS) * 60, encoding="utf-8")
    settings = DistillationSettings(text=(str(text),), steps=3, window=16, batch_size=2)
    convert_softmax(source, tmp_path / "new", output_gate=True, distillation=settings, device="cpu")
    stored = load_file(tmp_path / "new" / "model.safetensors")
    assert all(stored[f"transformer.h.{layer}.attn.gate_proj.weight"].abs().max() > 0 for layer in range(2))


def test_options_of_a_bert_of_ours_are_carried_over(tmp_path: Path) -> None:
    options: dict[str, Any] = {"position_embedding_type": "rotary", "rotary_dim": 8, "norm_first": True}
    model = tiny.bert("softmax", torch.float32, **options)
    source = tiny.save(tmp_path / "source", model, tiny.wordpiece_tokenizer())
    report = convert_softmax(source, tmp_path / "same", attention_type="softmax")
    same = CottentionBertForMaskedLM.from_pretrained(tmp_path / "same")
    tokens = TOKENS % 60
    assert torch.equal(same(tokens).logits, model(tokens).logits)
    assert not any("layer_types" in left.name for left in report.left_out)
    convert_softmax(source, tmp_path / "new")
    config = CottentionBertForMaskedLM.from_pretrained(tmp_path / "new").config
    assert {name: getattr(config, name) for name in options} == options


def test_kept_layers_are_not_taught(tmp_path: Path) -> None:
    source, _ = saved_gpt(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.TEXTS) * 60, encoding="utf-8")
    settings = DistillationSettings(text=(str(text),), steps=3, window=16, batch_size=2)
    report = convert_softmax(source, tmp_path / "new", keep_every=2, distillation=settings, device="cpu")
    taught: Any = report.distillation
    errors = taught.after.attention_errors
    assert errors[1] == 0 < errors[0]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "new"))
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert changed == {key for key in before if key.startswith("transformer.h.0.attn.")}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"keep_every": 1}, "keep_every must be at least 2; got 1"),
        ({"keep_every": 3}, "keep_every must be at most the source's number of layers, 2; got 3"),
        (
            {"keep_every": 2, "attention_type": "softmax"},
            "keep_every keeps layers beside cosine ones; got attention_type",
        ),
        ({"sliding_window": 0, "keep_every": 2}, "sliding_window must be at least 1; got 0"),
        ({"sliding_window": 8}, "sliding_window is for the layers of keep_every; got 8 and no keep_every"),
        (
            {"output_gate": True, "attention_type": "softmax"},
            "output_gate is added to a cosine model; got attention_type 'softmax'",
        ),
    ],
)
def test_layers_that_cannot_be_kept_are_one_line(options: dict[str, Any], line: str, tmp_path: Path) -> None:
    source = stock_checkpoint(tmp_path / "stock", "GPTJForCausalLM")
    with pytest.raises(SettingsError, match=f"^{re.escape(line)}"):
        convert_softmax(source, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_what_a_source_cannot_get_is_one_line(tmp_path: Path) -> None:
    bert = stock_checkpoint(tmp_path / "bert", "BertForMaskedLM")
    with pytest.raises(SettingsError, match=r"^sliding_window is for GPT: a BERT's layers have no windows; got 8$"):
        convert_softmax(bert, tmp_path / "new", keep_every=2, sliding_window=8)
    gated, _ = saved_gpt(tmp_path / "gated", output_gate="silu")
    with pytest.raises(SettingsError, match=r"^output_gate cannot be added: .* has one$"):
        convert_softmax(gated, tmp_path / "new", output_gate=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sliding_window": 64}, "sliding_window must be None; got 64"),
        ({"layer_types": [SLIDING, FULL]}, "layer_types must be 'full_attention' for each layer of a gptj model"),
        ({"layer_types": 3}, "layer_types must be 'full_attention' for each layer of a gptj model"),
    ],
)
def test_a_stock_file_that_asks_for_windows_is_refused(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    source = stock_checkpoint(tmp_path / "stock", "GPTJForCausalLM")
    change_json(source / "config.json", **changes)
    with pytest.raises(CheckpointError, match=re.escape(line)):
        convert_softmax(source, tmp_path / "new")


def test_a_hybrid_is_cosine_already(tmp_path: Path) -> None:
    model = tiny.gpt(dtype=torch.float32, layer_types=[LINEAR, FULL])
    source = tiny.save(tmp_path / "source", model, tiny.bpe_tokenizer())
    with pytest.raises(CheckpointError, match="is cosine already"):
        convert_softmax(source, tmp_path / "new")


def test_the_command_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = stock_checkpoint(tmp_path / "stock", "GPTJForCausalLM")
    options = ["--keep-every", "2", "--sliding-window", "7", "--output-gate"]
    assert main(["convert", "softmax", str(source), str(tmp_path / "new"), *options]) == 0
    assert "layers 2 of 2 keep the attention of the source, within 7 tokens" in capsys.readouterr().out
    config = CottentionGPTForCausalLM.from_pretrained(tmp_path / "new").config
    assert (config.sliding_window, config.output_gate) == (7, "sigmoid")
