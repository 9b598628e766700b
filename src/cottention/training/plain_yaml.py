"""YAML as settings need it: names, values, lists; a small file says no more than it holds.

Aliases (`*name`) let three hundred bytes stand for a thousand million values, tags (`!!name`) make objects of values;
neither has a use in settings, and both are refused, as are names given twice, deep nesting, numbers and words of
any length. What is wrong is said in one line, with the line in the file.

    content = read_yaml(Path("recipe.yaml"), "recipe recipe.yaml")
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import yaml

from cottention.errors import SettingsError

_MOST_BYTES = 1 << 18  # a recipe has two thousand; the parser, in Python, reads some 100,000 a second
_LONGEST_WORD = 4096  # characters; as long as a path may be
_LONGEST_NUMBER = 100  # digits
_DEEPEST = 8  # a recipe has sections, settings and lists of names: three

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 60
_shown.maxlong = 40


def read_yaml(path: Path, what: str) -> Any:
    """Read settings from a file.

    Args:
        path: the file.
        what: what it is called in a message.

    Raises:
        SettingsError: it is no YAML of plain names and values, or too large.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{what} cannot be read: {error.strerror}") from error
    if len(content) > _MOST_BYTES:
        raise SettingsError(f"{what} is larger than {_MOST_BYTES >> 10} KiB, which no settings are")
    try:
        return yaml.load(content.decode("utf-8-sig"), Loader=_PlainLoader)  # noqa: S506  # a SafeLoader
    except UnicodeDecodeError as error:
        raise SettingsError(f"{what} is not valid YAML: byte 0x{content[error.start]:02x} is not UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark is not None else ""
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise SettingsError(f"{what} is not valid YAML: {line}{' '.join(problem.split())}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from error


def shown(value: object) -> str:
    """A value in a message, shortened where it is long."""
    return _shown.repr(value)


class _PlainLoader(yaml.SafeLoader):
    """Numbers, words, true and false, null, lists and names; a date is a word."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # as it is called there
        # The scanner reads to the end of nested brackets, in a time that grows with their square, before it gives any.
        if self.flow_level == _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {_DEEPEST}", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refused(f"aliases are not taken; got *{event.anchor[:40]}", event)
        if getattr(event, "tag", None) is not None:
            raise _refused(f"tags are not taken; got {str(event.tag)[:40]}", event)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _LONGEST_WORD:
            raise _refused(f"a value of {len(event.value)} characters; at most {_LONGEST_WORD}", event)
        if self.depth == _DEEPEST:
            raise _refused(f"nested deeper than {_DEEPEST}", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        given: set[str] = set()
        for key, _ in node.value:
            name = self.construct_object(key) if isinstance(key, yaml.ScalarNode) else None
            if not isinstance(name, str):
                raise _refused(f"a name must be a word; got {shown(name)}", key)
            if name in given:
                raise _refused(f"{name!r} is given twice", key)
            given.add(name)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > _LONGEST_NUMBER:
            raise _refused(f"a number of {len(node.value)} digits; at most {_LONGEST_NUMBER}", node)
        return super().construct_yaml_int(node)


def _refused(problem: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
