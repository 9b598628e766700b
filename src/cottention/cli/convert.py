"""cottention convert: turns checkpoints of the published research code into model directories.

cottention convert official OWNER/Cosine_Attention_BERT models/bert-cosine
"""

from __future__ import annotations

import json

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser


def build_parser() -> ArgumentParser:
    """Make the parser, with one subcommand for each kind of source."""
    official = new_parser(
        "convert official",
        "Convert a checkpoint of the published code (config.json of a stock class, pytorch_model.bin or safetensors) "
        "to a directory that every other command and from_pretrained open. Pickled code in it is refused, never run.",
    )
    official.add_argument("source", metavar="SOURCE", help="directory, or OWNER/NAME on the Hugging Face Hub")
    official.add_argument("destination", metavar="DESTINATION", help="directory to write; appears only when complete")
    official.add_argument("--overwrite", action="store_true", help="replace the model that is at DESTINATION")
    official.add_argument("--revision", help="branch, tag or commit on the Hub")
    official.add_argument("--json", action="store_true", help="print the conversion report as JSON")

    parser = new_parser("convert", "Turn checkpoints of other code into model directories.")
    parser.add_subcommands(dest="kind").add_subcommand(
        "official", official, help="checkpoints of the published research code"
    )
    return parser


def run(args: Namespace) -> None:
    """Convert and print the report."""
    from cottention.convert import convert_official

    chosen = args.official
    report = convert_official(chosen.source, chosen.destination, overwrite=chosen.overwrite, revision=chosen.revision)
    print(json.dumps(report.to_dict(), indent=2) if chosen.json else report.summary())
