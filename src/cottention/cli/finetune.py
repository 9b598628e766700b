"""cottention finetune: trains a pretrained model on labels of one's own, or a BERT on tasks of GLUE, once per seed.

cottention finetune --model runs/bert/model --data train.csv --text-column review --label-column stars
cottention finetune --model runs/bert/model --task cola --data glue/ --output-dir runs/glue --seeds 1,2,3
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import jsonargparse
import yaml

from cottention.cli.main import new_parser
from cottention.errors import SettingsError, check_known_keys
from cottention.training.finetune_settings import FinetuneSettings
from cottention.training.plain_yaml import read_yaml, shown

if TYPE_CHECKING:
    from cottention.training.finetuning import FinetuneResult, FinetuneRun

_DESCRIPTION = """Fine-tune a pretrained BERT or GPT on labels of your own, or a BERT on tasks of GLUE (--task).

The best epoch's model of the best seed is kept, by the dev rows. Settings come from the defaults (those published for
GLUE), then --config, then single flags. The same command continues a run that was stopped.

See docs/own-labels.md and docs/glue.md."""

_EXAMPLES = """
cottention finetune --model runs/bert/model --data train.csv --text-column review --label-column stars
cottention finetune --model runs/bert/model --data a.tsv --dev b.tsv --text-column question --text-pair-column answer
cottention finetune --model runs/bert/model --data movies.jsonl --label-column genres --label-type several
cottention finetune --model runs/bert/model --data train.conll --dev dev.conll
cottention finetune --model runs/bert/model --objective similarity --data a.tsv --text-column q --text-pair-column a
cottention finetune --model runs/bert/model --task cola,rte --data glue/ --seeds 1,2,3
cottention finetune --model runs/bert/model --task all --data glue/ --seeds 1,2,3 --dry-run
"""

_GLUE_DIR, _OWN_DIR = "runs/glue", "runs/finetuned"


def build_parser() -> jsonargparse.ArgumentParser:
    """Make the parser."""
    parser = new_parser("finetune", _DESCRIPTION, examples=_EXAMPLES, print_config=None)
    add = parser.add_argument
    add("--config", action=_SettingsFile, metavar="NAME_OR_FILE", help="YAML with settings, or `glue`: the published")
    add("--model", required=True, metavar="DIR", help="directory of a pretrained model, or OWNER/NAME on the Hub")
    add(
        "--data",
        default="hub",
        metavar="FILE",
        help="own rows: .csv, .tsv, .jsonl, .parquet, or .conll; with --task GLUE's folder, one task's own, or hub",
    )
    add("--dev", metavar="FILE", help="rows to measure on; without it a share of the others")
    add("--text-column", metavar="NAME", help="column of the text (default: text; of lists of words tokens)")
    add("--text-pair-column", metavar="NAME", help="column of the second text, for pairs")
    add(
        "--label-column",
        metavar="NAME",
        nargs="+",
        help="column of the label (default: label; of word tags tags); several of 0 and 1: a label each",
    )
    add(
        "--label-type",
        choices=["auto", "classes", "number", "several", "words"],
        default="auto",
        help="one of some classes, a number, several labels to a text, a tag to each word; auto: told by the column",
    )
    add("--label-separator", metavar="SIGN", help="what stands between several labels in one cell")
    add("--dev-share", type=float, default=0.1, metavar="X", help="share of the rows held out where there is no --dev")
    add("--license", metavar="NAME", help="of the weights, for the model's card (mit); without it none is claimed")
    add(
        "--objective",
        choices=["labels", "similarity"],
        default="labels",
        help="similarity: vectors of alike texts become alike, from pairs, or pairs with numbers (--label-column)",
    )
    add("--task", help="GLUE: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, several with commas, or all")
    add("--output-dir", metavar="DIR", help=f"the run (default: {_OWN_DIR}; with --task {_GLUE_DIR}/TASK)")
    add("--seeds", default="0", metavar="N,N", help="one training per seed")
    add("--overwrite", action="store_true", help="delete the runs of these tasks in the directory first")
    add(
        "--dry-run",
        action="store_true",
        help="say what the run would be (rows, parameters, memory, steps, time) and write nothing",
    )
    add("--json", action="store_true", help="print the results as JSON")
    _add_settings(parser)
    return parser


def _add_settings(parser: jsonargparse.ArgumentParser) -> None:
    """One option per setting, spelled as options are; its help is the docstring under the field."""
    from docstring_parser import parse_from_object

    types = get_type_hints(FinetuneSettings)
    helps = {each.arg_name: each.description for each in parse_from_object(FinetuneSettings).params}
    for setting in dataclasses.fields(FinetuneSettings):
        option, text = f"--{setting.name.replace('_', '-')}", helps[setting.name]
        if types[setting.name] is bool:
            parser.add_argument(option, action="store_true", help=text)
        else:
            parser.add_argument(option, type=types[setting.name], default=setting.default, help=text)


class _SettingsFile(jsonargparse.ActionConfigFile):  # pyright: ignore[reportPrivateImportUsage]
    """`--config`: finds the file and checks its keys."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        path = Path(values).expanduser()
        if values == "glue":
            path = Path(str(resources.files("cottention") / "recipes" / "glue.yaml"))
        elif not path.is_file():
            raise SettingsError(f"--config must be a file or `glue`; got {values!r}")
        content = read_yaml(path, str(path))
        if not isinstance(content, dict):
            raise SettingsError(f"{path} must hold `name: value` lines; got {shown(content)}")
        check_known_keys(content, FinetuneSettings().as_dict(), str(path))
        super().__call__(parser, cfg, yaml.safe_dump(content), option_string)


def run(args: jsonargparse.Namespace) -> int:
    """Train task after task; print where the models are and how good they are."""
    names = list(FinetuneSettings().as_dict())
    settings = FinetuneSettings(**{name: args[name] for name in names})
    seeds = _seeds(args.seeds)
    if args.task is None:
        return _own_data(args, settings, seeds)
    if args.objective != "labels":
        raise SettingsError(f"--objective {args.objective} goes with rows of one's own, --task with GLUE's; got both")
    for name in ("dev", "text_column", "text_pair_column", "label_column", "label_separator", "license"):
        if args[name] is not None:
            raise SettingsError(f"--{name.replace('_', '-')} goes with rows of one's own, --task with GLUE's; got both")
    return _glue(args, settings, seeds)


def _glue(args: jsonargparse.Namespace, settings: FinetuneSettings, seeds: list[int]) -> int:
    from cottention.data.glue_tasks import GLUE_TASKS, glue_task

    output_dir = args.output_dir or _GLUE_DIR
    tasks = list(GLUE_TASKS) if args.task == "all" else [glue_task(name.strip()).name for name in args.task.split(",")]
    # Seconds of torch, after the settings have been checked.
    from cottention.training.finetuning import task_run, train_seeds

    planned = partial(task_run, args.model, data=args.data, output_dir=output_dir, settings=settings)
    if args.dry_run:
        return _dry_run((planned(task=task) for task in tasks), args, seeds)
    results = []
    for task in tasks:
        result = train_seeds(planned(task=task), seeds=seeds, overwrite=args.overwrite)
        if result.stopped_by is not None:
            return result.exit_code
        results.append(result)
        if not args.json:
            print(_summary(task, result), flush=True)
    if args.json:
        print(json.dumps([result.metrics | {"model_dir": str(result.model_dir)} for result in results], indent=2))
    else:
        print(f"next: cottention evaluate glue --runs {shlex.quote(output_dir)}")
    return 0


def _own_data(args: jsonargparse.Namespace, settings: FinetuneSettings, seeds: list[int]) -> int:
    from cottention.training.own_data import OwnData

    if args.data == "hub":
        raise SettingsError("give --data FILE with rows of your own, or --task with a task of GLUE")
    rows = OwnData(
        data=args.data,
        dev=args.dev,
        text_column=args.text_column,
        text_pair_column=args.text_pair_column,
        label_column=tuple(args.label_column or ()),
        label_type=args.label_type,
        label_separator=args.label_separator,
        dev_share=args.dev_share,
        license=args.license,
    )
    alike = args.objective == "similarity"
    if alike and rows.text_pair_column is None:
        raise SettingsError("--objective similarity needs --text-pair-column: it learns from pairs of texts")
    rows.check_files(needs_labels=not alike)
    if alike:
        from cottention.training.similarity import similarity_run as planned
    else:
        from cottention.training.labelled import label_run as planned
    from cottention.training.finetuning import train_seeds

    run = planned(args.model, rows, output_dir=args.output_dir or _OWN_DIR, settings=settings)
    if args.dry_run:
        return _dry_run([run], args, seeds)
    result = train_seeds(run, seeds=seeds, overwrite=args.overwrite)
    if result.stopped_by is not None:
        return result.exit_code
    if args.json:
        print(json.dumps(result.metrics | {"model_dir": str(result.model_dir)}, indent=2))
        return 0
    from cottention.evaluation.labels import report

    if details := report(_best_scores(result)["dev"]):
        print(details, end="\n\n")
    print(_summary(Path(args.data).name, result))
    following = "embed" if alike else "classify"
    print(f"next: cottention {following} --model {shlex.quote(str(result.model_dir))} FILE")
    return 0


def _dry_run(runs: Iterable[FinetuneRun], args: jsonargparse.Namespace, seeds: list[int]) -> int:
    from cottention.training.dry_run import dry_run_finetuning
    from cottention.training.progress import duration

    found = []
    for run in runs:
        found.append(dry_run_finetuning(run, seeds=seeds, overwrite=args.overwrite))
        if not args.json:
            print(found[-1].described(), flush=True)
    if args.json:
        figures = [each.as_dict() for each in found]
        print(json.dumps(figures if args.task else figures[0], indent=2))
    elif len(found) > 1:
        print(f"all tasks: about {duration(sum(each.run_s for each in found))}")
    return 0


def _seeds(given: str) -> list[int]:
    try:
        return [int(word) for word in str(given).split(",")]
    except ValueError:
        raise SettingsError(f"--seeds must be numbers with commas between them; got {given!r}") from None


def _best_scores(result: FinetuneResult) -> dict[str, Any]:
    """Split -> scores, of the epoch that was kept."""
    best = result.metrics["best"]
    entry = next(each for each in result.metrics["seeds"] if each["seed"] == best["seed"])
    return entry["epochs"][best["epoch"] - 1]["splits"]


def _summary(task: str, result: FinetuneResult) -> str:
    best = result.metrics["best"]
    figures = "; ".join(
        f"{split} " + ", ".join(f"{name} {value:.4f}" for name, value in scores["official"].items())
        for split, scores in _best_scores(result).items()
    )
    return f"{task}: {figures} (seed {best['seed']}, epoch {best['epoch']}): {result.model_dir}"
