"""The process of a command: streams closed or full, Ctrl-C while it imports, one voice of several processes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType

import pytest

from cottention.cli import main as cli
from tests.subprocesses import run_python

TORCH = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A command `try` whose run() a test replaces."""
    module = ModuleType("cottention.cli.try")
    module.build_parser = lambda: cli.new_parser("try", "Try something.")  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "cottention.cli.try", module)
    monkeypatch.setitem(cli.COMMANDS, "try", ("cottention.cli.try", "try something"))
    return module


def fails_with(command: ModuleType, error: BaseException) -> None:
    def fail(_args: object) -> None:
        raise error

    command.run = fail  # pyright: ignore[reportAttributeAccessIssue]


def in_shell(line: str) -> subprocess.CompletedProcess[str]:
    words = " ".join([sys.executable, "-m", "cottention", line])
    return subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("module", ["cottention", "cottention.cli.main"])
def test_it_runs_as_a_module(module: str) -> None:
    ran = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout[:11], ran.stderr) == (0, "cottention ", "")


@pytest.mark.parametrize("words", ["--version", "--help", "recipes"])
def test_a_closed_stdout_is_one_line(words: str) -> None:
    ran = in_shell(f"{words} >&-")
    said = "cottention: error: stdout is closed, so results have nowhere to go; > /dev/null drops them\n"
    assert (ran.returncode, ran.stderr) == (2, said)


def test_closed_stdin_and_stderr_do_no_harm() -> None:
    assert in_shell("--version <&-").returncode == 0
    ran = in_shell("nonsense 2>&-")
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["--version", "--help"])
def test_a_full_stdout_is_one_line(words: str) -> None:
    ran = in_shell(f"{words} > /dev/full")
    assert (ran.returncode, ran.stderr) == (2, "cottention: error: stdout: No space left on device\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "cottention: error: unknown command '' (see `cottention --help`)"),
        (["generate", ""], "cottention generate: error: unexpected argument ''"),
        (["pretrain", "gpt", ""], "cottention pretrain: error: unexpected argument ''"),
        (["doctor", " "], "cottention doctor: error: unexpected argument ''"),
        (["doctor", "", " "], "cottention doctor: error: unexpected argument ''"),
        (["doctor", "a\0b"], "cottention: error: an argument must hold no zero byte; got 'a\\x00b'"),
    ],
)
def test_an_empty_argument_is_one_line(words: list[str], message: str, capsys) -> None:
    assert cli.main(words) == 2
    assert capsys.readouterr() == ("", f"{message}\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "v.npy"), "v.npy: Read-only file system"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "*"), "*: File name too long"),
        (
            UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"),
            "names of files and texts must be UTF-8; got 'a\\udcff'",
        ),
        (MemoryError(), "not enough memory; smaller batches or a smaller model need less (MemoryError)"),
        (
            RuntimeError(TORCH),
            f"not enough memory; smaller batches or a smaller model need less ({TORCH})",
        ),
        (type("PanicException", (BaseException,), {})("no entry"), "the tokenizer cannot encode this text: no entry"),
    ],
)
def test_what_the_machine_lacks_is_one_line(command: ModuleType, error: BaseException, message: str, capsys) -> None:
    fails_with(command, error)
    assert cli.main(["try"]) == 2
    assert capsys.readouterr() == ("", f"cottention try: error: {message}\n")


def test_a_bug_of_a_library_keeps_its_traceback(command: ModuleType) -> None:
    for bug in (OSError("no number"), RuntimeError("shape mismatch"), GeneratorExit()):
        fails_with(command, bug)
        with pytest.raises(type(bug)):
            cli.main(["try"])


@pytest.mark.parametrize("first", ["import time\ntime.sleep(30)\n", "while True: pass\n"])
def test_ctrl_c_while_a_command_imports_is_one_line(first: str, tmp_path: Path) -> None:
    """A module takes for ever to be imported, as torch seems to."""
    (tmp_path / "slow.py").write_text(f"import pathlib\npathlib.Path('started').touch()\n{first}")
    code = """
import sys
from types import ModuleType
from cottention.cli import main as cli
module = ModuleType("cottention.cli.try")
module.build_parser = lambda: cli.new_parser("try", "Try.")
def run(args):
    import slow
module.run = run
sys.modules["cottention.cli.try"] = module
cli.COMMANDS["try"] = ("cottention.cli.try", "try")
sys.argv = ["cottention", "try"]
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.entry_point()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    until = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "cottention: error: interrupted\n")


def test_a_text_is_utf_8_whatever_the_locale() -> None:
    """In a POSIX locale Python takes arguments for ASCII; bytes beyond it come as lone surrogates."""
    code = """
        from cottention.cli._inputs import text_of
        print(ascii(text_of(sys.argv[1])), ascii(text_of("na\\udcff")), sys.getfilesystemencoding())
    """
    ran = subprocess.run(
        [sys.executable, "-c", "import sys\n" + textwrap.dedent(code), "naïve 東京"],
        env={**os.environ, "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == ["'na\\xefve", "\\u6771\\u4eac'", "'na\\udcff'", "ascii"]


def test_one_of_several_processes_says_what_is_wrong_and_torchrun_repeats_it(tmp_path: Path) -> None:
    """The others wait for the launcher to end them, and speak only if it does not."""
    code = """
        import cottention.cli._process as process
        from cottention.cli.main import main
        process.time.sleep = lambda seconds: print(f"waited {seconds:g}")
        sys.exit(main(["pretrain", "gpt", "--data.sequence_length", "0"]))
    """
    line = "cottention pretrain: error: data.sequence_length must be at least 2; got 0"
    for number, waited in ((0, ""), (1, "waited 5\n")):
        os.environ.update({"RANK": str(number), "TORCHELASTIC_ERROR_FILE": str(tmp_path / f"{number}.json")})
        try:
            ran = run_python(code, succeed=False)
        finally:
            del os.environ["RANK"], os.environ["TORCHELASTIC_ERROR_FILE"]
        assert (ran.returncode, ran.stdout, ran.stderr) == (2, waited, f"{line}\n")
        assert json.loads((tmp_path / f"{number}.json").read_text())["message"]["message"] == line
