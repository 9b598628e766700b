"""Processes that share weights, windows or examples have the loss curve of one process.

Real processes with gloo, started once, that walk through whole runs. Dropout is off: each process drops out other
units.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.training.recipe import Recipe
from cottention.training.recipe_files import replace_settings
from tests.distributed.ranks import Ranks
from tests.training.helpers import metrics_of, tiny_recipe, weights_of
from tests.training.parallel_checks import run
from tests.training.test_pair_training import pair_recipe, stories  # noqa: F401

BLOCK: dict[str, Any] = {
    "model__short_conv": 4,
    "model__decay": "data",
    "model__output_norm": True,
    "model__output_gate": "silu",
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt", {}),
    "gpt packed": ("gpt", {"data__reset_at_documents": True}),
    "gpt documents": ("gpt", {"data__mode": "document"}),
    "gpt plus": ("gpt", {**BLOCK, "model__erase": True, "model__divisor": "query"}),
    "gpt plus packed, clipped": (
        "gpt",
        {**BLOCK, "model__erase": True, "data__reset_at_documents": True, "optimizer__max_grad_norm": 0.5},
    ),
    "gpt plus, recomputed": ("gpt", {**BLOCK, "model__erase": True, "training__gradient_checkpointing": True}),
    "bert": ("bert", {}),
    "bert, recomputed": ("bert", {"training__gradient_checkpointing": True}),
    "bert plus": (
        "bert",
        {**BLOCK, "model__norm_first": True, "model__position_embedding_type": "rotary", "model__rotary_dim": 4},
    ),
    "bert pairs, packed": ("pairs", {}),
    "bert pairs, padded": ("pairs", {"training__unpadded": False}),
}
LAYOUTS: dict[str, dict[str, int]] = {
    "data 2": {"data": 2},
    "shard 2": {"shard": 2},
    "sequence 2": {"sequence": 2},
    "sequence 4": {"sequence": 4},
    "shard 2, sequence 2": {"shard": 2, "sequence": 2},
    "data 2, shard 2": {"data": 2, "shard": 2},
}
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
# Of a small core: each way of sharing out once, on two ranks.
CORE = [
    ("gpt plus packed, clipped", "shard 2", torch.float64),
    ("gpt plus packed, clipped", "sequence 2", torch.float64),
    ("bert", "data 2", torch.float64),
    ("bert", "sequence 2", torch.float32),
]


def recipe_of(name: str, source: Path, text: Path, **changes: Any) -> Recipe:
    arch, options = RUNS[name]
    settings = {"model__dropout": 0.0, "training__max_steps": 6, **options, **changes}
    if arch == "pairs":
        return pair_recipe(text, **settings)
    return tiny_recipe(arch, source, **settings)


def figures(run_dir: Path) -> list[tuple[int, str, float]]:
    """Every loss, of training and of held-out text, and every norm of a gradient."""
    names = ("loss", "mlm_loss", "nsp_loss", "grad_norm", "val_loss", "val_nsp_loss")
    return [(line["step"], name, line[name]) for line in metrics_of(run_dir) for name in names if name in line]


def assert_same_curve(found: Path, expected: Path, tolerance: float) -> None:
    ours, truth = figures(found), figures(expected)
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in truth]
    for (step, name, value), (_, _, right) in zip(ours, truth, strict=True):
        error = abs(value - right) / abs(right)
        assert error <= tolerance, f"{found.name}: {name} of step {step} is off by {error:.1e}"


def check(ranks: Ranks, name: str, layout: str, dtype: torch.dtype, recipe: Recipe, tmp_path: Path) -> None:
    sizes = LAYOUTS[layout]
    shared = replace_settings(recipe, {f"parallelism.{key}": value for key, value in sizes.items()})
    num = math.prod(sizes.values())
    one = tmp_path / f"one {name} {dtype}"
    if not one.exists():
        run(None, recipe, str(one), dtype)
    ranks.run(run, shared, str(tmp_path / layout), dtype, size=num)
    assert_same_curve(tmp_path / layout, one, TOLERANCES[dtype])
    assert weights_of(tmp_path / layout / "model").keys() == weights_of(one / "model").keys()


@pytest.mark.parametrize(("name", "layout", "dtype"), CORE)
def test_processes_have_the_curve_of_one(
    ranks: Ranks,
    name: str,
    layout: str,
    dtype: torch.dtype,
    corpus: Path,
    stories: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    check(ranks, name, layout, dtype, recipe_of(name, corpus, stories), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_all_layouts_have_the_curve_of_one(
    ranks: Ranks,
    name: str,
    corpus: Path,
    stories: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = recipe_of(name, corpus, stories)
    for layout, sizes in LAYOUTS.items():
        if "sequence" in sizes and name == "bert pairs, packed":
            continue  # refused
        check(ranks, name, layout, torch.float64, recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "gpt plus packed, clipped", "bert plus", "bert pairs, padded"])
def test_all_layouts_have_the_curve_of_one_in_float32(
    ranks: Ranks,
    name: str,
    corpus: Path,
    stories: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = recipe_of(name, corpus, stories)
    for layout in LAYOUTS:
        check(ranks, name, layout, torch.float32, recipe, tmp_path)


@pytest.mark.slow
def test_shards_in_bfloat16_are_those_of_one_process(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    """What is gathered in bfloat16 is what autocast rounds anyway."""
    settings = {"training__precision": "bf16", "training__gradient_checkpointing": True}
    recipe = recipe_of("gpt plus", corpus, corpus, **settings)
    for layout in ("shard 2", "data 2, shard 2"):
        check(ranks, "gpt plus", layout, torch.float32, recipe, tmp_path)


@pytest.mark.slow
def test_compiled_blocks_are_sharded(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    recipe = recipe_of("gpt plus", corpus, corpus)
    run(None, recipe, str(tmp_path / "one"), torch.float32)
    shared = replace_settings(recipe, {"parallelism.shard": 2, "training.compile": True})
    ranks.run(run, shared, str(tmp_path / "two"), torch.float32, size=2)
    assert_same_curve(tmp_path / "two", tmp_path / "one", 1e-5)
