"""`cottention completion` prints what lets a shell finish commands, options and choices."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cottention.cli.main import COMMANDS, main

_TRY = """source "$1"; shift
COMP_WORDS=(cottention "$@"); COMP_CWORD=$#; _shtab_cottention; echo "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "bash"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0
    return path


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ([""], set(COMMANDS)),
        (["rec"], {"recipes"}),
        (["evaluate", ""], {"perplexity", "glue", "harness"}),
        (["pretrain", "gpt", "--training.max_st"], {"--training.max_steps"}),
        (["bench", "attention", "--head-d"], {"--head-dims"}),
    ],
)
def test_bash_finishes_what_was_begun(script: Path, words: list[str], completions: set[str]) -> None:
    command = ["bash", "-c", _TRY, "bash", str(script), *words]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert completions <= set(found)
    assert all(each.startswith(words[-1]) for each in found)


def test_another_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 2
    assert capsys.readouterr().err.strip() == (
        "cottention completion: error: shell must be one of bash, zsh, tcsh; got 'fish'"
    )
