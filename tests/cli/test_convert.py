"""cottention convert: a published or stock checkpoint becomes a directory that the other commands open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from cottention.cli.main import main
from tests import tiny
from tests.convert.helpers import RunsCode
from tests.convert.stock import stock_checkpoint
from tests.models.helpers import FIXTURES

BERT, GPT = (FIXTURES / "modules" / name for name in ("bert", "gpt_rot8"))


def run(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> tuple[str, str]:
    assert main([*map(str, words)]) == code
    return capsys.readouterr()


def mistake(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    out, err = run(capsys, "convert", *words, code=2)
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("cottention convert: error: ").rstrip("\n")


def test_the_report_says_what_was_read_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "convert", "official", GPT, tmp_path / "gpt")
    first, *rest = out.splitlines()
    assert first.startswith(f"{tmp_path / 'gpt'}: cosine CottentionGPTForCausalLM, ")
    assert first.endswith(", float32, after 7 updates")
    assert rest[0].split()[:3] == ["read", "config.json,", "pytorch_model.bin,"]
    assert any("left out" in line and "optimizer.pt" in line for line in rest)
    assert err == ""


def test_json_is_the_report_in_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "convert", "official", BERT, tmp_path / "bert", "--json")
    assert json.loads(out) == json.loads((tmp_path / "bert" / "conversion.json").read_text())
    assert json.loads(out)["attention_type"] == "cosine"


def test_what_was_converted_generates_fills_and_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "convert", "official", GPT, tmp_path / "gpt")
    run(capsys, "convert", "official", BERT, tmp_path / "bert")
    flags = ["--prompt", "ab", "--max-new-tokens", 4, "--json"]
    row = json.loads(run(capsys, "generate", "--model", tmp_path / "gpt", *flags)[0])
    assert 0 < row["num_new_tokens"] <= 4
    filled = json.loads(run(capsys, "fill-mask", "--model", tmp_path / "bert", "a [MASK] b", "--json")[0])
    assert len(filled["masks"][0]) == 5
    (tmp_path / "text.txt").write_text("abba")
    flags = ["--model", tmp_path / "gpt", "--data", tmp_path / "text.txt", "--json"]
    assert json.loads(run(capsys, "evaluate", "perplexity", *flags)[0])["perplexity"] > 1


def test_an_existing_model_is_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "convert", "official", GPT, tmp_path / "gpt")
    message = mistake(capsys, "official", GPT, tmp_path / "gpt")
    assert message == f"{tmp_path / 'gpt'} exists already; pass --overwrite (overwrite=True) to replace it"
    run(capsys, "convert", "official", BERT, tmp_path / "gpt", "--overwrite")
    assert json.loads((tmp_path / "gpt" / "config.json").read_text())["model_type"] == "cottention-bert"


def test_pickled_code_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, harm = tmp_path / "published", tmp_path / "harm"
    shutil.copytree(GPT, source)
    torch.save({"x": RunsCode(harm)}, source / "pytorch_model.bin")
    message = mistake(capsys, "official", source, tmp_path / "gpt")
    assert message == (
        f"{source / 'pytorch_model.bin'} contains pickled code (posix.mkdir), which could run anything: refused"
    )
    assert not harm.exists()
    assert not (tmp_path / "gpt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say which: official, softmax"),
        (["offical", "a", "b"], "kind must be one of official, softmax; got 'offical'; did you mean 'official'?"),
        (["official"], "missing source, destination"),
        (["official", "a"], "missing destination"),
        (["official", "a", "b", "--overwrit"], "unknown option --overwrit; did you mean '--overwrite'?"),
        (["official", "nowhere", "NEW"], "no directory nowhere"),
        (
            ["official", "somebody/a-model", "NEW"],
            (
                "no directory somebody/a-model here, and the Hugging Face Hub cannot be reached"
                " (nor is somebody/a-model in its local cache); HF_HUB_OFFLINE is set"
            ),
        ),
        (["official", GPT, "NEW", "--revision", "main"], f"revision 'main' needs a Hub name; {GPT} is a directory"),
        (["official", GPT / "config.json", "NEW"], f"{GPT / 'config.json'} is a file; expected a model directory"),
        (["official", "EMPTY", "NEW"], "EMPTY has no config.json"),
        (["softmax", "EMPTY", "NEW"], "EMPTY has no config.json"),
        (["softmax", "EMPTY"], "missing destination"),
        (["softmax", "EMPTY", "NEW", "--distil-steps", 5], "--distil-steps needs --distil-text"),
        (["softmax", "EMPTY", "NEW", "--held-out-text", "a.txt"], "--held-out-text needs --distil-text"),
        (["softmax", "EMPTY", "NEW", "--end-to-end-steps", 5], "--end-to-end-steps needs --distil-text"),
        (["softmax", "EMPTY", "NEW", "--norm-const", "many"], "norm_const: expected float; got 'many'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[Any], message: str
) -> None:
    places = {"NEW": tmp_path / "new", "EMPTY": tmp_path / "empty"}
    places["EMPTY"].mkdir()
    said = mistake(capsys, *[places.get(word, word) for word in words])
    assert (
        said.replace(str(places["EMPTY"]), "EMPTY").removesuffix(" (nor is somebody/a-model in its local cache)")
        == message
    )
    assert not places["NEW"].exists()


def test_softmax_becomes_cosine_and_is_taught_in_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = stock_checkpoint(tmp_path / "stock", "GPTJForCausalLM")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.TEXTS) * 30)
    flags = ["--norm-const", 0.25, "--distil-text", text, "--distil-steps", 2, "--end-to-end-steps", 1]
    flags += ["--window", 16, "--batch-size", 4, "--seed", 3, "--device", "cpu"]
    out, _ = run(capsys, "convert", "softmax", source, tmp_path / "new", *flags)
    lines = out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'new'}: cosine CottentionGPTForCausalLM, ")
    assert lines[-6].split() == ["on", "held-out", "text", "source", "copied", "distilled"]
    assert [line.split()[0] for line in lines[-5:]] == ["loss", "perplexity", "attention", "last", "embedding"]

    report = json.loads((tmp_path / "new" / "conversion.json").read_text())
    assert report["distillation"]["source"]["loss"] == pytest.approx(float(lines[-5].split()[-3]), abs=1e-3)
    assert report["distillation"]["after"]["perplexity"] > 1
    assert (report["distillation"]["window"], report["distillation"]["seed"]) == (16, 3)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["norm_const_init"] == 0.25
    flags = ["--prompt", "ab", "--max-new-tokens", 4, "--json"]
    assert json.loads(run(capsys, "generate", "--model", tmp_path / "new", *flags)[0])["num_new_tokens"] > 0


def test_softmax_kept_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = stock_checkpoint(tmp_path / "stock", "BertForMaskedLM")
    out, _ = run(capsys, "convert", "softmax", source, tmp_path / "new", "--attention-type", "softmax", "--json")
    assert json.loads(out) == json.loads((tmp_path / "new" / "conversion.json").read_text())
    assert (json.loads(out)["attention_type"], json.loads(out)["distillation"]) == ("softmax", None)
    filled = json.loads(run(capsys, "fill-mask", "--model", tmp_path / "new", "a [MASK] b", "--json")[0])
    assert len(filled["masks"][0]) == 5


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    # The weights are on disk by then, the tokenizer is not.
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", interrupted)
    out, err = run(capsys, "convert", "official", GPT, tmp_path / "gpt", code=130)
    assert (out, err) == ("", "cottention convert: error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_one_of_ours_is_not_converted_again(gpt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = mistake(capsys, "official", gpt_dir, tmp_path / "new")
    assert message.endswith("model_type must be bert or gptj; got 'cottention-gpt' (it is one of ours already)")
