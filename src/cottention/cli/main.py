"""The entry point: finds the command, runs it, and turns a user's mistake into one line and exit code 2.

Only the module of the command that was asked for is imported, and it imports torch inside `run`, so every `--help`
answers at once. A command is a module with `build_parser()` and `run(args)`, and where parsers take long to make
`parser_for(words)`, and one row in COMMANDS.

    sys.exit(main(["generate", "--model", "runs/mine/model", "--prompt", "My fellow Americans"]))
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module

import jsonargparse

import cottention
from cottention.cli._help import help_options, spelled_as_defined
from cottention.cli._messages import explain
from cottention.cli._process import (
    drop_stdout,
    interrupt_imports,
    open_streams,
    rank,
    spare_neighbours,
    tell_launcher,
    wait_for_first,
)
from cottention.errors import CottentionError, did_you_mean
from cottention.files import one_line
from cottention.logging import setup_cli_logging
from cottention.stopping import Stopped, ending_cleanly

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("cottention.cli.quickstart", "train a small model on real text in minutes, score it, let it write"),
    "data": ("cottention.cli.data", "turn text into corpora of sentences, pairs or tokens"),
    "pretrain": ("cottention.cli.pretrain", "pretrain a GPT or a BERT from a recipe"),
    "compare": ("cottention.cli.compare", "show training runs beside each other: a table and curves"),
    "slurm": ("cottention.cli.slurm", "submit a pretraining run to a SLURM cluster"),
    "recipes": ("cottention.cli.recipes", "list the recipes of the package, or print one"),
    "finetune": ("cottention.cli.finetune", "fine-tune on labels of your own, or on tasks of GLUE"),
    "classify": ("cottention.cli.classify", "label the rows of a file with a fine-tuned model"),
    "generate": ("cottention.cli.generate", "continue a text with a GPT, at constant memory"),
    "chat": ("cottention.cli.chat", "write a text in turns with a GPT, which keeps one state between them"),
    "fill-mask": ("cottention.cli.fill_mask", "fill the masked words of a text with a BERT"),
    "next-sentence": ("cottention.cli.next_sentence", "say how likely one sentence follows another, with a BERT"),
    "embed": ("cottention.cli.embed", "turn texts into vectors with a BERT"),
    "search": ("cottention.cli.search", "find the texts that are nearest to a question"),
    "evaluate": ("cottention.cli.evaluate", "score a model: perplexity, GLUE, lm-evaluation-harness"),
    "convert": ("cottention.cli.convert", "turn a published or a stock softmax checkpoint into a model directory"),
    "bench": ("cottention.cli.bench", "measure time and memory against softmax attention"),
    "playground": ("cottention.cli.playground", "try models on a page in the browser, on this machine alone"),
    "completion": ("cottention.cli.completion", "print tab completion for bash, zsh or tcsh"),
    "doctor": ("cottention.cli.doctor", "say what this machine can run and what is missing"),
}
"""Command -> (module, one line for the overview). A module has build_parser() and run(args) -> exit code or None."""

_USER_MISTAKE = 2
_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports
_PIPE_CLOSED = 141  # 128 + SIGPIPE
_LONGEST_MESSAGE = 1000
# What a command that was ended can say about its work.
_AFTERWARDS = {"data": "; the same command goes on"}
# What torch says, in an error of no class of its own, where an allocation failed.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")


def entry_point() -> None:
    """Run the command line given to the process; the installed `cottention` script."""
    try:
        open_streams()
    except CottentionError as error:
        _complain("", str(error))
        sys.exit(_USER_MISTAKE)
    interrupt_imports()
    spare_neighbours()
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments behind the program's name; None takes the process's.

    Returns:
        The exit code: 0, or 2 when the user made a mistake, which stderr names in one line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any("\0" in word for word in words):  # no file and no text has one
        _complain("", f"an argument must hold no zero byte; got {next(word for word in words if chr(0) in word)!r}")
        return _USER_MISTAKE
    try:
        code = _dispatch(words)
        problem = _flush_stdout()
    except BrokenPipeError:
        drop_stdout()  # the reader (`| head`) has gone
        return _PIPE_CLOSED
    except OSError as error:
        if error.errno is None:
            raise
        code, problem = 0, _flush_stdout() or str(error.strerror)
    if problem and code != _USER_MISTAKE:  # else the command has said it
        _complain("", f"stdout: {problem}")
    return _USER_MISTAKE if problem else code


def _flush_stdout() -> str:
    """Write what was printed; say what keeps it from being written, such as a full disk."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_stdout()
        return str(error.strerror)
    return ""


def new_parser(command: str, description: str, *, examples: str = "", **options: object) -> jsonargparse.ArgumentParser:
    """Make the parser of a command, or of a subcommand, so that all of them behave alike.

    Args:
        command: the words after `cottention`, e.g. "pretrain" or "convert official".
        description: the text at the head of its --help.
        examples: command lines at its end, one a line; none: those in `_examples.py`.
        **options: anything else that jsonargparse.ArgumentParser takes.

    Returns:
        A parser that raises argparse.ArgumentError, which `main` turns into one line, and takes no abbreviations (a
        script that relies on one breaks when an option is added).
    """
    settings: dict = {"exit_on_error": False, "allow_abbrev": False, **help_options(command, examples), **options}
    return jsonargparse.ArgumentParser(prog=f"cottention {command}", description=description, **settings)


def _dispatch(words: list[str]) -> int:
    verbose = words[:1] == ["--verbose"]
    if verbose:
        words = words[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"cottention {cottention.__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        kind = "option" if command.startswith("-") else "command"
        suggestion = did_you_mean(command, [*COMMANDS, "--help", "--version", "--verbose"])
        _complain("", f"unknown {kind} {command!r}{suggestion} (see `cottention --help`)")
        return _USER_MISTAKE
    setup_cli_logging(verbose)
    if rank() != 0:
        logging.getLogger("cottention").setLevel(logging.ERROR)  # one of several processes says it
    return _guarded(command, rest)


def _guarded(command: str, rest: Sequence[str]) -> int:
    """Parse and run; what a user or the terminal did becomes a line and a code, a bug keeps its traceback."""
    parser = argparse.ArgumentParser()
    try:
        module = import_module(COMMANDS[command][0])
        # Where a parser takes long to make, its module makes the part that the words need.
        parser = module.parser_for(rest) if hasattr(module, "parser_for") else module.build_parser()
        with ending_cleanly():
            return module.run(parser.parse_args(spelled_as_defined(parser, rest))) or 0
    except argparse.ArgumentError as error:
        _complain(command, explain(str(error), _names(parser)))
    except CottentionError as error:
        _complain(command, one_line(str(error)))
    except BrokenPipeError:
        raise  # for `main`, which ends quietly
    except UnicodeEncodeError as error:
        # Python carries names of files that are not UTF-8; libraries in Rust do not.
        if "surrogates not allowed" not in str(error):
            raise
        _complain(command, f"names of files and texts must be UTF-8; got {error.object[:200]!a}")
    except OSError as error:
        if error.errno is None:  # of a library, which means something else by it
            raise
        where = "" if error.filename is None else f"{_shown(error.filename)}: "
        _complain(command, f"{where}{one_line(error)}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise
        _complain(command, f"not enough memory; smaller batches or a smaller model need less ({one_line(error, 100)})")
    except Stopped as stopped:
        _complain(command, f"stopped by {stopped}{_AFTERWARDS.get(command, '')}")
        return 128 + stopped.number
    except KeyboardInterrupt:
        _complain(command, f"interrupted{_AFTERWARDS.get(command, '')}")
        return _INTERRUPTED
    except SystemExit as leaving:
        # argparse leaves like this behind --help; coming back instead lets `main` flush what was printed.
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        raise
    except BaseException as error:
        # A library in Rust met what it did not expect, in a text or a tokenizer; see `data/tokenizer_files.py`.
        if type(error).__name__ != "PanicException":
            raise
        _complain(command, f"the tokenizer cannot encode this text: {one_line(str(error))}")
    return _USER_MISTAKE


def _shown(filename: object) -> str:
    return os.fsdecode(filename) if isinstance(filename, (str, bytes, os.PathLike)) else str(filename)


def _complain(command: str, message: str) -> None:
    if len(message) > _LONGEST_MESSAGE:  # it quotes what was given
        message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
    line = f"{f'cottention {command}'.strip()}: error: {message}"
    wait_for_first()
    print(line, file=sys.stderr, flush=True)
    tell_launcher(line)


def _names(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every option string and key that a parser and its subcommands know."""
    for action in parser._actions:  # argparse has no public list of them
        if isinstance(action.choices, Mapping):
            for subparser in action.choices.values():
                yield from _names(subparser)
        else:
            yield action.dest
            yield from action.option_strings


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{help_line}" for name, (_module, help_line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cottention [--verbose] COMMAND [OPTIONS]",
            "       cottention COMMAND --help",
            "       cottention --version",
            "",
            "Linear transformers with cosine attention: train, score, convert and run them.",
            "",
            "commands:",
            *lines,
            "",
            "Start with `cottention quickstart`. Results go to stdout, logs to stderr.",
        ]
    )


if __name__ == "__main__":
    entry_point()
