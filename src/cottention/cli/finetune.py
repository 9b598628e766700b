"""cottention finetune: trains a pretrained BERT on tasks of GLUE, once per seed.

cottention finetune --model runs/bert/model --task cola --data glue/ --output-dir runs/glue --seeds 1,2,3
"""

from __future__ import annotations

import dataclasses
import json
import shlex
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
    from cottention.training.finetuning import FinetuneResult

_DESCRIPTION = """Fine-tune a pretrained BERT on tasks of GLUE.

The best epoch's model of the best seed is kept, by the task's official metric on the dev rows. Settings come from the
defaults (the published ones), then --config, then single flags. The same command continues a run that was stopped."""


def build_parser() -> jsonargparse.ArgumentParser:
    """Make the parser."""
    parser = new_parser("finetune", _DESCRIPTION, print_config=None)
    add = parser.add_argument
    add("--config", action=_SettingsFile, metavar="NAME_OR_FILE", help="YAML with settings, or `glue`: the published")
    add("--model", required=True, metavar="DIR", help="directory of a pretrained BERT, or OWNER/NAME on the Hub")
    add("--task", required=True, help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, several with commas, or all")
    add("--data", default="hub", metavar="DIR", help="GLUE's folder, one task's own folder, or hub (the default)")
    add("--output-dir", default="runs/glue", metavar="DIR", help="each task's run goes to DIR/TASK")
    add("--seeds", default="0", metavar="N,N", help="one training per seed")
    add("--overwrite", action="store_true", help="delete the runs of these tasks in the directory first")
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
    from cottention.data.glue_tasks import GLUE_TASKS, glue_task

    tasks = list(GLUE_TASKS) if args.task == "all" else [glue_task(name.strip()).name for name in args.task.split(",")]
    from cottention.training.finetuning import finetune  # seconds of torch, after the settings have been checked

    results = []
    for task in tasks:
        result = finetune(
            args.model,
            task=task,
            data=args.data,
            output_dir=args.output_dir,
            settings=settings,
            seeds=seeds,
            overwrite=args.overwrite,
        )
        if result.stopped_by is not None:
            return result.exit_code
        results.append(result)
        if not args.json:
            print(_summary(task, result), flush=True)
    if args.json:
        print(json.dumps([result.metrics | {"model_dir": str(result.model_dir)} for result in results], indent=2))
    else:
        print(f"next: cottention evaluate glue --runs {shlex.quote(args.output_dir)}")
    return 0


def _seeds(given: str) -> list[int]:
    try:
        return [int(word) for word in str(given).split(",")]
    except ValueError:
        raise SettingsError(f"--seeds must be numbers with commas between them; got {given!r}") from None


def _summary(task: str, result: FinetuneResult) -> str:
    best = result.metrics["best"]
    entry = next(each for each in result.metrics["seeds"] if each["seed"] == best["seed"])
    splits = entry["epochs"][best["epoch"] - 1]["splits"]
    figures = "; ".join(
        f"{split} " + ", ".join(f"{name} {value:.4f}" for name, value in scores["official"].items())
        for split, scores in splits.items()
    )
    return f"{task}: {figures} (seed {best['seed']}, epoch {best['epoch']}): {result.model_dir}"
