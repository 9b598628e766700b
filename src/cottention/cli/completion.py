"""`cottention completion`: what a shell needs to complete commands, options and their choices with the tab key.

eval "$(cottention completion bash)"                     # in this shell; in ~/.bashrc for all
cottention completion zsh > ~/.zfunc/_cottention         # where fpath has ~/.zfunc
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

import jsonargparse

from cottention.cli.main import COMMANDS, new_parser

_SHELLS = ("bash", "zsh", "tcsh")


def build_parser() -> jsonargparse.ArgumentParser:
    """The words of `cottention completion`."""
    parser = new_parser(
        "completion", 'Print completion for a shell: `eval "$(cottention completion bash)"` turns it on.'
    )
    parser.add_argument("shell", choices=_SHELLS, help="the shell")
    return parser


def run(args: jsonargparse.Namespace) -> None:
    """Print the shell's words."""
    import shtab

    print(shtab.complete(_all_commands(), shell=args.shell))


def _all_commands() -> argparse.ArgumentParser:
    """One parser with every command in it, which nobody parses with: that would import them all."""
    everything = argparse.ArgumentParser(prog="cottention")
    commands = everything.add_subparsers(parser_class=_parser_of)  # type: ignore[type-var]
    for name, (_module, help_line) in COMMANDS.items():
        commands.add_parser(name, help=help_line, description=name)
    for option in ("--verbose", "--version"):
        everything.add_argument(option, action="store_true")
    return everything


def _parser_of(*, description: str, **_: Any) -> argparse.ArgumentParser:
    return import_module(COMMANDS[description][0]).build_parser()
