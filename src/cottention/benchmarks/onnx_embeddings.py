"""Sentence embeddings by one model in PyTorch and in ONNX Runtime, in turns, so that a busy moment hits both.

The model is a cosine BERT of random weights, exported by the default call; its embeddings are means over real tokens.
Needs onnx, onnxscript and onnxruntime.

    python -m cottention.benchmarks.onnx_embeddings --threads 2 --batch 8 --lengths 32 128 512
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cottention.benchmarks.environment import describe_environment
from cottention.models import CottentionBertConfig, CottentionBertModel

_TOLERANCE = 1e-4  # of values of about 1 that went through all layers in float32


def measure(*, hidden: int, layers: int, batch: int, lengths: Sequence[int], threads: int, rounds: int) -> list[dict]:
    """Median seconds of a batch of embeddings in both, per length.

    Raises:
        ValueError: the two do not agree.
    """
    torch.set_num_threads(threads)
    config = CottentionBertConfig(
        vocab_size=30522,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        max_position_embeddings=max(lengths),
    )
    torch.manual_seed(0)
    model = CottentionBertModel(config, add_pooling_layer=False).eval()
    session = _session(model, threads)
    return [_point(model, session, batch, length, rounds) for length in lengths]


def _session(model: CottentionBertModel, threads: int) -> Any:
    onnxruntime: Any = import_module("onnxruntime")  # no dependency of the package
    example = _inputs(2, 8)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        free = {0: "batch", 1: "length"}
        shapes = dict.fromkeys(example, free)
        torch.onnx.export(model, (), path, kwargs=example, dynamo=True, dynamic_shapes=shapes, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return onnxruntime.InferenceSession(path, options)


def _inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Tokens whose rows end in padding, a little more from row to row."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 30522, (batch, length), generator=generator)
    real = length - torch.arange(batch) * (length // 2) // batch
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < real[:, None]).to(torch.int64)}


def _point(model: CottentionBertModel, session: Any, batch: int, length: int, rounds: int) -> dict[str, Any]:
    inputs = _inputs(batch, length)
    arrays = {name: x.numpy() for name, x in inputs.items()}
    mask = inputs["attention_mask"][..., None]

    @torch.no_grad()
    def by_torch() -> Tensor:
        return (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)

    def by_onnx() -> Tensor:
        return (torch.from_numpy(session.run(None, arrays)[0]) * mask).sum(1) / mask.sum(1)

    error = (by_torch() - by_onnx()).abs().max().item()
    if error > _TOLERANCE:
        raise ValueError(f"embeddings must agree to {_TOLERANCE}; got {error} at length {length}")
    seconds: dict[str, list[float]] = {"torch_s": [], "onnx_s": []}
    for _ in range(rounds):
        for name, run in (("torch_s", by_torch), ("onnx_s", by_onnx)):
            seconds[name].append(_timed(run))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {"batch": batch, "length": length, **medians, "torch_over_onnx": medians["torch_s"] / medians["onnx_s"]}


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print the environment and one JSON line per length."""
    parser = argparse.ArgumentParser(description="Sentence embeddings: PyTorch against ONNX Runtime.")
    parser.add_argument("--hidden", type=int, default=768, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    settings = vars(parser.parse_args())
    print(json.dumps(describe_environment("cpu") | settings))
    for point in measure(**settings):
        print(json.dumps(point))


if __name__ == "__main__":
    main()
