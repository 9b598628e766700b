"""docs/family.md: its code runs, and the costs that it names are those of the layers and of the committed benchmark."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from cottention.layers import CosineAttention

_DOCS = Path(__file__).resolve().parents[1] / "docs"
_PAGE = (_DOCS / "family.md").read_text()
_D, _H, _V, _W = 48, 4, 12, 3


def test_the_code_of_the_page_runs_and_what_it_compares_is_the_same(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", _PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    assert all("assert_close" in block for block in blocks)
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    runpy.run_path(str(script))


def _size(**options: Any) -> tuple[int, int]:
    """Parameters, and numbers of the state of a row in the layer's dtypes."""
    layer = CosineAttention(_D, _H, causal=True, **options)
    return sum(x.numel() for x in layer.parameters()), sum(x.numel() for x in layer.empty_state(1))


# The formulas of the page's table, in its order.
@pytest.mark.parametrize(
    ("options", "parameters", "state"),
    [
        ({"decay": "fixed"}, 0, 0),
        ({"decay": "learned"}, _H, 0),
        ({"decay": "data"}, _H * (_D + 2), 0),
        ({"erase": True}, _H * (_D + 1), 0),
        ({"divisor": "none"}, -_H, 0),
        ({"short_conv": _W}, 3 * _H * _V * _W, 3 * _H * _V * (_W - 1)),
        ({"output_norm": True}, _V, 0),
        ({"output_gate": "silu"}, _H * _V * _D, 0),
        ({"output_gate": "sigmoid"}, _H * _V * _D + _H * _V, 0),
    ],
    ids=str,
)
def test_an_option_has_the_parameters_and_the_state_of_the_table(
    options: dict[str, Any], parameters: int, state: int
) -> None:
    plain, found = _size(), _size(**options)
    assert (found[0] - plain[0], found[1] - plain[1]) == (parameters, state)


@pytest.mark.parametrize("name", ["native+decay", "native+erase", "native+decay+erase"])
def test_the_times_of_the_table_are_those_of_the_committed_benchmark(name: str) -> None:
    results = json.loads((_DOCS / "benchmarks/gates/attention.json").read_text())["results"]
    times = {
        (each["name"], each["passes"], each["dtype"], each["head_dim"], each["length"]): each["time"]["median_s"]
        for each in results
        if each["time"]
    }
    ratios = [time / times[("native", *shape)] for (found, *shape), time in times.items() if found == name]
    assert len(ratios) == 24
    assert f"{min(ratios):.2f} to {max(ratios):.2f}" in _PAGE
