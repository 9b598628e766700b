"""cottention evaluate glue: tables of fine-tuning runs, scores of one model, files for the GLUE server.

cottention evaluate glue --runs runs/glue-cosine runs/glue-softmax --markdown docs/glue-results.md
cottention evaluate glue --model runs/glue/rte/model --task rte --data glue/
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from cottention.cli.main import new_parser
from cottention.errors import SettingsError
from cottention.files import check_writable, write_text

if TYPE_CHECKING:
    from cottention.evaluation.glue import GlueScores

_DEFAULT_LENGTH = 128


def build_parser() -> ArgumentParser:
    """Make the parser."""
    parser = new_parser(
        "evaluate glue",
        "Tables of runs of `cottention finetune` under the published figures (--runs), or the scores of one fine-tuned "
        "model (--model, --task). With --submission, predictions for the GLUE server.",
    )
    add = parser.add_argument
    add(
        "--runs",
        nargs="+",
        metavar="DIR",
        help="output directories of `cottention finetune`, one row of the table each",
    )
    add("--model", metavar="DIR", help="one fine-tuned model")
    add("--task", help="its task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli")
    add("--data", default="hub", metavar="DIR", help="GLUE's folder, one task's own folder, or hub (the default)")
    add("--max-length", type=int, help=f"tokens of a row at most (default: the run's, else {_DEFAULT_LENGTH})")
    add("--batch-size", type=int, default=64, help="rows read together: speed and memory, not the result")
    add("--submission", metavar="DIR", help="write the test rows' predictions here, one TSV per task")
    add("--markdown", metavar="FILE", help="write the tables here too")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


def run(args: Namespace) -> None:
    """Score or collect, and print."""
    if bool(args.runs) == bool(args.model):
        raise SettingsError("give either --runs or --model with --task")
    if args.model and not args.task:
        raise SettingsError("--model needs --task")
    if args.batch_size < 1:
        raise SettingsError(f"--batch-size must be at least 1; got {args.batch_size}")
    if args.markdown:
        if args.model:
            raise SettingsError("--markdown writes the tables of --runs; got --model")
        check_writable(args.markdown, "--markdown")
    with ExitStack() as held:
        if args.submission:
            from cottention.evaluation.glue_model import submission_folder

            held.enter_context(submission_folder(Path(args.submission)))
        if args.model:
            _one_model(args)
        else:
            _runs(args)


def _one_model(args: Namespace) -> None:
    from cottention.data.glue_tasks import glue_task
    from cottention.evaluation.glue_model import score_glue_model
    from cottention.generation import load_model_and_tokenizer

    task = glue_task(args.task)
    model, tokenizer = load_model_and_tokenizer(args.model, "classifier", device=args.device)
    max_length = _max_length(args, Path(args.model).parent)
    scores = score_glue_model(model, tokenizer, task, args.data, max_length=max_length, batch_size=args.batch_size)
    if args.json:
        print(json.dumps({"model": args.model, "task": task.name, "splits": _as_dict(scores)}, indent=2))
    else:
        for split, found in scores.items():
            for label, values in (("official", found.official), ("as published", found.as_published)):
                print(f"{split} ({label}): " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    if args.submission:
        _submit(args, task, model, tokenizer, max_length)


def _runs(args: Namespace) -> None:
    from cottention.data.glue_tasks import GLUE_TASKS
    from cottention.evaluation.glue_table import glue_tables, read_glue_run

    if args.submission and len(args.runs) > 1:
        raise SettingsError(f"--submission needs one run; got {len(args.runs)}")
    tables = glue_tables([read_glue_run(folder) for folder in args.runs])
    text = tables.markdown()
    print(json.dumps(tables.to_dict(), indent=2) if args.json else text, end="\n" if args.json else "")
    if args.markdown:
        write_text(args.markdown, text)
    if args.submission:
        from cottention.generation import load_model_and_tokenizer

        for name, task in GLUE_TASKS.items():
            folder = Path(args.runs[0]) / name
            if (folder / "model").is_dir():
                model, tokenizer = load_model_and_tokenizer(folder / "model", "classifier", device=args.device)
                _submit(args, task, model, tokenizer, _max_length(args, folder))


def _submit(args: Namespace, task: Any, model: Any, tokenizer: Any, max_length: int) -> None:
    import sys

    from cottention.evaluation.glue_model import write_submission

    for path in write_submission(
        model,
        tokenizer,
        task,
        args.data,
        Path(args.submission),
        max_length=max_length,
        batch_size=args.batch_size,
    ):
        print(f"wrote {path}", file=sys.stderr if args.json else sys.stdout)


def _max_length(args: Namespace, run_dir: Path) -> int:
    """What the model was trained with, when it lies in its run, so that its rows are cut at the same place."""
    if args.max_length is not None:
        return args.max_length
    try:
        return int(json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))["max_length"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _DEFAULT_LENGTH


def _as_dict(scores: dict[str, GlueScores]) -> dict[str, Any]:
    return {split: {"official": found.official, "as_published": found.as_published} for split, found in scores.items()}
