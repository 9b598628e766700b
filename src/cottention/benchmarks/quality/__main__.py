"""The study's command line: `python -m cottention.benchmarks.quality --help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cottention.errors import CottentionError, SettingsError

if TYPE_CHECKING:
    from cottention.benchmarks.quality.cells import Cell
    from cottention.benchmarks.quality.lines import Lines
    from cottention.benchmarks.quality.tasks import TaskFiles


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cottention.benchmarks.quality",
        description="What each option of the block buys: trains small models, cell by cell, and makes tables of them.",
    )
    parser.add_argument(
        "--lines", type=Path, default=Path("docs/quality"), help="files of finished cells (%(default)s)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("list", help="the cells, and which are finished")
    shown.add_argument("cells", nargs="*", help="names, with * and ?; none: all that run unattended")
    run = commands.add_parser("run", help="run those that are not finished")
    run.add_argument("cells", nargs="*", help="names, with * and ?; none: all that run unattended")
    run.add_argument("--share", default="1/1", metavar="I/N", help="every N-th cell, from the I-th on: for N processes")
    run.add_argument("--minutes", type=float, default=float("inf"), help="after which no further cell begins")
    repeat = commands.add_parser("repeat", help="run one again and compare it with its line; exit 1 if it differs")
    repeat.add_argument("cell", help="its name")
    for each in (run, repeat):
        shared = Path(os.environ.get("COTTENTION_SHARED") or "../shared")
        each.add_argument("--texts", type=Path, default=shared / "data" / "lm", help="the text (%(default)s)")
        each.add_argument("--work", type=Path, default=Path("runs/quality"), help="tokens, checkpoints (%(default)s)")
        each.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        each.add_argument("--threads", type=int, default=1, help="one, unless the models are large")
    table = commands.add_parser("table", help="print Markdown of what is finished")
    table.add_argument("experiments", nargs="*", help="names; none: all")
    table.add_argument("--page", type=Path, help="a page between whose marks it is written instead")
    plot = commands.add_parser("plot", help="draw curves of what is finished")
    plot.add_argument("--output", type=Path, default=Path("docs/quality"), help="where the pictures go (%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 2 with one line on stderr where it was asked for wrongly."""
    given = _parser().parse_args(arguments)
    try:
        return {"list": _list, "run": _run, "repeat": _repeat, "table": _table, "plot": _plot}[given.command](given)
    except (CottentionError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130


def _lines(given: argparse.Namespace) -> Lines:
    from cottention.benchmarks.quality.lines import Lines

    return Lines(given.lines)


def _list(given: argparse.Namespace) -> int:
    from cottention.benchmarks.quality.cells import cells_like

    lines = _lines(given)
    for cell in cells_like(given.cells):
        line = lines.of(cell)
        rate = lines.chosen_rate(cell)
        said = "waits for its sweep" if rate is None else "to run"
        print(f"{cell.name:80} {said if line is None else 'loss {:.4f}'.format(line['scores']['loss'])}")
    return 0


def _check_machine(given: argparse.Namespace) -> None:
    if given.threads < 1:
        raise SettingsError(f"--threads must be at least 1; got {given.threads}")
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda needs a CUDA device; there is none here")
    torch.set_num_threads(given.threads)  # sums that are split among others differ in the last digits


def _run(given: argparse.Namespace) -> int:
    from cottention.benchmarks.quality.cells import cells_like
    from cottention.benchmarks.quality.running import run_cells

    cells = _share_of(cells_like(given.cells), given.share)
    if not given.minutes > 0:
        raise SettingsError(f"--minutes must be more than 0; got {given.minutes}")
    _check_machine(given)
    finished = run_cells(cells, _lines(given), _files(given), device=given.device, seconds=60 * given.minutes)
    for line in finished:
        scores = line["scores"]
        told = scores.get("accuracy", {"perplexity": round(scores.get("perplexity", 0.0), 2)})
        print(f"{line['cell']:80} loss {scores['loss']:.4f}  {json.dumps(told)}", flush=True)
    return 0


def _repeat(given: argparse.Namespace) -> int:
    from cottention.benchmarks.quality.cells import cells_like
    from cottention.benchmarks.quality.running import differences, run_cell

    cells = cells_like([given.cell])
    lines = _lines(given)
    if len(cells) > 1:
        raise SettingsError(f"one cell is repeated at a time; {given.cell!r} are {len(cells)}")
    line = lines.of(cells[0])
    if line is None:
        raise SettingsError(f"{given.cell} has no line in {given.lines} to compare with: run it first")
    _check_machine(given)
    found = run_cell(cells[0], lines, _files(given), device=given.device)
    print(json.dumps(found["scores"]))
    apart = differences(found, line)
    print("\n".join(apart) if apart else "the same as its line")
    return 1 if apart else 0


def _table(given: argparse.Namespace) -> int:
    from cottention.benchmarks.quality.tables import as_markdown, replace_tables
    from cottention.files import write_text

    tables = as_markdown(_lines(given), given.experiments)
    if given.page is None:
        print(tables)
    else:
        write_text(given.page, replace_tables(given.page.read_text(encoding="utf-8"), tables))
    return 0


def _plot(given: argparse.Namespace) -> int:
    from cottention.benchmarks.quality.curves import write_curves

    print("\n".join(map(str, write_curves(_lines(given), given.output))))
    return 0


def _files(given: argparse.Namespace) -> TaskFiles:
    from cottention.benchmarks.quality.tasks import TaskFiles

    return TaskFiles(texts=given.texts, work=given.work)


def _share_of(cells: list[Cell], share: str) -> list[Cell]:
    number, _, count = share.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise SettingsError(f"--share must be I/N with I from 1 to N, as in 1/2; got {share!r}")
    return cells[int(number) - 1 :: int(count)]


if __name__ == "__main__":
    sys.exit(main())
