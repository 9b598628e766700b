"""cottention playground: a page in the browser to try saved models on, served on this machine alone.

cottention playground --model runs/quickstart-gpt/model --model runs/quickstart-bert/model
"""

from __future__ import annotations

from importlib.util import find_spec

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser
from cottention.errors import SettingsError
from cottention.logging import get_logger

_logger = get_logger(__name__)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build_parser() -> ArgumentParser:
    """Make the parser."""
    parser = new_parser(
        "playground",
        "Serve a page to try models on: writing, asking a book, chat, filling masks, next sentences, search, a look "
        "inside. It is reached from this machine alone unless --host says otherwise, and fetches nothing. Ctrl-C ends "
        "it. Needs `pip install 'cottention[playground]'`.",
    )
    add = parser.add_argument
    add("--model", metavar="DIR", action="append", required=True, help="directory of a saved model; again for more")
    add("--port", type=int, default=7860, help="port of the page; 0 takes a free one")
    add("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 lets others of the network in")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    return parser


def run(args: Namespace) -> None:
    """Open the models, then serve until Ctrl-C."""
    if not 0 <= args.port <= 65535:
        raise SettingsError(f"port must be from 0 to 65535; got {args.port}")
    if find_spec("gradio") is None:
        raise SettingsError("the playground needs gradio: pip install 'cottention[playground]'")

    from cottention.playground.serving import serve

    if args.host not in _LOOPBACK:
        _logger.warning("%s: whoever reaches this address can use the page", args.host)
    serve(args.model, host=args.host, port=args.port, device=args.device)
