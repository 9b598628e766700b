"""The pages: their Python runs, their links lead somewhere, and what is made from the code names all of it."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cottention.cli.main import COMMANDS
from tests import tiny
from tests.integrations import families

_ROOT = Path(__file__).resolve().parents[1]
_PAGES = [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]
_FENCED = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_WITH_CODE = [page for page in _PAGES if _FENCED.search(page.read_text(encoding="utf-8"))]


def _models_of_generation() -> None:
    tiny.save(Path("runs/mine/model"), tiny.gpt(dtype=torch.float32), tiny.bpe_tokenizer())


def _models_of_integrations() -> None:
    families.make_model("qwen3_5").save_pretrained("path/to/a/qwen3.5")


# What a page takes for granted: models where its readers have theirs.
_BEFORE: dict[str, Callable[[], None]] = {
    "generation.md": _models_of_generation,
    "playground.md": _models_of_generation,
    "integrations.md": _models_of_integrations,
}


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = spec_from_file_location("docs_hooks", _ROOT / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", _WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if page.name in _BEFORE:
        _BEFORE[page.name]()
    text = page.read_text(encoding="utf-8")
    script = [""] * text.count("\n")
    for block in _FENCED.finditer(text):
        line = text.count("\n", 0, block.start(1))  # a traceback names the page's line
        script[line : line + block[1].count("\n")] = block[1].splitlines()
    Path("page.py").write_text("\n".join(script), encoding="utf-8")
    runpy.run_path("page.py")


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_links_to_files_and_headings_lead_somewhere(page: Path):
    for link in _LINK.findall(re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)):
        name, _, heading = link.partition("#")
        if "://" in link or name.startswith("mailto:"):
            continue
        target = page if not name else (page.parent / name)
        assert target.exists(), link
        if heading:
            found = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.M)
            slugs = [re.sub(r"[^\w -]", "", each).strip().lower().replace(" ", "-") for each in found]
            assert heading in slugs, link


def test_the_page_of_commands_has_each_command_and_its_options(hooks: ModuleType):
    text = hooks.commands()
    for name in COMMANDS:
        assert f"\n## {name}\n" in f"\n{text}"
    for section, option in (("### pretrain gpt", "--training.max_steps"), ("### convert softmax", "--distil-steps")):
        assert option in text.split(section)[1].split("\n## ")[0]


def test_the_reference_has_every_public_name(hooks: ModuleType):
    text = hooks.public_names()
    packages = [package for _, package in hooks.PACKAGES]
    for path in sorted((_ROOT / "src/cottention").glob("*/__init__.py")):
        package = f"cottention.{path.parent.name}"
        names = getattr(import_module(package), "__all__", None)
        assert not names or package in packages, f"{package} has public names that the reference lacks"
        for name in names or ():
            assert f"::: {package}.{name}\n" in text


def test_every_page_is_in_the_navigation(hooks: ModuleType):
    assert sorted(hooks.pages()) == sorted((_ROOT / "docs").glob("*.md"))
