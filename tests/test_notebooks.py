"""The notebooks of examples/: every cell runs, in its order; only the minutes are fewer."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

_NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "examples/notebooks").glob("*.ipynb"))


def _cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def test_there_are_two() -> None:
    assert [notebook.name for notebook in _NOTEBOOKS] == ["cosine_attention.ipynb", "small_gpt.ipynb"]


@pytest.mark.parametrize("notebook", _NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_holds_no_outputs_and_names_files_that_are_there(notebook: Path) -> None:
    assert not [cell for cell in _cells(notebook, "code") if cell["outputs"] or cell["execution_count"]]
    text = "".join("".join(cell["source"]) for cell in _cells(notebook, "markdown"))
    named = re.findall(r"`((?:docs/)?[\w-]+\.(?:md|ipynb))`", text)
    assert named
    for name in named:
        assert ((notebook.parents[2] if "/" in name else notebook.parent) / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("notebook", _NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_every_cell_of_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    shown: list[list[int]] = []
    monkeypatch.setattr(pyplot, "show", lambda: (shown.append(pyplot.get_fignums()), pyplot.close("all")))
    monkeypatch.chdir(tmp_path)
    cells = ["".join(cell["source"]) for cell in _cells(notebook, "code")]
    script = "\n\n\n".join(f"# cell {number}\n{cell}" for number, cell in enumerate(cells))
    Path("cells.py").write_text(re.sub(r"minutes=[\d.]+", "minutes=0.1", script), encoding="utf-8")
    runpy.run_path("cells.py")
    assert shown == [[1]] * script.count("plt.show()")  # one picture each time
    assert shown
