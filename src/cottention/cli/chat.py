"""cottention chat: a text that you and a saved GPT write in turns; a cosine model keeps one state between them.

cottention chat --model runs/quickstart-gpt/model
cottention chat --model MODEL --read book.txt            # read once, then ask
echo "My fellow" | cottention chat --model MODEL
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser
from cottention.errors import CottentionError, DataError, SettingsError
from cottention.files import check_writable, one_line
from cottention.logging import get_logger

if TYPE_CHECKING:
    from cottention.generation.conversation import Conversation

_logger = get_logger(__name__)
_WORDS = "/reset forgets all, /state says what is kept, /save FILE writes the state, /quit or Ctrl-D ends"


def build_parser() -> ArgumentParser:
    """Make the parser; the settings of the sampling are those of `generate_text`."""
    parser = new_parser(
        "chat",
        "Write a text in turns with a GPT: each line that you enter is read, and the model goes on from it. Models of "
        f"this package continue texts, they were not taught to obey. {_WORDS}.",
    )
    add = parser.add_argument
    add("--model", metavar="DIR", required=True, help="directory of a saved GPT, or OWNER/NAME on the Hub")
    add("--read", metavar="FILE", help="read this text first; of any length with a cosine model")
    add("--load-state", metavar="FILE", help="go on from a state that generate or chat has saved")
    add("--max-new-tokens", type=int, default=80, help="tokens of a turn at most")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token, 1 samples as is")
    add("--top-k", type=int, help="sample among the k likeliest tokens")
    add("--top-p", type=float, default=0.95, help="sample among the likeliest with this probability")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less")
    add("--stop", metavar="TEXT", nargs="+", default=[], help="end a turn before any of these texts")
    add("--seed", type=int, default=0, help="decides the samples")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    return parser


def run(args: Namespace) -> None:
    """Open the model, then take turns until the input ends."""
    if args.max_new_tokens < 1:
        raise SettingsError(f"max_new_tokens must be at least 1; got {args.max_new_tokens}")

    from cottention.cli._inputs import read_text
    from cottention.generation import load_model_and_tokenizer, load_state
    from cottention.generation.conversation import Conversation

    read = None if args.read is None else read_text(args.read)
    model, tokenizer = load_model_and_tokenizer(args.model, "causal-lm", device=args.device)
    state = None if args.load_state is None else load_state(args.load_state, model, tokenizer)
    talk = Conversation(model, tokenizer, state=state)
    if read is not None:
        talk.read(read)
        _say_state(talk)
    if sys.stdin.isatty():
        print(f"{_WORDS}.", file=sys.stderr)
    for turn, line in enumerate(_lines()):
        if line in ("/quit", "/exit"):
            return
        try:
            _turn(talk, line, turn, args)
        except CottentionError as error:  # a mistake of one turn ends no conversation
            _logger.warning("%s", one_line(error))


def _lines() -> Iterator[str]:
    """What is entered, line by line; a terminal has its line editing."""
    if sys.stdin.isatty():
        while True:
            try:
                yield input("> ")
            except EOFError:
                print(file=sys.stderr)
                return
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError(f"line {number} of stdin is not UTF-8") from None


def _turn(talk: Conversation, line: str, turn: int, args: Namespace) -> None:
    if line == "/reset":
        talk.reset()
    elif line == "/state":
        _say_state(talk)
    elif line.split(" ")[0] == "/save":
        _save(talk, line.removeprefix("/save").strip())
    elif line.startswith("/"):
        raise SettingsError(f"no word {line.split(' ')[0]!r} here: {_WORDS}")
    else:
        result = talk.reply(
            line,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
            stop_strings=args.stop,
            seed=args.seed + turn,
            stream=_print_piece,
        )
        print(flush=True)
        _logger.info("%.0f tokens/s; %s", result.tokens_per_s, _kept(talk))


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)


def _save(talk: Conversation, path: str) -> None:
    from cottention.generation import save_state

    if talk.state is None:
        raise SettingsError("there is no state to save: nothing was read yet, or this is a softmax model")
    check_writable(path, "/save")
    save_state(path, talk.state, talk.model, talk.tokenizer)
    _logger.info("wrote %s", path)


def _say_state(talk: Conversation) -> None:
    _logger.info("%s", _kept(talk))


def _kept(talk: Conversation) -> str:
    if talk.keeps_state:
        return f"{talk.num_tokens:,} tokens in a state of {talk.state_bytes / 1024:,.0f} KiB"
    return f"{talk.num_tokens:,} of {talk.model.config.n_positions:,} positions used"
