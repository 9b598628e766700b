"""`cottention quickstart` as a newcomer meets it: short results on stdout, commands that work, mistakes in one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets.config
import pytest

from cottention.cli import main as cli
from cottention.cli import quickstart as command
from cottention.data.corpus import DEFAULT_SPLITS
from cottention.generation import generate_text, load_model_and_tokenizer
from cottention.training import time_budget
from cottention.training.quickstart import QuickstartSettings
from cottention.training.recipe_files import replace_settings
from tests.subprocesses import run_python
from tests.training.helpers import tiny_recipe, write_corpus


@pytest.fixture(scope="module", autouse=True)
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The packaged recipes become tiny, their text invented, and ten steps fit into any time."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "text.txt", num_paragraphs=40)
    length = {"data.sequence_length": 64}

    def recipe(settings: QuickstartSettings) -> Any:
        positions = {} if settings.arch == "gpt" else {"model.max_position_embeddings": 64}
        changes = {"model.attention_type": settings.attention_type, "training.seed": settings.seed}
        return replace_settings(tiny_recipe(settings.arch, corpus), {**positions, **length, **changes})

    def fitted(recipe: Any, _text: Any, *, budget_s: float) -> Any:
        return replace_settings(recipe, {"training.max_steps": 10})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(QuickstartSettings, "recipe", recipe)
        patch.setattr(time_budget, "fit_to_time", fitted)
        yield


@pytest.fixture(scope="module", params=["gpt", "bert"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    run_dir = tmp_path_factory.mktemp(request.param) / "a run"
    assert cli.main(["quickstart", "--arch", request.param, "--output-dir", str(run_dir), "--json"]) == 0
    return request.param, run_dir


def _shown(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert cli.main(["quickstart", *map(str, words)]) == 0
    return capsys.readouterr().out


def _report(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    return json.loads(_shown(capsys, *words, "--json"))


def test_the_figures_are_those_of_the_report(finished: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arch, run_dir = finished
    report = _report(capsys, "--arch", arch, "--output-dir", run_dir)
    shown = _shown(capsys, "--arch", arch, "--output-dir", run_dir)
    assert f"A cosine {arch.upper()} of {report['num_parameters'] / 1e6:.2f} M parameters" in shown
    assert "(10 steps, 0.0 M tokens, " in shown
    rows = [line.split() for line in shown.splitlines()]
    if arch == "gpt":
        for name, label in (("unigram", "counts"), ("bigram", "(Kneser-Ney)"), ("model", "model")):
            figures = report["scores"][name]
            expected = [label, f"{figures['perplexity']:.1f}", f"{figures['nats_per_byte']:.3f}"]
            assert expected in [row[-3:] for row in rows]
    else:
        figures = report["scores"]["model"]
        for kind, score in (("", "hidden_accuracy"), ("baseline_", "baseline_accuracy")):
            expected = [f"{figures[score]:.1%}", f"{figures[kind + 'nats_per_token']:.3f}"]
            assert expected in [row[-2:] for row in rows]
        for example in report["examples"]:
            assert example["text"] in shown
            assert f"{example['candidates'][0]['token']} {example['candidates'][0]['probability']:.0%}" in shown


def test_output_is_short_and_not_wide(finished: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arch, run_dir = finished
    shown = _shown(capsys, "--arch", arch, "--output-dir", run_dir)
    no_story = shown.replace(str(run_dir), "runs/a-run").split("It writes:")[0]
    no_story = re.sub(
        r"\S*/cottention ", "cottention ", no_story
    )  # named with its folder where that is not on the PATH
    assert max(map(len, no_story.splitlines())) < 100
    assert shown.count("\n") < 40


def test_the_years_are_those_of_the_corpus() -> None:
    first, last = DEFAULT_SPLITS["validation"]
    assert f"{first}-{last}" in command._HELD_OUT


def test_every_command_that_it_proposes_is_understood(
    finished: tuple[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, run_dir = finished
    monkeypatch.setattr(command, "_program", lambda: "cottention")
    shown = _shown(capsys, "--arch", arch, "--output-dir", run_dir)
    commands = [shlex.split(line) for line in shown.splitlines() if line.startswith("  cottention ")]
    assert len(commands) >= 3
    for _, name, *words in commands:
        parsed = __import__(cli.COMMANDS[name][0], fromlist=["build_parser"]).build_parser().parse_args(words)
        model = parsed.get("model") or parsed.get("perplexity.model")
        assert model is None or (Path(model) / "config.json").is_file()


def test_the_command_that_uses_the_model_works(
    finished: tuple[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arch, run_dir = finished
    monkeypatch.setattr(command, "_program", lambda: "cottention")
    shown = _shown(capsys, "--arch", arch, "--output-dir", run_dir)
    words = next(shlex.split(line) for line in shown.splitlines() if line.startswith("  cottention "))[1:]
    if arch == "gpt":
        words[words.index("1000")] = "3"
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("The")


def test_text_streams_and_is_that_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = _shown(capsys, "--output-dir", tmp_path)
    model, tokenizer = load_model_and_tokenizer(tmp_path / "model", "causal-lm")
    written = generate_text(model, tokenizer, "My fellow citizens", max_new_tokens=160)
    assert f"It writes:\n\nMy fellow citizens{written.texts[0]}\n\n(" in shown
    assert f"a state of {written.state_bytes:,} bytes that never grows" in shown
    assert _shown(capsys, "--output-dir", tmp_path) == shown


def test_softmax_does_not_boast_of_its_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = _shown(capsys, "--output-dir", tmp_path, "--attention-type", "softmax")
    assert "A softmax GPT" in shown
    assert "never grows" not in shown
    assert "more with every token" in shown


def test_a_finished_run_is_shown_without_torch(finished: tuple[str, Path]) -> None:
    arch, run_dir = finished
    ran = run_python(f"""
        import sys
        from cottention.cli.main import main
        assert main(["quickstart", "--arch", {arch!r}, "--output-dir", {str(run_dir)!r}]) == 0
        assert not {{"torch", "transformers", "datasets"}} & sys.modules.keys()
    """)
    assert "this model" in ran.stdout
    assert "is finished already; --overwrite starts again" in ran.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "minutes must be positive; got 0.0"),
        (["--minutes", "nan"], "minutes: expected float; got 'nan'"),
        (["--minutes", "five"], "minutes: expected float; got 'five'"),
        (["--arch", "t5"], "--arch must be one of gpt, bert; got 't5'"),
        (["--attention-type", "cosin"], "--attention-type must be one of cosine, softmax; got 'cosin'; did you mean"),
        (["--minute", "3"], "unknown option --minute; did you mean '--minutes'?"),
        (["--seed", "1.5"], "seed: expected int; got '1.5'"),
    ],
)
def test_a_wrong_flag_is_one_line_and_code_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quickstart", "--output-dir", str(tmp_path / "run"), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"cottention quickstart: error: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_other_settings_on_a_used_directory_are_one_line_and_code_2(
    finished: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arch, run_dir = finished
    assert cli.main(["quickstart", "--arch", arch, "--output-dir", str(run_dir), "--minutes", "20"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "minutes (5.0 there, 20.0 now); choose another --output-dir, or --overwrite to start again" in err


def test_the_program_is_named_as_the_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "env" / "bin" / "cottention"
    script.parent.mkdir(parents=True)
    script.touch()
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path)
    assert command._program() == f"env{os.sep}bin{os.sep}cottention"
    monkeypatch.chdir(script.parent)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert command._program() == str(script)
    monkeypatch.setenv("PATH", str(script.parent))
    assert command._program() == "cottention"
