"""cottention classify: labels the rows of a file with a fine-tuned model.

cottention classify --model runs/stars/model new.csv --text-column review --output stars.jsonl
"""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser
from cottention.errors import SettingsError
from cottention.files import check_writable

_ENDINGS = (".jsonl", ".csv", ".conll")
_EXAMPLES = """
cottention classify --model runs/stars/model new.csv --text-column review --output stars.csv
cottention classify --model runs/pairs/model pairs.tsv --text-column a --text-pair-column b > labels.jsonl
cottention classify --model runs/tags/model sentences.txt --output tags.conll
echo "Never again." | cottention classify --model runs/stars/model -
"""


def build_parser() -> ArgumentParser:
    """Make the parser."""
    parser = new_parser(
        "classify",
        "Label every row of a file with a model of `cottention finetune`: one JSON object per row with text, label and "
        "score (of a class its probability, of a number the number), in the order of the file; read row by row, so "
        "that it may have any size.",
        examples=_EXAMPLES,
    )
    add = parser.add_argument
    add("file", metavar="FILE", help=".csv, .tsv, .jsonl, .parquet, .txt (a text a line), .conll; - is lines of stdin")
    add("--model", metavar="DIR", required=True, help="directory of a fine-tuned model, or OWNER/NAME on the Hub")
    add("--text-column", metavar="NAME", help="column of the text (default: text; of lists of words tokens)")
    add("--text-pair-column", metavar="NAME", help="column of the second text, for pairs")
    add("--output", metavar="FILE", help="write here, .jsonl, .csv or .conll (word tags), instead of printing")
    add("--all-scores", action="store_true", help="add the scores of all labels (.jsonl)")
    add("--max-length", type=int, help="tokens of a row at most (default: as the model was trained)")
    add("--skip-malformed", action="store_true", help="leave out rows that cannot be read, and say how many")
    add("--batch-size", type=int, default=32, help="rows read together: speed and memory, not the result")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...")
    return parser


def run(args: Namespace) -> None:
    """Label and print or write."""
    if args.output is not None and not args.output.endswith(_ENDINGS):
        raise SettingsError(f"--output must end in {', '.join(_ENDINGS)}; got {args.output!r}")
    if args.batch_size < 1:
        raise SettingsError(f"--batch-size must be at least 1; got {args.batch_size}")
    if args.output is not None:
        check_writable(args.output, "--output")
    from cottention.data.tables import check_table

    check_table(args.file)
    from cottention.generation.labelled_files import label_file

    label_file(
        args.model,
        args.file,
        text_column=args.text_column,
        text_pair_column=args.text_pair_column,
        output=args.output,
        all_scores=args.all_scores,
        max_length=args.max_length,
        skip_malformed=args.skip_malformed,
        batch_size=args.batch_size,
        device=args.device,
    )
