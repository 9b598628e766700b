"""cottention fill-mask: fills the masked words of texts with a saved BERT.

cottention fill-mask --model runs/quickstart-bert/model "The [MASK] of the United States"
"""

from __future__ import annotations

import json

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser
from cottention.errors import SettingsError
from cottention.logging import get_logger

_logger = get_logger(__name__)


def build_parser() -> ArgumentParser:
    """Make the parser."""
    parser = new_parser(
        "fill-mask",
        "Show the likeliest tokens for every [MASK] of a text. Several masks in a text are filled each on its own.",
    )
    add = parser.add_argument
    add("texts", metavar="TEXT", nargs="*", help="text with at least one mask")
    add("--model", metavar="DIR", required=True, help="directory of a saved BERT, or OWNER/NAME on the Hub")
    add("--file", metavar="FILE", help="read one text per line; - reads stdin")
    add("--top-k", type=int, default=5, help="candidates for each mask")
    add("--batch-size", type=int, default=32, help="texts read together")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    add("--json", action="store_true", help="print one JSON object per text")
    return parser


def run(args: Namespace) -> None:
    """Fill and print."""
    from cottention.cli._inputs import read_lines, text_of

    if bool(args.texts) == (args.file is not None):
        raise SettingsError("give either TEXT or --file FILE (- reads stdin)")
    texts = read_lines(args.file) if args.file is not None else [text_of(text) for text in args.texts]

    from time import perf_counter

    from cottention.generation import fill_mask, load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(args.model, "masked-lm", device=args.device)
    started = perf_counter()
    for filled in fill_mask(model, tokenizer, texts, args.top_k, batch_size=args.batch_size):
        if args.json:
            print(json.dumps(filled.to_dict(), ensure_ascii=False))
            continue
        print(filled.best_text)
        for number, candidates in enumerate(filled.masks, start=1):
            shown = ", ".join(f"{candidate.token} {candidate.probability:.3f}" for candidate in candidates)
            print(f"  mask {number}: {shown}")
    _logger.info("%d texts in %.2f s", len(texts), perf_counter() - started)
