"""cottention embed: texts as vectors.

cottention embed --model runs/bert/model sentences.txt --normalize > vectors.jsonl
cottention embed --model runs/bert/model sentences.jsonl --output vectors.npy
"""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser
from cottention.errors import SettingsError
from cottention.files import check_writable

_ENDINGS = (".npy", ".jsonl", ".parquet")
_EXAMPLES = """
cottention embed --model runs/bert/model sentences.txt --normalize > vectors.jsonl
cottention embed --model runs/bert/model notes.csv --text-column note --id-column number --output notes.parquet
cottention search --index notes.parquet "What did we say of the harbour?"
"""


def build_parser() -> ArgumentParser:
    """Make the parser."""
    parser = new_parser(
        "embed",
        "Turn every text of a file into a vector, the mean of a BERT's last layer over its tokens, in the order of the "
        "file, read text by text: one JSON object per line, one .npy array, or a .parquet, which `cottention search` "
        "searches.",
        examples=_EXAMPLES,
    )
    add = parser.add_argument
    add(
        "file", metavar="FILE", help="one text per line, or rows with a text (.jsonl, .csv, .tsv, .parquet); - is stdin"
    )
    add("--model", metavar="DIR", required=True, help="directory of a BERT, or OWNER/NAME on the Hub")
    add("--output", metavar="FILE", help="write .npy (float32, [N, width]), .jsonl or .parquet instead of printing")
    add("--normalize", action="store_true", help="scale every vector to length 1")
    add("--text-column", default="text", help="column with the text")
    add("--id-column", metavar="NAME", help="column to keep beside the vector, as id")
    add("--without-texts", action="store_true", help="keep the texts out of .jsonl and .parquet")
    add("--max-length", type=int, help="tokens of a text at most (default: the model's positions; all where rotary)")
    add("--batch-size", type=int, default=32, help="texts read together: speed and memory, not the result")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    return parser


def run(args: Namespace) -> None:
    """Embed and print or write."""
    if args.output is not None and not args.output.endswith(_ENDINGS):
        raise SettingsError(f"--output must end in .npy; got {args.output!r}")
    for name, least in (("batch_size", 1), ("max_length", 5)):
        if args[name] is not None and args[name] < least:
            raise SettingsError(f"{name} must be at least {least}; got {args[name]}")
    if args.output is not None:
        check_writable(args.output, "--output")
    from cottention.generation.embedded_files import embed_file

    embed_file(
        args.model,
        args.file,
        output=args.output,
        text_column=args.text_column,
        id_column=args.id_column,
        normalize=args.normalize,
        keep_texts=not args.without_texts,
        max_length=args.max_length,
        batch_size=args.batch_size,
        device=args.device,
    )
