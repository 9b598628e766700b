"""`cottention recipes`: the recipes that come with the package.

cottention recipes                              # names, and what each one is for
cottention recipes show gpt_small_cosine > mine.yaml
"""

from __future__ import annotations

import re

import jsonargparse

from cottention.cli.main import new_parser
from cottention.errors import SettingsError, did_you_mean
from cottention.training.recipe_files import find_recipe, packaged_recipes


def build_parser() -> jsonargparse.ArgumentParser:
    """The words of `cottention recipes`."""
    parser = new_parser("recipes", "List the recipes of the package, or print one, for `pretrain --config`.")
    parser.add_argument("action", nargs="?", choices=["list", "show"], default="list", help="what to do")
    parser.add_argument("name", nargs="?", help="the recipe to show")
    return parser


def run(args: jsonargparse.Namespace) -> None:
    """Print names, or the text of one file."""
    if args.action == "show":
        if args.name is None:
            raise SettingsError(f"recipes show needs a name, one of {', '.join(packaged_recipes())}")
        if args.name not in packaged_recipes():
            known = did_you_mean(args.name, packaged_recipes())
            raise SettingsError(f"no recipe is named {args.name!r}{known}")
        print(find_recipe(args.name).read_text(encoding="utf-8"), end="")
        return
    if args.name is not None:
        raise SettingsError(f"recipes list takes no name; got {args.name!r}: did you mean `recipes show {args.name}`?")
    names = packaged_recipes()
    width = max(map(len, names)) + 2
    for name in names:
        print(f"{name:<{width}}{_purpose(find_recipe(name).read_text(encoding='utf-8'))}".rstrip())


def _purpose(recipe: str) -> str:
    """What the comment at a recipe's head says first."""
    lines = []
    for line in recipe.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return re.split(r"[.:] ", " ".join(lines))[0].removesuffix(".")
