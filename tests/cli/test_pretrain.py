"""`cottention pretrain`: settings from defaults, file and flags; what it prints; what a mistake costs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets.config
import pytest

from cottention.cli.main import main
from cottention.training import load_recipe
from cottention.training.recipe_files import recipe_text
from tests.training.helpers import assert_same_run, metrics_of, steps_of, tiny_recipe, write_corpus


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, text.txt, and a small recipe of each architecture that names it by its relative path."""
    folder = tmp_path_factory.mktemp("pretrain")
    write_corpus(folder / "text.txt", num_paragraphs=40)
    for arch in ("gpt", "bert"):
        changes = {"training__max_steps": 4, "training__micro_batch_size": 8, "optimizer__warmup_steps": 1}
        recipe = tiny_recipe(arch, Path("text.txt"), **changes)
        (folder / f"{arch}.yaml").write_text(recipe_text(recipe))
    return folder


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, as the working directory."""
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("arch", ["gpt", "bert"])
def test_a_run_says_where_the_model_is_how_good_and_what_next(
    arch: str, inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", arch, "--config", f"{arch}.yaml", "--output-dir", str(tmp_path / "run")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    last = metrics_of(tmp_path / "run")[-1]
    figures = f"held out: {last['val_loss']:.4f} nats per token, perplexity {last['val_ppl']:.2f}, "
    own = {
        "gpt": "{val_nats_per_byte:.4f} nats per byte",
        "bert": "{val_accuracy:.1%} of the masked tokens right",
    }[arch]
    lines = out.splitlines()
    assert lines[:-1] == [
        f"model: {tmp_path / 'run' / 'model'}",
        figures + own.format(**last),
        f"curve: {tmp_path / 'run' / 'loss_curve.png'}",
    ]
    assert "windows of 32 tokens to train on" in err
    assert "Writing model shards" not in err, "no bar for each file of a checkpoint"
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "run_dir": str(tmp_path / "run"),
        "model_dir": str(tmp_path / "run" / "model"),
        "step": 4,
        "held_out": last,
    }
    assert err == f"{tmp_path / 'run'} is finished already: {tmp_path / 'run' / 'model'}\n"
    proposed = shlex.split(lines[-1].removeprefix("next:  "))
    assert proposed[0] == "cottention"
    assert main(proposed[1:]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("order", ["config first", "config last", "config joined"])
def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(order: str, inside: Path, tmp_path: Path) -> None:
    flags = ["--training.max_steps", "2", "--model.n_layer=1", "--optimizer.betas", "[0.8, 0.9]"]
    flags += ["--data.source", "[text.txt]", "--optimizer.max_grad_norm", "1", "--data.validation", "0.2"]
    config = ["--config=gpt.yaml"] if order == "config joined" else ["--config", "gpt.yaml"]
    words = [*flags, *config] if order == "config last" else [*config, *flags]
    assert main(["pretrain", "gpt", *words, "--output-dir", str(tmp_path / "run")]) == 0
    recipe: Any = load_recipe(tmp_path / "run" / "recipe.yaml")
    changed = {
        "training__max_steps": 2,
        "training__micro_batch_size": 8,
        "optimizer__warmup_steps": 1,
        "model__n_layer": 1,
        "optimizer__betas": (0.8, 0.9),
        "optimizer__max_grad_norm": 1.0,
        "data__validation": 0.2,
    }
    expected = tiny_recipe("gpt", Path("text.txt"), data__source=["text.txt"], **changed)
    assert recipe == expected
    assert recipe.data.text_column == "text", "a default that neither names"


def test_the_resolved_recipe_as_config_gives_the_same_run(inside: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["--config", "gpt.yaml", "--training.seed", "5", "--training.max_steps", "3"]
    assert main(["pretrain", "gpt", *words, "--output-dir", str(first)]) == 0
    assert main(["pretrain", "gpt", "--config", str(first / "recipe.yaml"), "--output-dir", str(second)]) == 0
    assert_same_run(second, first)


def test_a_packaged_recipe_is_taken_by_its_name(inside: Path, tmp_path: Path) -> None:
    small = {"model.vocab_size": 300, "model.n_embd": 48, "model.n_layer": 1, "model.n_head": 2, "model.n_inner": 32}
    small |= {"model.rotary_dim": 8, "data.source": "text.txt", "data.split_by": "paragraph", "data.validation": 0.1}
    small |= {"data.sequence_length": 32, "training.max_steps": 1, "training.global_batch_size": 4}
    small |= {"training.micro_batch_size": 4}
    flags = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    assert main(["pretrain", "gpt", "--config", "quickstart_gpt", *flags, "--output-dir", str(tmp_path / "run")]) == 0
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert recipe == load_recipe("quickstart_gpt", small)


# Mistakes

# A run that got past the settings would end at this source.
SAFE = ["--data.source", "nowhere.txt", "--output-dir", "unused"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say which: gpt, bert"),
        (["gtp"], "arch must be one of gpt, bert; got 'gtp'; did you mean 'gpt'?"),
        (["gpt", "x"], "unexpected argument 'x'"),
        (["gpt", "--config"], "argument --config: expected one argument"),
        (
            ["gpt", "--config", "quickstart_gtp"],
            "no recipe is named 'quickstart_gtp'; did you mean 'quickstart_gpt'?; packaged",
        ),
        (
            ["gpt", "--config", "gtp.yaml"],
            "recipe file 'gtp.yaml' does not exist; packaged recipes: bert_base_cosine, ",
        ),
        (["gpt", "--config", "bert.yaml"], "recipe bert.yaml is for bert, not for gpt: use `cottention pretrain bert`"),
        (
            ["gpt", "--training.max_stpes", "3"],
            "unknown option --training.max_stpes; did you mean '--training.max_steps'?",
        ),
        (["gpt", "--data.mlm_probability", "0.1"], "unknown option --data.mlm_probability"),
        (["gpt", "--training.max_steps", "many"], "training.max_steps: expected int; got 'many'"),
        (["gpt", "--training.max_steps", "2.5"], "training.max_steps: expected int; got '2.5'"),
        (["gpt", "--training.max_steps", "0"], "training.max_steps must be positive; got 0"),
        (["gpt", "--training.precision", "fp8"], "training.precision: expected 'auto' or 'fp32' or 'bf16'; got 'fp8'"),
        (["gpt", "--training.compile", "maybe"], "training.compile: expected bool; got 'maybe'"),
        (["gpt", "--optimizer.learning_rate", ".inf"], "optimizer.learning_rate must be positive; got inf"),
        (
            ["gpt", "--model.attention_type", "linear"],
            "model.attention_type: expected 'cosine' or 'softmax'; got 'linear'",
        ),
        (
            ["gpt", "--training.micro_batch_size", "7"],
            "training.micro_batch_size must divide training.global_batch_size; got 7 and 128",
        ),
        (
            ["bert", "--data.sequence_length", "513"],
            "data.sequence_length must not exceed model.max_position_embeddings; got 513 and 512",
        ),
        (["gpt", "--print_config"], "unknown option --print_config"),
    ],
)
def test_a_wrong_setting_is_one_line(
    words: list[str], message: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", *words[:1], *(SAFE if words[1:] else []), *words[1:]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"cottention pretrain: error: {message}")
    assert err.count("\n") == 1
    assert not (inside / "unused").exists()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (
            "arch: gpt\nmodel: {n_embed: 3}\n",
            "section 'model' of recipe bad.yaml has no key 'n_embed'; did you mean 'n_embd'?",
        ),
        ("arch: gpt\nmodle: {n_embd: 3}\n", "recipe bad.yaml has no key 'modle'; did you mean 'model'?"),
        ("arch: gpt\nmodel: {n_embd: wide}\n", "model.n_embd: expected int; got 'wide'"),
        ("arch: gpt\nmodel: {n_embd: -3}\n", "model.n_embd must be positive; got -3"),
        (
            "arch: gpt\noptimizer: {betas: [0.9]}\n",
            "optimizer.betas: expected a list of values such as [0.9, 0.95]; got '[0.9]'",
        ),
        ("arch: gpt\ntraining: [\n", "recipe bad.yaml is not valid YAML: "),
        ("", "recipe bad.yaml must hold sections of `name: value` lines; got nothing"),
    ],
)
def test_a_wrong_recipe_is_one_line(
    yaml: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(yaml)
    assert main(["pretrain", "gpt", "--config", "bad.yaml", *SAFE]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"cottention pretrain: error: {message}")
    assert err.count("\n") == 1


def test_a_text_that_cannot_be_used_is_one_line_and_does_not_block_the_next_start(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "empty.txt").write_text("  \n\n")
    (tmp_path / "binary.txt").write_bytes(b"text\0\1\2")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "folder").mkdir()
    words = ["pretrain", "gpt", "--config", "gpt.yaml", "--output-dir", str(run_dir)]
    for name, said in [
        ("missing.txt", "no such file or folder: {}"),
        ("empty.txt", "{} holds no text"),
        ("binary.txt", "{} is a binary file, not text: zero byte at offset 4"),
        ("latin.txt", "{} is not UTF-8 text: byte 0xe9 at offset 3; convert it first"),
        ("picture.png", "cannot tell the format of {} from its name"),
        ("folder", "no .txt, .jsonl, .json, .parquet files in the folder {}; it is empty"),
    ]:
        assert main([*words, "--data.source", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"cottention pretrain: error: {said.format(tmp_path / name)}"), err
        assert err.count("\n") == 1
    assert main([*words, "--data.validation", str(tmp_path / "empty.txt")]) == 2
    assert main([*words, "--data.tokenizer", str(tmp_path / "folder")]) == 2
    capsys.readouterr()
    assert not run_dir.exists()
    assert main([*words, "--training.max_steps", "1"]) == 0


def test_a_directory_that_cannot_be_written_is_one_line(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        assert main(["pretrain", "gpt", "--config", "gpt.yaml", "--output-dir", str(output)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"cottention pretrain: error: cannot write to {output}: ")
        assert err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_another_recipe_in_the_directory_is_named(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", "gpt", "--config", "gpt.yaml", "--training.max_steps", "2", "--output-dir", str(tmp_path)]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--model.attention_type", "softmax"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"cottention pretrain: error: {tmp_path} holds a run of another recipe: model.attention_type (cosine there, "
        "softmax now); choose another --output-dir, or --overwrite to start again\n"
    )
    assert main([*words, "--model.attention_type", "softmax", "--overwrite"]) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["attention_type"] == "softmax"


def test_a_loss_that_is_not_finite_is_one_line(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", "gpt.yaml", "--optimizer.learning_rate", "1e38", "--optimizer.warmup_steps", "0"]
    assert main(["pretrain", "gpt", *words, "--output-dir", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("cottention pretrain: error: the ")
    assert "became infinite or NaN at step 2; no checkpoint was written yet; a smaller optimizer.learning_rate" in last


# The real command in real processes


def command(run_dir: Path, *flags: str) -> list[str]:
    """The command's words."""
    words = ["pretrain", "gpt", "--config", "gpt.yaml", "--training.max_steps", "160", "--training.save_every", "7"]
    program = "import sys; from cottention.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", program, *words, "--output-dir", str(run_dir), *flags]


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen) -> None:
    """Wait until a run has logged a step."""
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        path = run_dir / "metrics.jsonl"
        if path.exists() and any(f'"step": {number},' in path.read_text() for number in range(step, 161)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in time, or the process ended ({process.returncode})")


@pytest.mark.slow
def test_a_command_killed_again_and_again_ends_like_one_that_never_was(inside: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, capture_output=True)
    expected = metrics_of(whole)
    fates = [
        (2, signal.SIGKILL),
        (30, signal.SIGKILL),
        (60, signal.SIGTERM),
        (75, signal.SIGKILL),
        (110, signal.SIGINT),
    ]
    for step, number in fates:
        with subprocess.Popen(command(killed, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            wait_for_step(killed, step, process)
            time.sleep(0.013 * (step % 7))  # anywhere in a step, an evaluation or a save
            os.kill(process.pid, number)
            out, err = process.communicate(timeout=120)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), err.decode()
        written = metrics_of(killed) if number != signal.SIGKILL else []
        assert written == expected[: len(written)]
        if number != signal.SIGKILL:
            result = json.loads(out)
            assert result["model_dir"] is None
            assert result["step"] == steps_of(killed)[-1] >= step
            assert f"{number.name}: saving a checkpoint after this step" in err.decode()
            assert "; the same command continues" in err.decode()
    last = subprocess.run(command(killed), check=True, capture_output=True, text=True)
    assert "resuming from " in last.stderr
    assert_same_run(killed, whole)
