"""What a command writes is looked at before its work, has one writer, and is compared by doctor."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cottention.cli.main import main
from cottention.locks import sole_writer
from tests import tiny
from tests.damage import HARMS
from tests.forks import start_fork


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt")
    tiny.gpt().save_pretrained(folder)
    tiny.bpe_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text" / "a.txt"
    path.parent.mkdir()
    path.write_text("One sentence is here. Another one follows it. And then a third.\n" * 20)
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command ends with."""
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    return err.partition(": error: ")[2].rstrip("\n")


def no_model_is_opened(patch: pytest.MonkeyPatch) -> None:
    import cottention.generation

    def opened(*_args: object, **_options: object) -> None:
        raise AssertionError("work was done before the output was looked at")

    patch.setattr(cottention.generation, "load_model_and_tokenizer", opened)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("no/folder/x.npy", "No such file or directory"),
        ("text/a.txt/x.npy", "Not a directory"),
        ("folder.npy", "Is a directory"),
        ("x" * 300 + ".npy", "File name too long"),
    ],
)
def test_outputs_that_cannot_be_written_are_told_before_the_work(
    where: str, reason: str, text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    no_model_is_opened(monkeypatch)
    (tmp_path / "folder.npy").mkdir()
    path = tmp_path / where
    said = refused(capsys, "embed", "--model", "m", text, "--output", path)
    assert said == f"--output: cannot write {path}: {reason}"
    said = refused(capsys, "generate", "--model", "m", "--prompt-file", text, "--save-state", path)
    assert said == f"--save-state: cannot write {path}: {reason}"
    said = refused(capsys, "evaluate", "glue", "--runs", "r", "--markdown", path)
    assert said == f"--markdown: cannot write {path}: {reason}"


@pytest.mark.parametrize(
    "words",
    [
        ["data", "build", "gpt", "{text}", "--output-dir", "{full}"],
        ["data", "build", "bert", "{text}", "--output-dir", "{full}"],
        ["data", "tokenize", "gpt", "{text}", "--tokenizer", "{gpt}", "--output-dir", "{full}"],
        ["bench", "attention", "--output-dir", "{full}"],
        ["bench", "decode", "--output-dir", "{full}"],
        ["bench", "model", "--output-dir", "{full}"],
        ["bench", "figures", "--output-dir", "{full}"],
        ["evaluate", "glue", "--model", "m", "--task", "cola", "--submission", "{full}"],
        ["pretrain", "gpt", "--config", "quickstart_gpt", "--output-dir", "{full}"],
        ["quickstart", "--minutes", "0.1", "--output-dir", "{full}"],
        ["convert", "official", "{gpt}", "{full}", "--overwrite"],
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_folders_of_other_things_are_left_alone(
    words: list[str], text: Path, gpt: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    no_model_is_opened(monkeypatch)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    said = refused(capsys, *(word.format(text=text, gpt=gpt, full=full) for word in words))
    assert str(full) in said
    assert {path.name: path.read_text() for path in full.iterdir()} == {"thesis.tex": "mine"}
    if words[0] == "pretrain":  # which may be begun inside a lock of its own thread
        return
    with sole_writer(full, beside=words[0] == "convert"):
        said = refused(capsys, *(word.format(text=text, gpt=gpt, full=full) for word in words))
    assert f"{full} is being written by process {os.getpid()} on host " in said


@pytest.mark.parametrize(
    "words",
    [
        ["data", "build", "gpt", "{text}/none.txt", "--output-dir", "{new}"],
        ["data", "tokenize", "gpt", "{text}", "--tokenizer", "/none", "--output-dir", "{new}"],
        ["bench", "attention", "--lengths", "x", "--output-dir", "{new}"],
        ["pretrain", "gpt", "--config", "quickstart_gpt", "--data.source", "/none.txt", "--output-dir", "{new}"],
        ["finetune", "--model", "/none", "--task", "cola", "--data", "/none", "--output-dir", "{new}"],
        ["convert", "official", "/none", "{new}"],
        ["evaluate", "glue", "--model", "/none", "--task", "cola", "--submission", "{new}"],
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_a_mistake_leaves_no_directory(words: list[str], text: Path, tmp_path: Path, capsys: Any) -> None:
    refused(capsys, *(word.format(text=text, new=tmp_path / "new" / "deep") for word in words))
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_missing_text_is_told_before_torch_is_imported() -> None:
    program = (
        "import sys; from cottention.cli.main import main\n"
        "assert main(['pretrain', 'gpt', '--config', 'quickstart_gpt', '--data.source', '/none.txt']) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "no such file or folder: /none.txt" in ran.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_build_that_is_asked_to_end_tidies_up_and_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    source, corpus = tmp_path / "a.txt", tmp_path / "corpus"
    source.write_text("One sentence is here. Another one follows it.\n\n" * 60_000)
    command = ["data", "build", "gpt", str(source), "--output-dir", str(corpus)]
    command += ["--split-by", "paragraph", "--shard-size-mb", "1"]
    with start_fork("-m", "cottention", *command) as process:
        while not (corpus / "progress.json").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert f"stopped by {number.name}" in err
    assert not list(corpus.glob("*.partial"))
    assert not (corpus / ".lock").exists()
    assert main(command) == 0
    assert not (corpus / "progress.json").exists()


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_model_is_refused_and_doctor_names_it(harm: Any, gpt: Path, tmp_path: Path, capsys: Any) -> None:
    model = Path(shutil.copytree(gpt, tmp_path / "model"))
    assert main(["doctor", "--model", str(model)]) == 0
    assert capsys.readouterr().out == f"{model}: as it was written\n\nNothing is damaged.\n"
    for seed in range(8):
        shutil.copy(gpt / "model.safetensors", model)
        with (model / "model.safetensors").open("r+b") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        content = (model / "model.safetensors").read_bytes()
        (tmp_path / "weights").write_bytes(content[header:])
        harm(tmp_path / "weights", random.Random(seed))  # behind the header, which the reader looks at itself
        (model / "model.safetensors").write_bytes(content[:header] + (tmp_path / "weights").read_bytes())
        said = refused(capsys, "generate", "--model", model, "--prompt", "a", "--max-new-tokens", 1)
        assert said.startswith(f"{model}/model.safetensors was changed after it was written")
    assert main(["doctor", "--json", "--model", str(model)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [f"{model}: model.safetensors was changed after it was written"]


def test_a_model_that_is_saved_again_opens(gpt: Path, tmp_path: Path, capsys: Any) -> None:
    from cottention.models import CottentionGPTForCausalLM

    model = Path(shutil.copytree(gpt, tmp_path / "model"))
    loaded = CottentionGPTForCausalLM.from_pretrained(model)
    for parameter in loaded.parameters():
        parameter.data.mul_(0.5)
    loaded.save_pretrained(model)
    assert main(["doctor", "--model", str(model)]) == 0
    loaded.config.save_pretrained(model)  # takes the seal away
    assert main(["doctor", "--model", str(model)]) == 0
    assert "written without hashes" in capsys.readouterr().out
    assert main(["generate", "--model", str(model), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    (model / "model.safetensors").unlink()
    assert main(["doctor", "--model", str(model)]) == 1
    capsys.readouterr()
    assert refused(capsys, "doctor", "--model", tmp_path / "none") == f"no directory {tmp_path / 'none'}"


def test_doctor_reads_a_corpus(text: Path, tmp_path: Path, capsys: Any) -> None:
    corpus = tmp_path / "corpus"
    assert main(["data", "build", "gpt", str(text), "--output-dir", str(corpus)]) == 0
    capsys.readouterr()
    assert main(["doctor", "--model", str(corpus)]) == 0
    (shard,) = corpus.glob("*.arrow")
    HARMS[0](shard, random.Random(0))
    assert main(["doctor", "--model", str(corpus)]) == 1
    assert f"problem: {shard} is damaged: it was changed after it was written" in capsys.readouterr().out
