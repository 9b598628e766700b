"""cottention search: the texts of an index that are nearest to a question.

cottention embed --model runs/bert/model notes.txt --normalize --output notes.parquet
cottention search --index notes.parquet "What did we say of the harbour?"
"""

from __future__ import annotations

import json

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser
from cottention.errors import SettingsError

_EXAMPLES = """
cottention search --index notes.parquet "What did we say of the harbour?"
cottention search --index notes.parquet --top-k 20 --json "storm at sea"
"""


def build_parser() -> ArgumentParser:
    """Make the parser."""
    parser = new_parser(
        "search",
        "Print the texts of an index, a .parquet of `cottention embed`, whose vectors are nearest to that of a "
        "question: the nearest first, each with its cosine.",
        examples=_EXAMPLES,
    )
    add = parser.add_argument
    add("question", metavar="QUESTION", help="a text")
    add("--index", metavar="FILE.parquet", required=True, help="what `cottention embed --output FILE.parquet` wrote")
    add("--model", metavar="DIR", help="the model that made it (default: where it was then); another is refused")
    add("--top-k", type=int, default=5, help="texts to print")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    add("--json", action="store_true", help="print one JSON object per text")
    return parser


def run(args: Namespace) -> None:
    """Search and print."""
    from cottention.cli._inputs import text_of

    question = text_of(args.question)
    if not question.strip():
        raise SettingsError("QUESTION must be a text; got an empty one")
    from cottention.generation.embedded_files import search_file

    for hit in search_file(args.index, question, model=args.model, top_k=args.top_k, device=args.device):
        if args.json:
            found = {"score": hit.score, "row": hit.row, "id": hit.key, "text": hit.text}
            print(json.dumps({name: value for name, value in found.items() if value is not None}, ensure_ascii=False))
            continue
        named = f"row {hit.row}" if hit.key is None else hit.key
        print(f"{hit.score:.4f}  {named}{'' if hit.text is None else f'  {hit.text}'}")
