"""docs/tutorial.md and the README's walk, literally: every command in its order, in an empty directory.

Only the minutes are fewer.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
# What the README says is the reader's own.
_OWN_FILES = {
    "book.txt": "The ship left the harbour in the night. The captain had told nobody where she was bound.\n",
    "train.csv": "review,stars\n" + "We laughed all the way home.,5\nNever again.,1\nIt was long.,2\n" * 8,
    "new.csv": "review\nWe laughed a lot.\nNever.\n",
    "notes.txt": "The harbour was empty.\nA storm came up at sea.\nWe paid the bill.\n",
}


def _commands() -> list[str]:
    page = (_ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [re.sub(r"--minutes \d+", "--minutes 0.2", block) for block in blocks]


def _walk() -> list[str]:
    page = (_ROOT / "README.md").read_text(encoding="utf-8")
    block = page.partition("From nothing to a book asked")[2].split("```\n")[1]
    return [line.replace("quickstart", "quickstart --minutes 0.2") for line in block.splitlines()]


def _run(commands: list[str], folder: Path) -> list[str]:
    """What each printed."""
    tools = folder / "bin"
    tools.mkdir()
    script = tools / "cottention"  # the one of this environment, and of this tree
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cottention "$@"\n')
    script.chmod(0o755)
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    printed = []
    for command in commands:
        ran = subprocess.run(
            ["sh", "-e", "-c", command], cwd=home, env=environment, capture_output=True, text=True, timeout=600
        )
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"
        printed.append(ran.stdout)
    return printed


def test_the_page_has_commands() -> None:
    text = "".join(_commands())
    for command in ("quickstart", "generate", "compare", "fill-mask", "finetune", "classify", "embed", "search"):
        assert f"cottention {command} " in text


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(tmp_path: Path) -> None:
    _run(_commands(), tmp_path)
    assert (tmp_path / "home/compare.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_walk_of_the_readme_leads_from_nothing_to_a_search(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    for name, text in _OWN_FILES.items():
        (tmp_path / "home" / name).write_text(text)
    commands = _walk()
    assert len(commands) == 10
    printed = _run(commands, tmp_path)
    asked, labelled, found = printed[3], printed[7], printed[9]
    assert asked.strip()
    assert labelled.count('"label": ') == 2
    assert len(found.splitlines()) >= 3
