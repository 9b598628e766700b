"""Turns what jsonargparse says about a wrong flag or YAML key into one short line.

Its messages tell Python's types over several lines and never suggest a name. Known patterns are reworded as the rest of
the package words them (the name, what was expected, what came); anything else is only joined into one line.

    explain("unrecognized arguments: --stpes 3", ["--steps"])  # "unknown option --stpes; did you mean '--steps'?"
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from cottention.errors import did_you_mean
from cottention.files import one_line

_UNKNOWN_ARGUMENTS = re.compile(r"unrecognized arguments: (?P<rest>.*)", re.DOTALL)
_UNKNOWN_KEY = re.compile(r"(?:Group '(?P<group>[^']+)' does not accept option|Option) '(?P<key>[^']+)'")
_WRONG_CHOICE = re.compile(
    r"argument (?P<name>\S+): invalid choice: '?(?P<value>.*?)'? \(choose from (?P<choices>.*)\)", re.DOTALL
)
# What jsonargparse adds to every parser and does not speak of as we do.
_NOT_OURS = re.compile(r"--print_(?:shtab|completion|config)\b")
_MISSING = re.compile(r"the following arguments are required: (?P<names>.*)", re.DOTALL)
_NO_SUBCOMMAND = re.compile(r'expected ".*" to be one of \{(?P<choices>[^}]*)\}, but it was not provided')
_BAD_YAML = re.compile(r'(?P<problem>[^\n]+)\n\s+in "<unicode string>", (?P<place>line \d+, column \d+)\s*$')
_NOT_A_MAPPING = re.compile(r"Unexpected config: (?P<value>.*)", re.DOTALL)
_WRONG_VALUE = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<reason>.*)', re.DOTALL)
_EXPECTED = re.compile(r"Expected an? (?P<type>.+?)(?=\. Got value: |\n|$)")
_GOT = re.compile(r"(?:Got value|Given value): (?P<value>.*)", re.DOTALL)


def explain(message: str, names: Iterable[str]) -> str:
    """Reword a parser's message as one line.

    Args:
        message: what jsonargparse or argparse said.
        names: every option string and key the parser knows, for the suggestion.

    Returns:
        One line, without the program's name.
    """
    known = list(names)
    for pattern, reword in _REWORDINGS:
        found = pattern.search(message)
        if found:
            return one_line(reword(found, known))
    return one_line(message)


def _unknown_arguments(found: re.Match[str], known: list[str]) -> str:
    # argparse lists the values of unknown options too; the first option is what was mistyped.
    words = found["rest"].split()
    for word in words:
        if word.startswith("-"):
            option = word.split("=")[0]
            known = [name for name in known if not _NOT_OURS.match(name)]
            return f"unknown option {option}{did_you_mean(option, [name for name in known if name.startswith('-')])}"
    return f"unexpected argument {words[0] if words else ''!r}"  # an empty one leaves nothing to split


def _unknown_key(found: re.Match[str], known: list[str]) -> str:
    key = f"{found['group']}.{found['key']}" if found["group"] else found["key"]
    return f"unknown key {key!r}{did_you_mean(key, [name for name in known if not name.startswith('-')])}"


def _wrong_choice(found: re.Match[str], _known: list[str]) -> str:
    choices = [choice.strip(" '") for choice in found["choices"].split(",")]
    name, value = found["name"], found["value"]
    return f"{name} must be one of {', '.join(choices)}; got {value!r}{did_you_mean(value, choices)}"


def _missing(found: re.Match[str], known: list[str]) -> str:
    # "official.src" is the src of the subcommand official, which is how nobody writes it; an option is told by its --.
    names = [name.strip().rpartition(".")[2] for name in found["names"].split(",")]
    options = [f"--{name.replace('_', '-')}" for name in names]
    shown = [option if option in known else name for name, option in zip(names, options, strict=True)]
    return f"missing {', '.join(shown)}"


def _no_subcommand(found: re.Match[str], _known: list[str]) -> str:
    return f"say which: {', '.join(found['choices'].split(','))}"


def _bad_yaml(found: re.Match[str], _known: list[str]) -> str:
    return f"the configuration is not valid YAML: {found['problem'].strip()} ({found['place']})"


def _not_a_mapping(found: re.Match[str], _known: list[str]) -> str:
    return f"a configuration must hold `name: value` lines; got {one_line(found['value'])!r}"


def _wrong_value(found: re.Match[str], _known: list[str]) -> str:
    expected = [_type_name(each) for each in _EXPECTED.findall(found["reason"])]
    got = _GOT.search(found["reason"])
    if expected and got:
        return f"{found['key']}: expected {' or '.join(expected)}; got {one_line(got['value'])!r}"
    return f"{found['key']}: {re.sub(r'^Not of type [^:]+: ', '', found['reason'])}"


def _type_name(shown: str) -> str:
    """<class 'int'> is int, typing.Literal['a', 'b'] is 'a' or 'b'."""
    if shown == "<class 'NoneType'>":
        return "null"
    literal = re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", shown)
    if literal:
        return literal[1].replace(", ", " or ")
    if shown.startswith(("<class 'tuple'>", "tuple")):
        return "a list of values such as [0.9, 0.95]"
    class_ = re.fullmatch(r"<class '(?:.*\.)?([^'.]+)'>", shown)
    return class_[1] if class_ else shown.replace("typing.", "")


def _not_ours(found: re.Match[str], _known: list[str]) -> str:
    return f"unknown option {found[0]}"


_REWORDINGS = (
    (_UNKNOWN_ARGUMENTS, _unknown_arguments),
    (_NOT_OURS, _not_ours),
    (_UNKNOWN_KEY, _unknown_key),
    (_WRONG_CHOICE, _wrong_choice),
    (_MISSING, _missing),
    (_NO_SUBCOMMAND, _no_subcommand),
    (_BAD_YAML, _bad_yaml),
    (_NOT_A_MAPPING, _not_a_mapping),
    (_WRONG_VALUE, _wrong_value),
)
