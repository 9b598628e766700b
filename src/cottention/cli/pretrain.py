"""`cottention pretrain gpt|bert`: train a model by a recipe.

cottention pretrain gpt --config quickstart_gpt --training.max_steps 500 --output-dir runs/mine
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from cottention.cli._help import help_options
from cottention.cli._process import rank
from cottention.errors import SettingsError
from cottention.training.recipe import RECIPE_CLASSES
from cottention.training.recipe_files import RecipeParser, find_recipe, read_recipe_file, recipe_from_dict

if TYPE_CHECKING:
    from cottention.training.pretraining import PretrainResult
    from cottention.training.recipe import Recipe

_DESCRIPTION = """Pretrain a GPT (next token) or a BERT (masked tokens) by a recipe.

Settings come from the defaults (the published run), then --config, then single flags. The same command on the same
directory continues a run that was stopped or killed."""


def build_parser() -> jsonargparse.ArgumentParser:
    """Make the parser: one subcommand per architecture, one flag per setting of its recipe."""
    return _build(RECIPE_CLASSES)


def parser_for(words: Sequence[str]) -> jsonargparse.ArgumentParser:
    """The parser of these words: flags of the other architecture take a tenth of a second to make."""
    return _build(words[:1])


def _build(wanted: Container[str]) -> jsonargparse.ArgumentParser:
    settings = {"description": _DESCRIPTION, "exit_on_error": False, **help_options("pretrain")}
    parser = _PretrainParser(prog="cottention pretrain", **settings)
    subcommands = parser.add_subcommands(dest="arch", required=True)
    for arch, recipe_class in RECIPE_CLASSES.items():
        if arch not in wanted:
            subcommands.add_subcommand(arch, jsonargparse.ArgumentParser(), help=f"pretrain a {arch.upper()}")
            continue
        shown = help_options(f"pretrain {arch}")
        subparser = RecipeParser(recipe_class=recipe_class, description=_DESCRIPTION, **shown)
        subparser.add_argument("--output-dir", default=f"runs/{arch}", help="The run directory.")
        subparser.add_argument("--overwrite", action="store_true", help="Delete the run in the directory first.")
        subparser.add_argument(
            "--extend",
            action="store_true",
            help="Let the run in the directory go on to a larger training.max_steps; its model is kept as model-STEPS.",
        )
        subparser.add_argument(
            "--init-from",
            metavar="MODEL",
            help="Start from the weights of this model directory, and with its tokenizer.",
        )
        subparser.add_argument(
            "--dry-run",
            action="store_true",
            help="Say what the run would be (parameters, memory, steps, time) and write nothing.",
        )
        subparser.add_argument("--json", action="store_true", help="Print the result as one JSON object.")
        subcommands.add_subcommand(arch, subparser, help=f"pretrain a {arch.upper()}")
    return parser


class _PretrainParser(jsonargparse.ArgumentParser):
    """Says which architecture is meant where a recipe comes without it."""

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> jsonargparse.Namespace:  # type: ignore[override]
        """Parse as usual.

        Raises:
            SettingsError: options come first; the message has the words that were meant.
        """
        words = list(args or ())
        if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
            configs = [value for word, value in itertools.pairwise(words) if word == "--config"]
            configs += [word.partition("=")[2] for word in words if word.startswith("--config=")]
            if not configs:
                raise SettingsError(f"say which first, before the options: {', '.join(RECIPE_CLASSES)}")
            arch = read_recipe_file(find_recipe(configs[0]))["arch"]
            raise SettingsError(f"say which first: cottention pretrain {arch} {shlex.join(words)}")
        return super().parse_args(args, *rest, **options)


def run(args: jsonargparse.Namespace) -> int:
    """Train, then print where the model is and how good it is."""
    given = args[args.arch]
    content = given.as_dict()
    if given.init_from is not None:
        _start_from(content, given.init_from)
    recipe = recipe_from_dict(RECIPE_CLASSES[args.arch], content)
    _check_sources(recipe)
    if given.dry_run:
        return _dry_run(recipe, given)
    from cottention.training.pretraining import pretrain  # seconds of torch, after the settings have been checked

    result = pretrain(recipe, output_dir=given.output_dir, overwrite=given.overwrite, extend=given.extend)
    if rank() != 0:
        return result.exit_code
    if given.json:
        print(json.dumps(result.as_dict()))
    elif result.model_dir is not None:
        print(_summary(args.arch, result))
    return result.exit_code


def _start_from(content: dict[str, Any], source: str) -> None:
    """Set what `--init-from` stands for."""
    path = Path(source).expanduser()
    name = str(path.resolve()) if path.is_dir() else source  # the run goes on from wherever the command is typed
    content["training"]["init_from"] = name
    if content["data"]["tokenizer"] == "train":
        content["data"]["tokenizer"] = name


def _dry_run(recipe: Recipe, given: jsonargparse.Namespace) -> int:
    if rank() != 0:
        return 0
    from cottention.training.dry_run import dry_run
    from cottention.training.pretraining import check_run_directory
    from cottention.training.starting import open_start

    options = {"overwrite": given.overwrite, "extend": given.extend}
    if not check_run_directory(recipe, Path(given.output_dir), **options):
        open_start(recipe)  # says what does not fit
    found = dry_run(recipe)
    print(json.dumps(found.as_dict()) if given.json else found.described())
    return 0


def _check_sources(recipe: Recipe) -> None:
    """Look for the text before seconds of torch.

    Raises:
        DataError: it is not there.
    """
    named = [recipe.data.source, recipe.data.validation]
    for source in (one for each in named for one in (each if isinstance(each, list) else [each])):
        if isinstance(source, str) and not source.startswith("sotu") and not Path(source).expanduser().exists():
            from cottention.data.source_files import files_of  # which says what is there instead

            files_of(source)


def _summary(arch: str, result: PretrainResult) -> str:
    lines = [f"model: {result.model_dir}"]
    if "val_loss" in result.metrics:
        figures = (
            f"held out: {result.metrics['val_loss']:.4f} nats per token, perplexity {result.metrics['val_ppl']:.2f}"
        )
        if "val_nats_per_byte" in result.metrics:
            figures += f", {result.metrics['val_nats_per_byte']:.4f} nats per byte"
        if "val_accuracy" in result.metrics:
            figures += f", {result.metrics['val_accuracy']:.1%} of the masked tokens right"
        if "val_nsp_accuracy" in result.metrics:
            figures += f", {result.metrics['val_nsp_accuracy']:.1%} of the next sentences told right"
        lines.append(figures)
    lines.append(f"curve: {result.run_dir / 'loss_curve.png'}")
    prompt = "generate --model {} --prompt 'The people'"
    if arch == "bert":
        prompt = "fill-mask --model {} 'The [MASK] of the people.'"
    lines.append(f"next:  cottention {prompt.format(shlex.quote(str(result.model_dir)))}")
    return "\n".join(lines)
