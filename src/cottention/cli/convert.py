"""cottention convert: turns checkpoints of the published research code, and stock softmax ones, into model directories.

cottention convert official OWNER/Cosine_Attention_BERT models/bert-cosine
cottention convert softmax bert-base-cased models/bert-from-softmax --distil-text books/ --distil-steps 200
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser

if TYPE_CHECKING:
    from cottention.convert import DistillationSettings


def build_parser() -> ArgumentParser:
    """Make the parser, with one subcommand for each kind of source."""
    parser = new_parser("convert", "Turn checkpoints of other code into model directories.")
    kinds = parser.add_subcommands(dest="kind")
    kinds.add_subcommand("official", _official_parser(), help="checkpoints of the published research code")
    kinds.add_subcommand("softmax", _softmax_parser(), help="stock BERT and GPT-J checkpoints, to cosine attention")
    return parser


def _official_parser() -> ArgumentParser:
    official = new_parser(
        "convert official",
        "Convert a checkpoint of the published code (config.json of a stock class, pytorch_model.bin or safetensors) "
        "to a directory that every other command and from_pretrained open. Pickled code in it is refused, never run.",
    )
    _add_places(official)
    return official


def _softmax_parser() -> ArgumentParser:
    softmax = new_parser(
        "convert softmax",
        "Convert a stock BERT (BertForPreTraining, BertForMaskedLM, BertModel) or GPT-J checkpoint, or a softmax model "
        "of ours, to a cosine model of the same weights. It computes something else than its source; --distil-text "
        "teaches it what the source does, and reports how near it came on text that it was not taught on.",
    )
    _add_places(softmax)
    softmax.add_argument(
        "--attention-type",
        default="cosine",
        choices=["cosine", "softmax"],
        help="softmax keeps what the source computes (default: cosine)",
    )
    softmax.add_argument("--norm-const", type=float, default=0.5, help="start of every head's norm_const")
    softmax.add_argument(
        "--keep-every",
        type=int,
        metavar="N",
        help="layers N, 2 N, 3 N ... keep the source's attention: a hybrid (default: all become cosine)",
    )
    softmax.add_argument(
        "--sliding-window",
        type=int,
        metavar="N",
        help="tokens that the layers of --keep-every see, of a GPT (default: as many as in the source)",
    )
    softmax.add_argument(
        "--output-gate",
        action="store_true",
        help="add a gate to each layer's attention, which changes no output until it is trained",
    )
    softmax.add_argument(
        "--distil-text",
        nargs="+",
        metavar="FILE",
        help="text to distil on: files (.txt, .jsonl, .parquet; .gz, .zst), folders or globs",
    )
    softmax.add_argument(
        "--held-out-text",
        nargs="+",
        metavar="FILE",
        help="text of the scores (default: the end of --distil-text, which is then not learnt from)",
    )
    softmax.add_argument(
        "--distil-steps", type=int, help="updates that teach each layer's attention (default: 200; 0: scores alone)"
    )
    softmax.add_argument(
        "--end-to-end-steps", type=int, help="updates that then teach the model as a whole (default: 0)"
    )
    softmax.add_argument("--window", type=int, help="tokens of a row of text (default: 128)")
    softmax.add_argument("--batch-size", type=int, help="rows of an update (default: 16)")
    softmax.add_argument("--learning-rate", type=float, help="highest rate of --distil-steps (default: 0.003)")
    softmax.add_argument(
        "--end-to-end-learning-rate", type=float, help="highest rate of --end-to-end-steps (default: 0.0005)"
    )
    softmax.add_argument("--seed", type=int, help="order of the text and masks of the scores (default: 0)")
    softmax.add_argument("--device", help="where to distil: cpu, cuda, cuda:1 (default: a GPU where there is one)")
    return softmax


def _add_places(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="directory, or OWNER/NAME on the Hugging Face Hub")
    parser.add_argument("destination", metavar="DESTINATION", help="directory to write; appears only when complete")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that is at DESTINATION")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--json", action="store_true", help="print the conversion report as JSON")


def run(args: Namespace) -> None:
    """Convert and print the report."""
    from cottention.convert import convert_official, convert_softmax

    chosen = args[args.kind]
    places = {"overwrite": chosen.overwrite, "revision": chosen.revision}
    if args.kind == "official":
        report = convert_official(chosen.source, chosen.destination, **places)
    else:
        report = convert_softmax(
            chosen.source,
            chosen.destination,
            attention_type=chosen.attention_type,
            norm_const=chosen.norm_const,
            keep_every=chosen.keep_every,
            sliding_window=chosen.sliding_window,
            output_gate=chosen.output_gate,
            distillation=_distillation(chosen),
            device=chosen.device,
            show_progress=True,
            **places,
        )
    print(json.dumps(report.to_dict(), indent=2) if chosen.json else report.summary())


def _distillation(chosen: Namespace) -> DistillationSettings | None:
    """The settings that were given; None where nothing asks for a distillation."""
    from cottention.convert import DistillationSettings
    from cottention.errors import SettingsError

    named = {
        "held_out": None if chosen.held_out_text is None else tuple(chosen.held_out_text),
        "steps": chosen.distil_steps,
        "end_to_end_steps": chosen.end_to_end_steps,
        "window": chosen.window,
        "batch_size": chosen.batch_size,
        "learning_rate": chosen.learning_rate,
        "end_to_end_learning_rate": chosen.end_to_end_learning_rate,
        "seed": chosen.seed,
    }
    given = {name: value for name, value in named.items() if value is not None}
    if chosen.distil_text is None:
        if given:
            flags = {"held_out": "held-out-text", "steps": "distil-steps"}
            name = next(iter(given))
            raise SettingsError(f"--{flags.get(name, name).replace('_', '-')} needs --distil-text")
        return None
    return DistillationSettings(text=tuple(chosen.distil_text), **given)
