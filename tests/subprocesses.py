"""Runs a piece of Python in a fresh interpreter, where nothing is imported yet, with only some packages to be had.

Questions like "does this import torch?" have no answer inside a test process that has imported everything.

    modules = run_python("import cottention, json, sys; print(json.dumps(sorted(sys.modules)))").stdout
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from importlib import metadata

# Every finder is asked through this one, so that a hidden package looks exactly as if it were not installed.
_HIDE = """
import sys

class _Finder:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(_Finder, sys.meta_path)
"""


def run_python(code: str, *, hidden: Iterable[str] = (), succeed: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter.

    Args:
        code: what to run; it may be indented.
        hidden: top-level modules that seem not to be installed.
        succeed: fail the test, showing stderr, when the exit code is not 0.
    """
    program = _HIDE.format(hidden=set(hidden)) + textwrap.dedent(code)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    if succeed:
        assert ran.returncode == 0, ran.stderr
    return ran


def modules_beside(*distributions: str) -> set[str]:
    """Top-level modules of everything installed but these distributions and what they require, and cottention."""
    kept, pending = {"cottention"}, [_canonical(name) for name in distributions]
    while pending:
        name = pending.pop()
        if name in kept:
            continue
        kept.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        pending += [_canonical(re.split(r"[^\w.-]", line)[0]) for line in requirements if "extra ==" not in line]
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if all(_canonical(owner) not in kept for owner in owners)
    }


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
