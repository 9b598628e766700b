"""docs/tutorial.md, literally: every command in its order, in an empty directory; only the minutes are fewer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_PAGE = Path(__file__).resolve().parents[1] / "docs/tutorial.md"


def _commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", _PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [re.sub(r"--minutes \d+", "--minutes 0.2", block) for block in blocks]


def test_the_page_has_commands() -> None:
    text = "".join(_commands())
    for command in ("quickstart", "generate", "compare", "fill-mask", "finetune", "classify", "embed", "search"):
        assert f"cottention {command} " in text


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    script = tools / "cottention"  # the one of this environment, and of this tree
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cottention "$@"\n')
    script.chmod(0o755)
    home = tmp_path / "tutorial"
    home.mkdir()
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    for block in _commands():
        ran = subprocess.run(
            ["sh", "-e", "-c", block], cwd=home, env=environment, capture_output=True, text=True, timeout=600
        )
        assert ran.returncode == 0, f"{block}\n{ran.stderr}"
    assert (home / "compare.png").stat().st_size > 10_000
