"""cottention embed: sentences as vectors.

cottention embed --model runs/bert/model sentences.txt --normalize > vectors.jsonl
cottention embed --model runs/bert/model sentences.jsonl --output vectors.npy
"""

from __future__ import annotations

import json

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser
from cottention.errors import DataError, SettingsError
from cottention.files import check_writable, written_file


def build_parser() -> ArgumentParser:
    """Make the parser."""
    parser = new_parser(
        "embed",
        "Turn every line of a file into a vector, the mean of a BERT's last layer over its tokens; one JSON object per "
        "line, in the order of the file, or one .npy array.",
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="one text per line, or JSON lines with a text (by name, .jsonl); - is stdin")
    add("--model", metavar="DIR", required=True, help="directory of a BERT, or OWNER/NAME on the Hub")
    add("--output", metavar="FILE.npy", help="write the vectors [N, width] here, float32, instead of printing them")
    add("--normalize", action="store_true", help="scale every vector to length 1")
    add("--text-column", default="text", help="field with the text in JSON lines")
    add("--batch-size", type=int, default=32, help="texts read together: speed and memory, not the result")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    return parser


def run(args: Namespace) -> None:
    """Embed and print or write."""
    from cottention.cli._inputs import read_lines

    if args.output is not None and not args.output.endswith(".npy"):
        raise SettingsError(f"--output must end in .npy; got {args.output!r}")
    if args.output is not None:
        check_writable(args.output, "--output")
    texts = read_lines(args.file)
    if args.file.endswith(".jsonl"):
        texts = [_text(line, args.text_column, f"{args.file}, row {n}") for n, line in enumerate(texts, start=1)]

    from cottention.generation import embed_sentences, load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(args.model, "encoder", device=args.device)
    vectors = embed_sentences(model, tokenizer, texts, normalize=args.normalize, batch_size=args.batch_size)
    if args.output is not None:
        import numpy as np

        with written_file(args.output) as file:
            np.save(file, vectors.numpy())
        return
    for text, vector in zip(texts, vectors.tolist(), strict=True):
        print(json.dumps({"text": text, "embedding": vector}, ensure_ascii=False))


def _text(line: str, column: str, where: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: not JSON") from None
    text = found.get(column) if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{where}: needs a text {column!r}")
    return text
