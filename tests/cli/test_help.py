"""Every --help: one default a flag, no types of Python, examples that parse; options by - or _ in every command."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from cottention.cli._help import spelled_as_defined
from cottention.cli.main import COMMANDS, main
from cottention.training.recipe_files import load_recipe, recipe_text


def parsers(command: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser of a command and those below it, with the words that lead there."""

    def walk(words: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        yield words, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, below in action.choices.items():
                    yield from walk(f"{words} {name}", below)

    return walk(command, import_module(COMMANDS[command][0]).build_parser())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_one_default_a_flag_no_types_and_examples_at_its_end(command: str) -> None:
    for words, parser in parsers(command):
        text = parser.format_help()
        assert text.startswith(f"usage: cottention {words} "), words  # not those above it and their options
        head, _, examples = text.partition("\nexamples:\n")
        assert f"cottention {command}" in examples, words
        assert not re.findall(r"\btype: |Literal\[|Optional\[|Union\[| \| null", head), words
        assert "default: null" not in head
        assert "default: False" not in head
        flags = re.split(r"\n  (?=\S)", head)
        assert not [flag for flag in flags if len(re.findall(r"\(default[:; ]|; default: ", flag)) > 1], words


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_what_the_command_takes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    for words, parser in parsers(command):
        lines = [line.strip() for line in (parser.epilog or "").splitlines()[1:]]
        assert lines, words
        for line in lines:
            typed = shlex.split(line)
            if typed[0] != "cottention":
                continue  # the output of one command for another
            if ">" in typed:
                typed = typed[: typed.index(">")]
            _, name, *rest = typed
            if "runs/mine/recipe.yaml" in rest:
                Path("runs/mine/recipe.yaml").write_text(recipe_text(load_recipe(f"quickstart_{rest[0]}")))
            own = import_module(COMMANDS[name][0]).build_parser()
            own.parse_args(spelled_as_defined(own, rest))


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_taken_by_underscores_too(command: str) -> None:
    for words, parser in parsers(command):
        for option in parser._option_string_actions:
            if "." in option or "-" not in option.strip("-") or option.startswith("--print"):
                continue
            root = import_module(COMMANDS[command][0]).build_parser()
            typed = "--" + option[2:].replace("-", "_")
            assert spelled_as_defined(root, [typed, "x", f"{typed}=a_b"]) == [option, "x", f"{option}=a_b"], words
    assert spelled_as_defined(argparse.ArgumentParser(), ["--no_such", "--", "--a_b"]) == ["--no_such", "--", "--a_b"]


def test_an_option_by_underscores_reaches_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "nowhere", "--prompt", "a", "--max_new_tokens", "-5"]) == 2
    assert capsys.readouterr().err == "cottention generate: error: max_new_tokens must be at least 1; got -5\n"


def test_a_choice_stays_visible_without_its_type() -> None:
    shown = dict(parsers("pretrain"))["pretrain gpt"].format_help()
    assert "{key,query,none}" in shown or "one of key, query, none" in shown
