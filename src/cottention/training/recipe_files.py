"""Recipes as files and flags: dataclass defaults < YAML < flags.

A recipe's YAML has a line `arch: gpt` (or bert) and any of the five sections; what it leaves out keeps its default.
`--config` takes the name of a packaged recipe or a file. jsonargparse reads the values and checks their types.

    recipe = load_recipe("quickstart_gpt", {"training.max_steps": 200})
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from cottention.errors import SettingsError, check_known_keys, did_you_mean
from cottention.training.plain_yaml import read_yaml, shown
from cottention.training.recipe import RECIPE_CLASSES, Recipe

_SUFFIXES = (".yaml", ".yml")
# Settings of speed and memory: a run goes on with other ones, after an out-of-memory for instance, on other machines.
_CHANGES_NO_NUMBER = {
    "training": frozenset(
        (
            "micro_batch_size",
            "gradient_checkpointing",
            "compile",
            "fused_loss",
            "unpadded",
            "save_total_limit",
            "report_to",
        )
    ),
    "parallelism": frozenset(("data", "shard", "sequence")),
}


class RecipeParser(jsonargparse.ArgumentParser):
    """A parser with one flag per setting of a recipe, and `--config`, which flags override wherever it stands."""

    def __init__(self, *, recipe_class: type[Recipe], **options: Any) -> None:
        # The help of a flag is the docstring under its field.
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
        # --print_config would print what --config does not take; a run directory holds its resolved recipe.
        super().__init__(**{"exit_on_error": False, "allow_abbrev": False, "print_config": None, **options})
        self.recipe_class = recipe_class
        self.add_argument(
            "--config",
            metavar="NAME_OR_FILE",
            action=_RecipeFile,
            help=f"Recipe to start from: a YAML file or one of {', '.join(packaged_recipes(recipe_class.arch))}.",
        )
        self.add_class_arguments(recipe_class)
        for section in dataclasses.fields(recipe_class):
            # jsonargparse also offers `--model FILE`, a second way to do what --config does, without its checks.
            self._option_string_actions.pop(f"--{section.name}").help = argparse.SUPPRESS

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> jsonargparse.Namespace:  # type: ignore[override]
        """Parse as usual, with the recipe's file read first."""
        if args is not None:
            args = _config_first(self._spelled(args))
        return super().parse_args(args, *rest, **options)

    def _spelled(self, args: Sequence[str]) -> list[str]:
        """Spell options as they are defined, by - or _, and join what several words give to a setting into a list."""
        defined = {name.replace("-", "_"): name for name in self._option_string_actions}
        spelled: list[str] = []
        words = list(args)
        while words:
            option, equals, value = words.pop(0).partition("=")
            option = defined.get(option.replace("-", "_"), option) if option.startswith("--") else option
            if "." not in option or option not in self._option_string_actions or equals:
                spelled.append(f"{option}{equals}{value}")
                continue
            values = []
            while words and not _is_option(words[0]):
                values.append(words.pop(0))
            spelled += [option, *values] if len(values) < 2 else [option, f"[{', '.join(map(_as_yaml, values))}]"]
        return spelled

    def recipe(self, namespace: jsonargparse.Namespace) -> Recipe:
        """Build the recipe from what was parsed.

        Raises:
            SettingsError: two values do not go together, or one is out of its range.
        """
        return recipe_from_dict(self.recipe_class, namespace.as_dict())


class _RecipeFile(jsonargparse.ActionConfigFile):  # pyright: ignore[reportPrivateImportUsage]
    """`--config`: finds the file, checks its keys, hands its sections to jsonargparse."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        sections = read_recipe_file(find_recipe(values), parser.recipe_class.arch)
        super().__call__(parser, cfg, yaml.safe_dump(sections), option_string)


def packaged_recipes(arch: str | None = None) -> list[str]:
    """Names of the pretraining recipes that come with the package, all or those of one architecture."""
    folder = resources.files("cottention") / "recipes"
    recipes = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in recipes
        if f"\narch: {arch or ''}" in entry.read_text(encoding="utf-8")
    )


def find_recipe(name_or_file: str | Path) -> Path:
    """Return the file of a recipe.

    Args:
        name_or_file: a packaged recipe's name, or the path of a YAML file.

    Raises:
        SettingsError: neither exists; the message lists the packaged names.
    """
    given = str(name_or_file)
    if given in packaged_recipes():
        return Path(str(resources.files("cottention") / "recipes" / f"{given}.yaml"))
    path = Path(given).expanduser()
    if path.is_file():
        return path
    names = packaged_recipes()
    looks_like_file = path.suffix in _SUFFIXES or len(path.parts) > 1
    what = f"recipe file {given!r} does not exist" if looks_like_file else f"no recipe is named {given!r}"
    raise SettingsError(f"{what}{did_you_mean(path.stem, names)}; packaged recipes: {', '.join(names)}")


def read_recipe_file(path: Path, arch: str | None = None) -> dict[str, Any]:
    """Read the sections of a recipe's YAML; the types of their values are not checked yet.

    Args:
        path: the file.
        arch: "gpt" or "bert", what the recipe has to be; None takes either and keeps the key `arch` in the result.

    Raises:
        SettingsError: not YAML, an unknown key, or a recipe of the other architecture.
    """
    content = read_yaml(path, f"recipe {path}")
    if not isinstance(content, dict):
        got = "nothing" if content is None else f"a {type(content).__name__}"
        raise SettingsError(f"recipe {path} must hold sections of `name: value` lines; got {got}")
    own = content.get("arch", arch)
    if not isinstance(own, str) or own not in RECIPE_CLASSES:
        raise SettingsError(f"recipe {path} must say `arch: gpt` or `arch: bert`; got {shown(own)}")
    if arch is not None and own != arch:
        raise SettingsError(f"recipe {path} is for {own}, not for {arch}: use `cottention pretrain {own}`")
    # A section all of whose lines are comments is null to YAML.
    sections = {key: {} if value is None else value for key, value in content.items() if key != "arch"}
    check_sections(RECIPE_CLASSES[own], sections, str(path))
    return sections if arch is not None else {**sections, "arch": own}


def check_sections(recipe_class: type[Recipe], content: Mapping[str, Any], where: str) -> None:
    """Refuse a section or a key that the recipe does not have.

    Raises:
        SettingsError: with the closest known name.
    """
    sections = {section.name: section.default_factory for section in dataclasses.fields(recipe_class)}
    check_known_keys(content, ["arch", *sections], f"recipe {where}")
    for name, values in content.items():
        if not isinstance(values, Mapping):
            raise SettingsError(
                f"section {name!r} of recipe {where} must hold `name: value` lines; got {shown(values)}"
            )
        known = [setting.name for setting in dataclasses.fields(getattr(recipe_class(), name))]
        check_known_keys(values, known, f"section {name!r} of recipe {where}")


def load_recipe(name_or_file: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe without the command line.

    Args:
        name_or_file: a packaged recipe's name, or the path of a YAML file.
        overrides: values for single settings, e.g. {"training.max_steps": 200}.

    Raises:
        SettingsError: the recipe is missing, or has an unknown key, a wrong type or a value out of range.
    """
    content = read_recipe_file(find_recipe(name_or_file))
    recipe_class = RECIPE_CLASSES[content.pop("arch")]
    for key, value in (overrides or {}).items():
        section, _, name = key.partition(".")
        content[section] = {**content.get(section, {}), name: value}
    check_sections(recipe_class, content, str(name_or_file))
    parser = RecipeParser(recipe_class=recipe_class)
    try:
        return parser.recipe(parser.parse_object(content))
    except argparse.ArgumentError as error:
        raise SettingsError(f"recipe {name_or_file}: {' '.join(str(error).split())}") from error


def recipe_from_dict(recipe_class: type[Recipe], content: Mapping[str, Any]) -> Recipe:
    """Build a recipe from nested dicts with values of the right types; other keys are left out."""
    sections = {}
    for section in dataclasses.fields(recipe_class):
        settings_class = type(getattr(recipe_class(), section.name))
        values = dict(content.get(section.name) or {})
        sections[section.name] = settings_class(
            **{name: tuple(value) if name == "betas" else value for name, value in values.items()}
        )
    return recipe_class(**sections)


def replace_settings(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with single settings changed, all at once, e.g. {"training.max_steps": 200}."""
    by_section: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        by_section.setdefault(section, {})[name] = value
    sections = {name: dataclasses.replace(getattr(recipe, name), **values) for name, values in by_section.items()}
    return dataclasses.replace(recipe, **sections)


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML that `--config` accepts again, every setting spelled out."""
    content = dataclasses.asdict(recipe)
    content["optimizer"]["betas"] = list(content["optimizer"]["betas"])
    return yaml.safe_dump({"arch": recipe.arch, **content}, sort_keys=False, allow_unicode=True)


def differing_setting(ours: Recipe, theirs: Recipe) -> str | None:
    """Name the first setting in which the numbers of two recipes' runs differ, with both values; None: in none."""
    if ours.arch != theirs.arch:
        return f"arch ({theirs.arch} there, {ours.arch} now)"
    mine, other = dataclasses.asdict(ours), dataclasses.asdict(theirs)
    for section, values in mine.items():
        for name, value in values.items():
            if value != other[section][name] and name not in _CHANGES_NO_NUMBER.get(section, ()):
                return f"{section}.{name} ({other[section][name]} there, {value} now)"
    return None


def _is_option(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit() and word != "-"


def _as_yaml(word: str) -> str:
    """A number as it is, anything else as a quoted text."""
    try:
        float(word)
    except ValueError:
        return json.dumps(word)
    return word


def _config_first(args: Sequence[str]) -> list[str]:
    """Move `--config X` to the front: jsonargparse lets whatever comes later win, and flags should win."""
    first: list[str] = []
    rest: list[str] = []
    words = iter(args)
    for word in words:
        if word == "--config":
            first += [word, *(value for value in [next(words, None)] if value is not None)]
        elif word.startswith("--config="):
            first.append(word)
        else:
            rest.append(word)
    return first + rest
