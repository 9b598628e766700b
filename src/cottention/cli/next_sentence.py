"""cottention next-sentence: how likely the second sentence of a pair follows the first.

cottention next-sentence --model runs/bert/model "It rained all night." "The street was wet."
cottention next-sentence --model runs/bert/model --file pairs.tsv > scores.jsonl
"""

from __future__ import annotations

import json

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser
from cottention.errors import DataError, SettingsError


def build_parser() -> ArgumentParser:
    """Make the parser."""
    parser = new_parser(
        "next-sentence",
        "Print the probability that the second sentence of each pair follows the first, as one JSON object per pair.",
    )
    add = parser.add_argument
    add("sentences", metavar="SENTENCE", nargs="*", help="the first and the second sentence of one pair")
    add("--model", metavar="DIR", required=True, help="a BERT pretrained with its next-sentence head")
    add(
        "--file",
        metavar="FILE",
        help="one pair a line, with a tab between, or as JSON with first and second; - is stdin",
    )
    add("--batch-size", type=int, default=32, help="pairs read together: speed and memory, not the result")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    return parser


def run(args: Namespace) -> None:
    """Score and print."""
    from cottention.cli._inputs import read_lines, text_of

    if bool(args.sentences) == (args.file is not None):
        raise SettingsError("give either two SENTENCEs or --file FILE (- reads stdin)")
    if args.file is None and len(args.sentences) != 2:
        raise SettingsError(f"give two SENTENCEs; got {len(args.sentences)}")
    if args.file is None:
        pairs = [(text_of(args.sentences[0]), text_of(args.sentences[1]))]
    else:
        shown = "stdin" if args.file == "-" else args.file
        pairs = [_pair(line, f"{shown}, pair {number}") for number, line in enumerate(read_lines(args.file), start=1)]

    from cottention.generation import load_model_and_tokenizer, score_next_sentences

    model, tokenizer = load_model_and_tokenizer(args.model, "next-sentence", device=args.device)
    scores = score_next_sentences(model, tokenizer, pairs, batch_size=args.batch_size)
    for (first, second), score in zip(pairs, scores, strict=True):
        print(json.dumps({"first": first, "second": second, "follows": score}, ensure_ascii=False))


def _pair(line: str, where: str) -> tuple[str, str]:
    if line.lstrip().startswith("{"):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{where}: not JSON") from None
        first, second = found.get("first"), found.get("second")
        if not (isinstance(first, str) and isinstance(second, str)):
            raise DataError(f"{where}: needs the texts 'first' and 'second'; it has {', '.join(found) or 'nothing'}")
        return first, second
    cells = line.split("\t")
    if len(cells) != 2:
        raise DataError(f"{where}: two sentences with a tab between expected; got {len(cells)}")
    return cells[0], cells[1]
