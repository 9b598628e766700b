"""How every command shows its --help, and how its options may be spelled.

A flag's line ends with one default, if any, and says the values to choose from, but no type of Python; command lines
that can be typed stand at the end. Options are written with - and taken with _ too.

    parser = ArgumentParser(**help_options("embed"))
    parser.parse_args(spelled_as_defined(parser, ["--batch_size", "8"]))
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import jsonargparse

from cottention.cli._examples import EXAMPLES

_EXAMPLES = "examples:\n"


def help_options(command: str, examples: str = "") -> dict[str, Any]:
    """What a parser needs for such a help.

    Args:
        command: the words after `cottention`.
        examples: command lines, one a line; none: those in `EXAMPLES`.
    """
    lines = (line.strip() for line in (examples or EXAMPLES.get(command, "")).strip().splitlines())
    shown = "\n".join(f"  {line}" for line in lines)
    return {"formatter_class": HelpFormatter, "epilog": f"{_EXAMPLES}{shown}" if shown else None}


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """One default, no types, paragraphs and examples as they were written."""

    def __init__(self, prog: str, *args: Any, **options: Any) -> None:
        # jsonargparse puts the options of the commands above into the name, by which all flags are indented.
        super().__init__(prog.replace(" [options]", ""), *args, **options)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action) if action.help is None else action.help
        if isinstance(action, argparse._HelpAction) or getattr(action, "_jsonargparse_preexpanded_help", False):
            return super()._get_help_string(action)
        said = text.lower()
        notes = []
        if action.required and action.option_strings:
            notes.append("required")
        choices = [str(value) for value in _literals(getattr(action, "_typehint", None))]
        if any(choice not in text for choice in choices):
            notes.append(f"one of {', '.join(choices)}")
        shows_default = action.option_strings or action.nargs in (argparse.OPTIONAL, argparse.ZERO_OR_MORE)
        if shows_default and "default" not in said and _is_worth_showing(action.default):
            notes.append("default: %(default)s")
        return text + (f" ({'; '.join(notes)})" if notes else "")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(_EXAMPLES):
            return text
        return "\n\n".join(super(HelpFormatter, self)._fill_text(part, width, indent) for part in text.split("\n\n"))


def spelled_as_defined(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The words with options spelled as the parser, or one below it, defines them: by - where they are given by _.

    Settings of recipes (`--training.max_steps`) are the business of their own parser.
    """
    defined = {option for each in _all_parsers(parser) for option in each._option_string_actions}
    spelled = {option.replace("_", "-"): option for option in defined if "." not in option}
    result = []
    for number, word in enumerate(words):
        if word == "--":
            return result + list(words[number:])
        option, equals, value = word.partition("=")
        if option.startswith("--") and option not in defined:
            option = spelled.get(option.replace("_", "-"), option)
        result.append(f"{option}{equals}{value}")
    return result


def _all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and isinstance(action.choices, Mapping):
            for below in action.choices.values():
                yield from _all_parsers(below)


def _literals(hint: Any) -> list[Any]:
    """The values of a Literal, alone or among others."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for part in get_args(hint) for value in _literals(part)]


def _is_worth_showing(default: Any) -> bool:
    return default is not None and default is not False and default != [] and default != argparse.SUPPRESS
