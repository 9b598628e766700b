"""What mkdocs makes from the code while it builds: the page of commands and the reference of public names.

A page holds a marker, `<!-- commands -->` or `<!-- public names -->`; what stands there comes from the parsers and from
`__all__`, so neither page can be behind the code. The notebooks of examples/ travel with the site.
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from cottention.cli.main import COMMANDS

PACKAGES = (
    ("The operation", "cottention.ops"),
    ("Layers", "cottention.layers"),
    ("Models", "cottention.models"),
    ("Several devices", "cottention.distributed"),
    ("Other people's models", "cottention.integrations"),
    ("Converting", "cottention.convert"),
    ("Data", "cottention.data"),
    ("Training", "cottention.training"),
    ("Generation", "cottention.generation"),
)
"""Heading and package of each part of the reference."""

_NOTEBOOKS = "examples/notebooks"
_HELP_COLUMNS = "104"  # what a page shows without scrolling


def on_files(files: Any, config: Any, **_: Any) -> None:
    """Add the notebooks, which lie outside of docs/."""
    from mkdocs.structure.files import File

    for path in sorted((Path(__file__).parents[1] / _NOTEBOOKS).glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.name}", abs_src_path=str(path)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the markers of a page, and lead its links to notebooks to where they are; mkdocs calls this for each."""
    markdown = markdown.replace(f"](../{_NOTEBOOKS}/", "](notebooks/")
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", commands())
    if "<!-- public names -->" in markdown:
        markdown = markdown.replace("<!-- public names -->", public_names())
    return markdown


def public_names() -> str:
    """A heading for each package, below it the directive that documents each name of its `__all__`."""
    parts = []
    for heading, package in PACKAGES:
        names = sorted(import_module(package).__all__)
        parts += [f"## {heading}", f"`from {package} import ...`"]
        parts += [f"::: {package}.{name}\n    options:\n      heading_level: 3" for name in names]
    return "\n\n".join(parts)


def commands() -> str:
    """The `--help` of every command, and of each command below it, as a terminal of 104 columns shows it."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _HELP_COLUMNS
    try:
        return "\n\n".join(section for name in COMMANDS for section in _sections(name))
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns


def _sections(command: str) -> list[str]:
    module, line = COMMANDS[command]
    parser = import_module(module).build_parser()
    found = [f"## {command}\n\n{line[0].upper()}{line[1:]}.\n\n{_help(parser)}"]
    for name, below in _subcommands(parser):
        found.append(f"### {command} {name}\n\n{_help(below)}")
    return found


def _help(parser: argparse.ArgumentParser) -> str:
    return f"```text\n{parser.format_help().strip()}\n```"


def _subcommands(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [item for action in actions for item in action.choices.items()]


def pages() -> list[Path]:
    """Every page of the site, in the order of its navigation."""
    docs = Path(__file__).parent

    def walk(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [x for each in (entry.values() if isinstance(entry, dict) else entry) for x in walk(each)]

    with (docs.parent / "mkdocs.yml").open(encoding="utf-8") as file:
        return [docs / name for name in walk(yaml.safe_load(file)["nav"])]
