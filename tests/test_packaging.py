"""What `pip install` promises: a native library where there is a compiler, a working package where there is none."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

_REPOSITORY = Path(__file__).parents[1]
_NATIVE = Path("src/cottention/ops/native")
_TINY = 'extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))), reason="needs a C++ compiler"
)


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    """The functions of setup.py, without setting anything up."""
    spec = importlib.util.spec_from_file_location("setup_py", _REPOSITORY / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what is packaged, with one tiny source in place of the kernels."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(_REPOSITORY / name, folder)
    unwanted = shutil.ignore_patterns("*.egg-info", "__pycache__", "_kernels.*", "_build.json", "*.cpp", "*.h")
    shutil.copytree(_REPOSITORY / "src", folder / "src", ignore=unwanted)
    (folder / _NATIVE / "src").mkdir(exist_ok=True)
    (folder / _NATIVE / "src/answer.h").write_text("#define ANSWER 42\n")
    (folder / _NATIVE / "src/answer.cpp").write_text(f'#include "answer.h"\n{_TINY}')
    return folder


def run_in(folder: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=_environment(environment),
        capture_output=True,
        text=True,
        check=False,
    )


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Ours, without what CI asks of the build, and with the changes."""
    return {name: value for name, value in os.environ.items() if name != "COTTENTION_BUILD_NATIVE"} | dict(changes)


def build_in(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_in(folder, "setup.py", "--quiet", "build_ext", "--inplace", **environment)


def wheel_of(folder: Path, **environment: str) -> tuple[str, set[str]]:
    """The name of the wheel and the files of the package in it."""
    built = run_in(
        folder, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "dist", folder, **environment
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel.name, {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("cottention/")}


def packaged_files(folder: Path) -> set[str]:
    source = folder / "src"
    files = (path for path in (source / "cottention").rglob("*") if path.is_file() and path.parent.name != "src")
    return {path.relative_to(source).as_posix() for path in files}


@needs_compiler
def test_a_wheel_holds_every_module_and_the_library_for_any_python_of_the_platform(project: Path, setup_py: ModuleType):
    expected = packaged_files(project)
    name, held = wheel_of(project)
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert name.endswith(f"-py3-none-{platform}.whl") or sys.platform == "darwin"
    native = f"{setup_py.NATIVE}/"
    assert held == expected | {native + setup_py.LIBRARY, native + setup_py.RECORD}


def test_a_wheel_without_the_library_is_for_any_platform(project: Path, setup_py: ModuleType):
    expected = packaged_files(project)
    name, held = wheel_of(project, COTTENTION_BUILD_NATIVE="0")
    assert name.endswith("-py3-none-any.whl")
    assert held == expected | {f"{setup_py.NATIVE}/{setup_py.RECORD}"}


def test_the_source_distribution_holds_what_the_library_is_built_from(project: Path):
    made = run_in(project, "-c", "from setuptools.build_meta import build_sdist; build_sdist('dist')")
    assert made.returncode == 0, made.stderr
    (archive,) = (project / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert {"setup.py", "pyproject.toml", f"{_NATIVE}/src/answer.cpp", f"{_NATIVE}/src/answer.h"} <= held


@needs_compiler
def test_a_changed_source_or_header_is_built_again_and_nothing_else(project: Path, setup_py: ModuleType):
    library = project / _NATIVE / setup_py.LIBRARY

    def times_after_build() -> tuple[int, set[int]]:
        built = build_in(project)
        assert (built.returncode, built.stderr) == (0, "")
        return library.stat().st_mtime_ns, {each.stat().st_mtime_ns for each in (project / "build").rglob("*.o")}

    (project / _NATIVE / "src/other.cpp").write_text("int other() { return 1; }\n")
    first = times_after_build()
    assert ctypes.CDLL(str(library)).answer() == 42
    assert times_after_build() == first
    (project / _NATIVE / "src/answer.h").write_text("#define ANSWER 43\n")
    second = times_after_build()
    assert not first[1] & second[1]
    # A process that has the library loaded keeps the old one: the file is replaced, not written over.
    assert ctypes.CDLL(str(library)).answer() == 42
    (project / _NATIVE / "src/other.cpp").write_text("int other() { return 2; }\n")
    third = times_after_build()
    assert third[0] > second[0]
    assert len(third[1] & second[1]) == 1
    asked = run_in(project, "-c", f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())")
    assert asked.stdout == "43\n"


@needs_compiler
def test_a_source_that_is_edited_while_it_is_compiled_is_compiled_again(
    tmp_path: Path, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "answer.cpp").write_text(f"#define ANSWER 1\n{_TINY}")
    real_run = setup_py._run

    def edited_meanwhile(command, **options):
        ran = real_run(command, **options)
        if "-c" in command:
            (tmp_path / "answer.cpp").write_text(f"#define ANSWER 2\n{_TINY}")
            time.sleep(0.05)  # more than a tick of the file system's clock
            Path(command[-1]).touch()  # the compiler is not done before the edit
        return ran

    build = setup_py.NativeBuild(tmp_path, tmp_path / "objects")
    monkeypatch.setattr(setup_py, "_run", edited_meanwhile)
    build.run(tmp_path / "first.so")
    monkeypatch.setattr(setup_py, "_run", real_run)
    build.run(tmp_path / "second.so")
    assert ctypes.CDLL(str(tmp_path / "first.so")).answer() == 1
    assert ctypes.CDLL(str(tmp_path / "second.so")).answer() == 2


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/bin/false"}, "/bin/false does not compile an empty C++17 program"),
        ({"CXX": "no-such-compiler"}, "the compiler no-such-compiler cannot be run: No such file or directory"),
        ({"PATH": "/nowhere"}, "there is no C++ compiler here"),
    ],
)
def test_without_a_compiler_there_is_one_warning_and_a_record(project: Path, environment: dict[str, str], reason: str):
    (project / _NATIVE / "_kernels.so").write_text("of an earlier version")
    environment = {"CXX": "", **environment}
    built = build_in(project, **environment)
    assert built.returncode == 0
    assert built.stderr.count("the native library was not built") == 1
    assert reason in built.stderr
    assert "apt install g++" in built.stderr
    assert json.loads((project / _NATIVE / "_build.json").read_text()) == {"built": False, "reason": reason}
    assert not (project / _NATIVE / "_kernels.so").exists()
    refused = build_in(project, **environment, COTTENTION_BUILD_NATIVE="1")
    assert refused.returncode != 0
    assert f"the native library was not built: {reason}" in refused.stderr
    assert "Traceback" not in refused.stderr


@needs_compiler
def test_an_error_of_the_compiler_is_shown_and_a_wish_for_none_is_silent(project: Path):
    (project / _NATIVE / "src/broken.cpp").write_text("int broken() { return nothing; }\n")
    failed = build_in(project)
    assert failed.returncode == 0
    assert "making broken.o failed" in failed.stderr
    assert "nothing" in failed.stderr
    skipped = build_in(project, COTTENTION_BUILD_NATIVE="0")
    assert (skipped.returncode, skipped.stderr) == (0, "")
    reason = json.loads((project / _NATIVE / "_build.json").read_text())["reason"]
    assert reason == "COTTENTION_BUILD_NATIVE=0 was set"
    wrong = build_in(project, COTTENTION_BUILD_NATIVE="yes")
    assert "COTTENTION_BUILD_NATIVE must be 0 or 1; got 'yes'" in wrong.stderr


@needs_compiler
def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out(
    tmp_path: Path, setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    real = " ".join(setup_py._find_compiler())
    old = tmp_path / "old-compiler"
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *avx512bf16\\ *|*neon*) echo unknown >&2; exit 1;; esac\nexec {real} "$@"\n'
    )
    old.chmod(0o755)
    sources = tmp_path / "src"
    sources.mkdir()
    told = "#ifdef COTTENTION_HAVE_AVX512BF16\n#define ANSWER 1\n#else\n#define ANSWER 0\n#endif\n"
    (sources / "answer.cpp").write_text(told + _TINY)
    (sources / "part_avx512bf16.cpp").write_text("#include <immintrin.h>\nint part() { return 1; }\n")
    monkeypatch.setenv("CXX", str(old))
    build = setup_py.NativeBuild(sources, tmp_path / "objects")
    assert "avx512bf16" not in build.known
    assert [each.name for each in build.sources] == ["answer.cpp"]
    build.run(tmp_path / "library.so")
    assert ctypes.CDLL(str(tmp_path / "library.so")).answer() == 0


def test_a_file_says_by_its_name_what_it_is_compiled_for(setup_py: ModuleType):
    expected = {"a_avx2": "avx2", "a_avx512": "avx512", "a_avx512bf16": "avx512bf16", "a_neon": "neon"}
    for stem, name in {**expected, "a_generic": None, "avx2_a": None, "a": None}.items():
        assert setup_py.instruction_set_of(Path(f"{stem}.cpp")) == name


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_no_code_for_one_instruction_set_can_be_taken_for_common_code(setup_py: ModuleType, tmp_path: Path):
    """An inline function is compiled into every file that calls it, and the linker keeps any one of the copies.

    One with AVX-512 instructions would end the process on a machine without them.
    """
    objects = _REPOSITORY / setup_py.OBJECTS / sysconfig.get_platform()
    build = setup_py.NativeBuild(_REPOSITORY / setup_py.SOURCES, objects)
    build.run(tmp_path / "library.so")  # compiles what `make` has not
    for source in build.sources:
        if setup_py.instruction_set_of(source) is None:
            continue
        symbols = subprocess.run(["nm", "-C", objects / f"{source.stem}.o"], capture_output=True, text=True, check=True)
        shared = [line for line in symbols.stdout.splitlines() if line[17:18] in "WVu"]
        assert not shared, f"{source.name}: {shared[:3]}"


_ATTENDS = """
import json, sys, torch
from cottention import cosine_attention
x = torch.randn(1, 70, 2, 16)
right = cosine_attention(x, x, x, None, causal=True, implementation="naive")[0]
found = {}
for name in ("auto", "chunk", "native"):
    try:
        o = cosine_attention(x, x, x, None, causal=True, implementation=name)[0]
        found[name] = float((o - right).abs().max())
    except (RuntimeError, ValueError) as error:
        found[name] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("compiler", ["with", "without"])
@pytest.mark.parametrize("editable", [False, True], ids=["install", "editable"])
def test_an_install_works_in_a_new_environment(compiler: str, editable: bool, tmp_path: Path, setup_py: ModuleType):
    """torch, pip and the rest come from this environment, by a path file: it is our own install that is tried."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(_REPOSITORY / name, source)
    unwanted = shutil.ignore_patterns("*.egg-info", "__pycache__", "_kernels.*", "_build.json")
    shutil.copytree(_REPOSITORY / "src", source / "src", ignore=unwanted)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    # What hides a compiler: no PATH but the environment's own, and names that lead nowhere.
    hidden = {"CC": "/bin/false", "CXX": "", "PATH": str(python.parent)}
    environment = _environment(hidden if compiler == "without" else {})
    environment.pop("PYTHONPATH", None)

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, *map(str, words)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    target = ["--editable", source] if editable else [source]
    installed = run("-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", *target)
    assert installed.returncode == 0, installed.stderr
    said = installed.stdout + installed.stderr
    assert said.count("the native library was not built") == (compiler == "without")
    where = run("-c", "import cottention; print(cottention.__file__)").stdout.strip()
    assert Path(where).is_relative_to(source if editable else tmp_path / "venv")
    assert (Path(where).parent / "ops/native" / setup_py.LIBRARY).exists() == (compiler == "with")
    ran = run("-c", _ATTENDS)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["chunk"] < 1e-5
    assert found["auto"] < 1e-5
    if compiler == "with":
        assert found["native"] < 1e-5
    else:
        assert "compiler" in found["native"]
