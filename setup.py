"""Builds the native CPU library where there is a C++ compiler; where there is none, leaves it out with one warning.

The library knows neither Python nor torch: it is compiled by command lines of our own and loaded by ctypes, so one file
serves every version of both. Each source is compiled for the instruction set that its name ends in, or left out where
the compiler does not know that; which one runs is decided at run time. All else about the package is in pyproject.toml.

    COTTENTION_BUILD_NATIVE=1 python setup.py build_ext --inplace     # 1: a failure is an error; 0: do not even try
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = "cottention/ops/native"
SOURCES = Path("src", NATIVE, "src")
OBJECTS = Path("build/native")
LIBRARY = "_kernels.dylib" if sys.platform == "darwin" else "_kernels.so"
RECORD = "_build.json"  # beside the library: how the build went, for `cottention doctor`

# No -march: what a file may use is said by its name. Numbers keep their meaning: no -ffast-math.
COMMON_FLAGS = (
    *("-std=c++17", "-O3", "-g0", "-DNDEBUG", "-fPIC", "-pthread"),
    *("-Wall", "-Wextra", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # gcc 12 suspects its own intrinsics
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-math-errno", "-fno-trapping-math"),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")

# End of a file's name -> flags, and a condition of the preprocessor that tells whether they had their effect: a
# compiler for another processor refuses the flags or fails the condition.
INSTRUCTION_SETS: dict[str, tuple[tuple[str, ...], str]] = {
    "avx512bf16": ((*_AVX512, "-mavx512bf16"), "defined(__AVX512BF16__)"),
    "avx512": (_AVX512, "defined(__AVX512F__) && defined(__AVX512VL__)"),
    "avx2": (_AVX2, "defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)"),
    "neon": ((), "defined(__ARM_NEON) && defined(__aarch64__)"),
}

REMEDY = (
    "cosine attention will run as 'chunk', several times slower on CPUs; install a C++17 compiler (Debian: apt install "
    "g++) and install again (pip: --force-reinstall --no-deps --no-cache-dir)"
)


class BuildError(Exception):
    """Why there is no library: a line, then perhaps what the compiler said."""


class NativeBuild:
    """One build of the library; what is up to date already is left as it is."""

    def __init__(self, sources: Path, objects: Path) -> None:
        self.compiler = _find_compiler()
        if not self._knows((), "1"):
            raise BuildError(f"{shlex.join(self.compiler)} does not compile an empty C++17 program")
        self.known = [name for name, (flags, condition) in INSTRUCTION_SETS.items() if self._knows(flags, condition)]
        self.sources = [
            each
            for each in sorted(sources.glob("*.cpp"))
            if (name := instruction_set_of(each)) is None or name in self.known
        ]
        if not self.sources:
            raise BuildError(f"{sources} holds no sources")
        self.headers = sorted(sources.glob("*.h"))
        self.objects = objects

    def run(self, library: Path) -> None:
        """Compile what has changed, side by side, and link."""
        self.objects.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(self._compile, self.sources))
        command = [*self.compiler, "-shared", "-pthread", *_flags_from("ARCHFLAGS", "LDFLAGS")]
        self._make(library, command, objects)

    def _compile(self, source: Path) -> Path:
        name = instruction_set_of(source)
        flags = INSTRUCTION_SETS[name][0] if name else ()
        macros = [f"-DCOTTENTION_HAVE_{each.upper()}=1" for each in self.known]
        command = [
            *self.compiler,
            *COMMON_FLAGS,
            *flags,
            *macros,
            *_flags_from("ARCHFLAGS", "CPPFLAGS", "CXXFLAGS"),
            "-c",
        ]
        target = self.objects / f"{source.stem}.o"
        self._make(target, command, [source], also_depends_on=self.headers)
        return target

    def _make(
        self, target: Path, command: list[str], inputs: list[Path], *, also_depends_on: list[Path] | None = None
    ) -> None:
        """Run a command, unless the target is newer than all it is made from and was made by the same command."""
        command = [*command, *map(str, inputs)]
        recorded = self.objects / f"{target.name}.command"
        newest = max(each.stat().st_mtime_ns for each in (*inputs, *(also_depends_on or ())))
        same_command = recorded.exists() and recorded.read_text() == shlex.join(command)
        if same_command and target.exists() and target.stat().st_mtime_ns > newest:
            return
        # Written beside and renamed: a process that has the library loaded keeps the one it has.
        beside = target.with_name(f"{target.name}.{os.getpid()}.partial")
        started = time.time_ns()
        try:
            ran = _run([*command, "-o", str(beside)])
            if ran.returncode != 0:
                raise BuildError(f"making {target.name} failed\n{shlex.join(command)}\n{ran.stderr.strip()}")
            if ran.stderr:
                print(ran.stderr, end="", file=sys.stderr)
            # As old as what went into it: a source that was edited meanwhile is newer, and is compiled again.
            os.utime(beside, ns=(started, started))
            recorded.unlink(missing_ok=True)
            beside.replace(target)
            recorded.write_text(shlex.join(command))
        finally:
            beside.unlink(missing_ok=True)

    def _knows(self, flags: tuple[str, ...], condition: str) -> bool:
        """Whether the compiler takes the flags, and the condition holds under them."""
        probe = f"#include <cmath>\n#if !({condition})\n#error\n#endif\nint main() {{ return 0; }}\n"
        command = [*self.compiler, *_flags_from("ARCHFLAGS"), *flags, "-Werror", "-std=c++17", "-x", "c++", "-c", "-"]
        return _run([*command, "-o", os.devnull], source=probe).returncode == 0


def instruction_set_of(source: Path) -> str | None:
    """The instruction set that a file's name ends in; None: what every processor of its kind has."""
    last = source.stem.rpartition("_")[2]
    return last if last in INSTRUCTION_SETS else None


def _find_compiler() -> list[str]:
    """$CXX alone when it is set, else the first that is here of Python's own, c++, g++, clang++."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return chosen
    own = shlex.split(sysconfig.get_config_var("CXX") or "")[:1]  # without Python's flags: we have our own
    for name in (*own, "c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("there is no C++ compiler here")


def _flags_from(*names: str) -> list[str]:
    """What the user wants beside our own flags; on macOS ARCHFLAGS says for which processor."""
    return [word for name in names for word in shlex.split(os.environ.get(name, ""))]


def _run(command: list[str], *, source: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"the compiler {command[0]} cannot be run: {error.strerror}") from error


class BuildNative(build_ext):
    """`build_ext` for the one library, which is no extension module and may be missing."""

    def finalize_options(self) -> None:
        """Keep objects from one build to the next, also from an editable install, unless told where to put them."""
        given = self.build_temp
        super().finalize_options()
        self.objects = Path(given) if given else OBJECTS / self.plat_name

    @property
    def folder(self) -> Path:
        """Where the library goes."""
        return Path("src" if self.inplace else self.build_lib, NATIVE)

    @property
    def library(self) -> Path:
        """The library, which is there once it was built."""
        return self.folder / LIBRARY

    def run(self) -> None:
        """Build, or say why not, on the terminal and in the record."""
        wish = os.environ.get("COTTENTION_BUILD_NATIVE", "")
        if wish not in ("", "0", "1"):
            raise SystemExit(f"COTTENTION_BUILD_NATIVE must be 0 or 1; got {wish!r}")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            if wish == "0":
                raise BuildError("COTTENTION_BUILD_NATIVE=0 was set")
            build = NativeBuild(SOURCES, self.objects)
            build.run(self.library)
        except BuildError as error:
            if wish == "1":
                raise SystemExit(f"the native library was not built: {error}") from error
            self.library.unlink(missing_ok=True)  # one of an earlier version would be worse than none
            self._record(built=False, reason=str(error).partition("\n")[0])
            if wish != "0":
                print(f"warning: the native library was not built: {error}\n{REMEDY}", file=sys.stderr)
            return
        self._record(built=True, compiler=shlex.join(build.compiler), instruction_sets=build.known)

    def _record(self, **found: object) -> None:
        (self.folder / RECORD).write_text(json.dumps(found) + "\n")

    def get_outputs(self) -> list[str]:
        """What is copied on installation."""
        return [str(each) for each in (self.library, self.folder / RECORD) if each.exists() and not self.inplace]

    def get_output_mapping(self) -> dict[str, str]:
        """An editable install finds the library in the source folder, where it was built."""
        return {}


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 of one platform; for any platform when there is no library in it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform of what was built."""
        build = self.get_finalized_command("build_ext")
        assert isinstance(build, BuildNative)
        if not build.library.exists():
            self.root_is_pure = True
            return "py3", "none", "any"
        *_, system = super().get_tag()
        return "py3", "none", system.replace("universal2", platform.machine())


if __name__ == "__main__":
    setup(
        # The sources are named for the source distribution; the commands above find them by themselves.
        ext_modules=[
            Extension(
                NATIVE.replace("/", ".") + "._kernels",
                sources=sorted(map(str, SOURCES.glob("*.cpp"))),
                depends=sorted(map(str, SOURCES.glob("*.h"))),
                optional=True,
            )
        ],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    )
