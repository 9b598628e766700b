"""The frame of the command line: what it finds, what it says on a mistake, and that it says it at once."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

import cottention
from cottention.cli import main as cli
from cottention.cli._messages import explain
from cottention.errors import CheckpointError
from tests.subprocesses import run_python


@dataclass(frozen=True, kw_only=True)
class _ModelSettings:
    """A model."""

    hidden_size: int = 8
    attention_type: Literal["cosine", "softmax"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """A recipe."""

    model: _ModelSettings = field(default_factory=_ModelSettings)
    steps: int | None = None


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A command `try` whose run() a test replaces; it has a recipe, a choice, and one required word."""
    module = ModuleType("cottention.cli.try")

    def build_parser():
        parser = cli.new_parser("try", "Try something.")
        parser.add_argument("--config", action="config")
        parser.add_class_arguments(_Settings)
        parser.add_argument("--mode", choices=["fast", "exact"])
        parser.add_argument("source", type=str)
        return parser

    module.build_parser = build_parser  # pyright: ignore[reportAttributeAccessIssue]
    module.run = lambda args: None  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "cottention.cli.try", module)
    monkeypatch.setitem(cli.COMMANDS, "try", ("cottention.cli.try", "try something"))
    return module


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_overview_lists_every_command(words, capsys):
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name, (_, help_line) in cli.COMMANDS.items():
        assert f"  {name} " in out
        assert help_line in out
    assert max(map(len, out.splitlines())) <= 100


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cottention {cottention.__version__}\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("quikstart", "unknown command 'quikstart'; did you mean 'quickstart'? (see `cottention --help`)"),
        ("fill_mask", "unknown command 'fill_mask'; did you mean 'fill-mask'? (see `cottention --help`)"),
        ("zzz", "unknown command 'zzz' (see `cottention --help`)"),
        ("--versoin", "unknown option '--versoin'; did you mean '--version'? (see `cottention --help`)"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_closest_name(word, message, capsys):
    assert cli.main([word]) == 2
    assert capsys.readouterr() == ("", f"cottention: error: {message}\n")


def test_a_command_gets_its_flags_and_gives_its_exit_code(command, capsys):
    seen = []
    command.run = lambda args: seen.append(args) or 7
    assert cli.main(["try", "here", "--model.hidden_size", "16"]) == 7
    assert (seen[0].source, seen[0].model.hidden_size, seen[0].steps) == ("here", 16, None)
    command.run = lambda args: None
    assert cli.main(["try", "here"]) == 0
    assert capsys.readouterr().err == ""


def test_flags_win_over_yaml_and_yaml_over_defaults(command, tmp_path: Path):
    seen = []
    command.run = lambda args: seen.append(args)
    (tmp_path / "recipe.yaml").write_text("model:\n  hidden_size: 32\n  attention_type: softmax\nsteps: 5\n")
    assert cli.main(["try", "--config", str(tmp_path / "recipe.yaml"), "--model.hidden_size=64", "here"]) == 0
    assert (seen[0].model.hidden_size, seen[0].model.attention_type, seen[0].steps) == (64, "softmax", 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--stpes", "3"], "unknown option --stpes; did you mean '--steps'?"),
        (["x", "--stpes=3"], "unknown option --stpes; did you mean '--steps'?"),
        (["x", "--model.hidden-size", "3"], "unknown option --model.hidden-size; did you mean '--model.hidden_size'?"),
        (["x", "--qqq"], "unknown option --qqq"),
        (["x", "y"], "unexpected argument 'y'"),
        (["x", "--mod", "fast"], "unknown option --mod; did you mean '--mode'?"),
        ([], "missing source"),
        (["x", "--steps"], "argument --steps: expected one argument"),
        (["x", "--steps", "many"], "steps: expected int or null; got 'many'"),
        (["x", "--model.hidden_size", "1.5"], "model.hidden_size: expected int; got '1.5'"),
        (
            ["x", "--model.attention_type", "linear"],
            "model.attention_type: expected 'cosine' or 'softmax'; got 'linear'",
        ),
        (["x", "--mode", "fsat"], "--mode must be one of fast, exact; got 'fsat'; did you mean 'fast'?"),
        (["x", "--config", "/nowhere.yaml"], "config: File does not exist: '/nowhere.yaml'"),
    ],
)
def test_a_wrong_flag_is_one_line(command, words, message, capsys):
    assert cli.main(["try", *words]) == 2
    assert capsys.readouterr() == ("", f"cottention try: error: {message}\n")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("stepz: 3\n", "unknown key 'stepz'; did you mean 'steps'?"),
        ("model:\n  hiden_size: 3\n", "unknown key 'model.hiden_size'; did you mean 'model.hidden_size'?"),
        ("model:\n  hidden_size: wide\n", "model.hidden_size: expected int; got 'wide'"),
        ("steps: [1\n", "the configuration is not valid YAML: did not find expected ',' or ']' (line 2, column 1)"),
        ("- steps\n", "a configuration must hold `name: value` lines; got '- steps'"),
    ],
)
def test_a_wrong_recipe_is_one_line(command, yaml, message, tmp_path: Path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml)
    assert cli.main(["try", "--config", str(tmp_path / "recipe.yaml"), "x"]) == 2
    assert capsys.readouterr() == ("", f"cottention try: error: {message}\n")


def test_a_wrong_subcommand_is_one_line(monkeypatch, capsys):
    module = ModuleType("cottention.cli.pair")

    def build_parser():
        parser = cli.new_parser("pair", "Two things.")
        subcommands = parser.add_subcommands(dest="which")
        for name in ("left", "right"):
            subparser = cli.new_parser(f"pair {name}", "One thing.")
            subparser.add_argument("source", type=str)
            subparser.add_argument("--strict", type=bool, default=True)
            subcommands.add_subcommand(name, subparser, help="one thing")
        return parser

    module.build_parser = build_parser  # pyright: ignore[reportAttributeAccessIssue]
    module.run = lambda args: None  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "cottention.cli.pair", module)
    monkeypatch.setitem(cli.COMMANDS, "pair", ("cottention.cli.pair", "two things"))
    for words, message in [
        ([], "say which: left, right"),
        (["rigth"], "which must be one of left, right; got 'rigth'; did you mean 'right'?"),
        (["left"], "missing source"),
        (["left", "x", "--strikt", "no"], "unknown option --strikt; did you mean '--strict'?"),
        (["left", "x", "--strict", "maybe"], "strict: expected bool; got 'maybe'"),
    ]:
        assert cli.main(["pair", *words]) == 2
        assert capsys.readouterr().err == f"cottention pair: error: {message}\n"


def test_an_unforeseen_message_still_becomes_one_line():
    assert explain("something\n  nobody\n\nexpected", ["--steps"]) == "something nobody expected"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CheckpointError("not a model:\n  /x"), 2, "error: not a model: /x"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: a.txt: No such file or directory"),
        (PermissionError(13, "Permission denied", b"a.txt"), 2, "error: a.txt: Permission denied"),
        (IsADirectoryError(21, "Is a directory", Path("a")), 2, "error: a: Is a directory"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_a_users_mistake_is_one_line(command, error, code, message, capsys):
    def fail(args):
        raise error

    command.run = fail
    assert cli.main(["try", "x"]) == code
    assert capsys.readouterr() == ("", f"cottention try: {message}\n")


@pytest.mark.parametrize("error", [ValueError("inner"), RuntimeError("inner"), FileNotFoundError("inner")])
def test_a_bug_keeps_its_traceback(command, error):
    def fail(args):
        raise error

    command.run = fail
    with pytest.raises(type(error), match="inner"):
        cli.main(["try", "x"])


def test_help_of_a_command_comes_back_with_0(command, capsys):
    assert cli.main(["try", "--help"]) == 0
    assert "usage: cottention try" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["doctor", "--help"]])
def test_a_closed_pipe_ends_quietly(words):
    read_end, write_end = os.pipe()
    os.close(read_end)
    ran = subprocess.run(
        [sys.executable, "-c", "from cottention.cli.main import entry_point; entry_point()", *words],
        stdout=write_end,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write_end)
    # argparse swallows the error while it prints a help text, so that ends with 0.
    assert (ran.returncode, ran.stderr) == (0 if len(words) > 1 else 141, b"")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_loads_no_heavy_library(name):
    ran = run_python(f"""
        from collections.abc import Mapping
        from importlib import import_module
        from cottention.cli.main import COMMANDS, main

        def walk(parser):
            for action in parser._actions:
                if isinstance(action.choices, Mapping):
                    for subparser in action.choices.values():
                        print(subparser.format_help())
                        walk(subparser)

        assert main([{name!r}, "--help"]) == 0
        walk(import_module(COMMANDS[{name!r}][0]).build_parser())
        heavy = {{"torch", "transformers", "datasets", "numpy", "matplotlib", "tokenizers"}} & set(sys.modules)
        assert not heavy, heavy
    """)
    assert ran.stdout.startswith(f"usage: cottention {name}")
    assert ran.stderr == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_takes_less_than_half_a_second(name):
    # Of processor time: how long it takes by the clock depends on what else the machine does.
    code = f"""
        import time
        from cottention.cli.main import main
        assert main([{name!r}, "--help"]) == 0
        print(time.process_time())
    """
    assert min(float(run_python(code).stdout.splitlines()[-1]) for _ in range(2)) < 0.5


def test_the_installed_script_answers():
    script = Path(sys.executable).with_name("cottention")
    if not script.exists():
        pytest.skip("cottention is not installed as a script beside this python")
    ran = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, f"cottention {cottention.__version__}\n")
