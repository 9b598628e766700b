"""Runs that take a second, and what two of them are compared by.

Dropout, gradient accumulation, several passes over the data and evaluations that do not fall together with checkpoints
are all on, so that whatever a resumed run forgets shows.
"""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cottention.training.pretraining import PretrainResult
from cottention.training.recipe import BertRecipe, GPTRecipe, Recipe
from cottention.training.recipe_files import replace_settings
from cottention.training.recipe_sections import (
    BertDataSettings,
    BertModelSettings,
    BertTrainingSettings,
    GPTDataSettings,
    GPTModelSettings,
    GPTTrainingSettings,
    OptimizerSettings,
)

TIMES = ("tokens_per_s", "elapsed_s")
"""What may differ between two runs of one recipe."""


@dataclass(frozen=True)
class Run:
    """A run and where it is."""

    recipe: Recipe
    directory: Path
    result: PretrainResult

    @property
    def num_windows(self) -> float:
        """Windows of the text that it was trained on."""
        line = next(entry for entry in metrics_of(self.directory) if "epoch" in entry)
        return line["step"] * self.recipe.training.global_batch_size / line["epoch"]


def write_corpus(path: Path, *, num_paragraphs: int, seed: int = 0) -> Path:
    """Write paragraphs of invented words, between blank lines."""
    source = random.Random(seed)
    words = ["".join(source.choices("abcdefghijklmnoprstuvw", k=source.randint(2, 7))) for _ in range(60)]
    paragraphs = [" ".join(source.choices(words, k=source.randint(5, 25))) + "." for _ in range(num_paragraphs)]
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


def tiny_recipe(arch: str, source: Path, **changes: Any) -> Any:
    """A recipe for `source`; changes as {"training.max_steps": 3}, with __ for the dot."""
    optimizer = OptimizerSettings(learning_rate=1e-2, warmup_steps=4)
    training: dict[str, Any] = {
        "max_steps": 20,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "log_every": 2,
        "eval_every": 5,
        "save_every": 3,
    }
    data: dict[str, Any] = {
        "source": str(source),
        "split_by": "paragraph",
        "validation": 0.1,
        "sequence_length": 32,
        "eval_tokens": 256,
    }
    recipe: Recipe
    if arch == "gpt":
        shape: dict[str, Any] = {
            "vocab_size": 290,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_inner": 32,
            "rotary_dim": 4,
        }
        recipe = GPTRecipe(
            model=GPTModelSettings(dropout=0.1, **shape),
            data=GPTDataSettings(**data),
            optimizer=optimizer,
            training=GPTTrainingSettings(**training),
        )
    else:
        recipe = BertRecipe(
            model=BertModelSettings(
                vocab_size=160,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=32,
                dropout=0.1,
            ),
            data=BertDataSettings(**data),
            optimizer=optimizer,
            training=BertTrainingSettings(**training),
        )
    return replace_settings(recipe, {key.replace("__", "."): value for key, value in changes.items()})


def weights_of(directory: Path) -> dict[str, Tensor]:
    """Weights of a model directory."""
    return load_file(directory / "model.safetensors")


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, strictly read, without the times."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in entries]


def assert_same_run(got: Path, expected: Path) -> None:
    """Same losses and same final weights, bit for bit."""
    assert metrics_of(got) == metrics_of(expected)
    weights, truth = weights_of(got / "model"), weights_of(expected / "model")
    assert weights.keys() == truth.keys()
    different = [name for name in truth if not torch.equal(weights[name], truth[name])]
    assert not different, different


def steps_of(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that a run keeps."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in (run_dir / "checkpoints").glob("checkpoint-*"))


def in_child(function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> int:
    """Call a module's function in a process of its own, which may die; its exit code, negative for a signal."""
    # A server that has imported everything once forks the children: each costs milliseconds instead of seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cottention.training.pretraining", "matplotlib.figure"])
    child = context.Process(target=function, args=arguments)
    child.start()
    child.join(timeout_s)
    if child.is_alive():
        child.kill()
        child.join()
        raise AssertionError(f"{function.__name__} was still at work after {timeout_s} s")
    assert child.exitcode is not None
    return child.exitcode
