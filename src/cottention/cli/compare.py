"""cottention compare: training runs beside each other, as a table and as curves.

cottention compare runs/cosine runs/softmax
cottention compare runs/* --plot compare.png
"""

from __future__ import annotations

import json
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser
from cottention.errors import SettingsError
from cottention.files import check_writable
from cottention.logging import get_logger

_logger = get_logger(__name__)
_FORMATS = (".png", ".svg")


def build_parser() -> ArgumentParser:
    """Make the parser."""
    parser = new_parser(
        "compare",
        "Show where runs of pretraining ended (or are) and what they took: a table on stdout, held-out loss over "
        "tokens and seconds as a picture. Losses per token compare runs with one tokenizer; nats per byte compare any.",
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="run directory; differences are taken from the first")
    add("--plot", metavar="FILE", help="draw the curves into this .png or .svg")
    add("--json", action="store_true", help="print one JSON array")
    return parser


def run(args: Namespace) -> None:
    """Read, print, draw."""
    if args.plot is not None:
        if Path(args.plot).suffix not in _FORMATS:
            raise SettingsError(f"--plot must end in {' or '.join(_FORMATS)}; got {args.plot}")
        check_writable(args.plot, "--plot")

    from cottention.training.comparing import as_rows, as_table, draw_runs, read_run

    runs = [read_run(directory) for directory in args.runs]
    print(json.dumps(as_rows(runs), ensure_ascii=False) if args.json else as_table(runs))
    if args.plot is not None:
        draw_runs(runs, Path(args.plot))
        _logger.info("wrote %s", args.plot)
