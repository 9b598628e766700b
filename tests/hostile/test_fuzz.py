"""Random command lines, and model directories damaged at random, under the promises of test_hostile.py.

`make fuzz` tries thousands of each (COTTENTION_FUZZ_EXAMPLES); the slow tests some dozens, always the same.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cottention.cli.main import COMMANDS
from tests.hostile.cases import FILL, GENERATE, TEXTS, VALUES
from tests.hostile.test_hostile import honest  # noqa: F401
from tests.hostile.warm import run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

EXAMPLES = int(os.environ.get("COTTENTION_FUZZ_EXAMPLES", "40"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="COTTENTION_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
# These do minutes of work when nothing is wrong with what they are given.
_LONG = {"quickstart", "bench", "pretrain", "playground"}
_folders = itertools.count()


def options() -> list[str]:
    """Every option and subcommand of every command."""
    found: set[str] = set()

    def walk(parser: Any) -> None:
        for action in parser._actions:
            found.update(action.option_strings)
            if isinstance(action.choices, Mapping):
                for name, subparser in action.choices.items():
                    found.add(name)
                    walk(subparser)

    for module, _ in COMMANDS.values():
        walk(import_module(module).build_parser())
    return sorted(found - {"--help", "-h"})


def words() -> st.SearchStrategy[list[str]]:
    values = [
        "gpt",
        "bert",
        "run",
        "text.txt",
        "-",
        "--",
        "",
        "0",
        "-1",
        "1e99",
        "nan",
        "[",
        "{}",
        "~",
        "*",
        "/",
        "a=b",
        "\udcff",
    ]
    text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
    word = st.one_of(st.sampled_from(options()), st.sampled_from(values), text)
    starts = [[name] for name in COMMANDS if name not in _LONG]
    starts += [
        GENERATE,
        FILL,
        ["pretrain", "gpt", "--config", "run.yaml", "--output-dir", "run", "--training.max_steps"],
    ]
    return st.builds(lambda start, rest: [*start, *rest], st.sampled_from(starts), st.lists(word, max_size=6))


@FUZZ
@given(words=words())
def test_a_random_command_line_ends_well(words: list[str], honest: Path, tmp_path_factory: Any) -> None:  # noqa: F811
    folder = tmp_path_factory.mktemp("fuzz") / str(next(_folders))
    shutil.copytree(honest, folder)
    outcome = run(words, folder)
    shutil.rmtree(folder)
    assert outcome.problem() is None, (words, outcome.problem(), outcome.err[-2000:])


@FUZZ
@given(seed=st.integers(0, 2**32))
def test_a_model_directory_damaged_at_random_ends_well(seed: int, honest: Path, tmp_path_factory: Any) -> None:  # noqa: F811
    folder = tmp_path_factory.mktemp("fuzz") / str(next(_folders))
    shutil.copytree(honest, folder)
    chance = random.Random(seed)
    model, command = chance.choice([("gpt", GENERATE), ("bert", FILL)])
    path = chance.choice(
        sorted(path for path in (folder / model).iterdir() if path.suffix in (".json", ".safetensors"))
    )
    path.write_bytes(damaged(path.read_bytes(), chance))
    outcome = run(command, folder)
    shutil.rmtree(folder)
    assert outcome.problem() is None, (path.name, outcome.problem(), outcome.err[-2000:])


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Cut, some bytes changed, a part doubled, or, of JSON, one value replaced."""
    kind = chance.randrange(5)
    at, to = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[at:to] * 2 + content[to:]
    if kind == 2:
        text = chance.choice(list(TEXTS.values()))
        return content[:at] + (text if isinstance(text, bytes) else text.encode())[:1000] + content[to:]
    if kind == 3 and content[:1] == b"{":
        described = json.loads(content)
        replace_one(described, chance)
        return json.dumps(described).encode()
    changed = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(min(len(changed), 2000))] = chance.randrange(256)
    return bytes(changed)


def replace_one(described: Any, chance: random.Random) -> None:
    """Replace a value somewhere inside, or what is there by name."""
    while True:
        keys = list(described) if isinstance(described, dict) else list(range(len(described)))
        if not keys:
            return
        key = chance.choice(keys)
        if not isinstance(described[key], (dict, list)) or not described[key] or chance.random() < 0.3:
            described[key] = chance.choice(list(VALUES.values()))
            return
        described = described[key]
