"""The gated delta layers of transformers on a CPU, beside the same layers on our operation: two models, one process.

Two random models of the kind of Qwen3.5, all layers linear, with the same weights; `accelerate_gated_delta` is called
on one. Loss and gradients of both are compared first. Then prefill, a step of training and a decoded token are timed
interleaved, and beside them the rule alone, without the projections, convolutions and norms that both have.

    python -m cottention.benchmarks.gated_delta --num-tokens 2048 --output-dir runs/bench-gated-delta
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cottention.benchmarks.check import WrongResultError
from cottention.benchmarks.environment import describe_environment
from cottention.benchmarks.journal import report_directory, write_texts
from cottention.benchmarks.measure import Timing, time_interleaved
from cottention.errors import CottentionError, SettingsError
from cottention.integrations import accelerate_gated_delta
from cottention.integrations.delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from cottention.training.memory import keep_freed_memory

# Relative, of float32 models: 1e-6 measured; in gradients that are small differences of large sums theirs is off most.
_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class GatedDeltaSettings:
    """The two models, and how long to measure."""

    num_tokens: int = 2048
    """Of the prompt, and of a text in a step of training."""
    batch_size: int = 1
    hidden_size: int = 512
    num_layers: int = 4
    num_key_heads: int = 4
    num_value_heads: int = 8
    head_dim: int = 128
    """Of keys and of values."""
    vocab_size: int = 1024
    repeats: int = 9
    """Samples of each."""
    time_limit_s: float = 60.0
    """Of each."""
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0 and field.name != "seed":
                raise SettingsError(f"{field.name} must be above 0; got {getattr(self, field.name)}")
        if self.num_value_heads % self.num_key_heads:
            raise SettingsError(
                f"num_key_heads must divide num_value_heads; got {self.num_key_heads} and {self.num_value_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class GatedDeltaPoint:
    """One kind of work, by transformers' PyTorch form and by ours."""

    work: str
    stock: Timing
    ours: Timing

    @property
    def speedup(self) -> float:
        """How many times as fast ours is."""
        return self.stock.median_s / self.ours.median_s


@dataclass(frozen=True, kw_only=True)
class GatedDeltaReport:
    """Everything that one run found."""

    settings: GatedDeltaSettings
    environment: dict[str, object]
    num_parameters: int
    loss_difference: float
    """Of the two models, relative."""
    gradient_difference: float
    """Of all gradients together, relative to their norm."""
    points: list[GatedDeltaPoint]

    def to_dict(self) -> dict[str, object]:
        """The report as plain data for JSON."""
        return {
            "benchmark": "gated_delta",
            "format": 1,
            "environment": self.environment,
            "settings": asdict(self.settings),
            **{name: getattr(self, name) for name in ("num_parameters", "loss_difference", "gradient_difference")},
            "results": [
                {
                    "work": point.work,
                    "speedup": point.speedup,
                    **{
                        name: {"median_s": timing.median_s, "spread": timing.spread, "samples_s": timing.samples_s}
                        for name, timing in (("stock", point.stock), ("ours", point.ours))
                    },
                }
                for point in self.points
            ],
        }


def benchmark_gated_delta(settings: GatedDeltaSettings) -> GatedDeltaReport:
    """Compare, then measure.

    Raises:
        SettingsError: transformers would not run its PyTorch form here.
        WrongResultError: the two models differ; nothing is reported.
    """
    if importlib.util.find_spec("fla") is not None:
        raise SettingsError(
            "flash-linear-attention must not be installed: transformers would call its kernels, which need a GPU, "
            "where its PyTorch form is to be measured"
        )
    keep_freed_memory()
    environment = describe_environment("cpu")
    models = _models(settings)
    tokens = torch.randint(0, settings.vocab_size, (settings.batch_size, settings.num_tokens))
    differences = _compare(models, tokens)
    works: dict[str, dict[str, Callable[[], object]]] = {
        "prefill": {name: _prefill(model, tokens) for name, model in models.items()},
        # with one layer of softmax, without which a cache of transformers knows no length
        "decoded token": {name: _decode(model, tokens) for name, model in _models(settings, softmax=True).items()},
        "step of training": {name: _train(model, tokens) for name, model in models.items()},
        **_rules(settings),
    }
    points = []
    for work, calls in works.items():
        timings = time_interleaved(calls, "cpu", repeats=settings.repeats, time_limit_s=settings.time_limit_s)
        points.append(GatedDeltaPoint(work=work, **timings))
    return GatedDeltaReport(
        settings=settings,
        environment=environment,
        num_parameters=sum(p.numel() for p in models["stock"].parameters()),
        loss_difference=differences["loss"],
        gradient_difference=differences["gradient"],
        points=points,
    )


def _models(settings: GatedDeltaSettings, *, softmax: bool = False) -> dict[str, Any]:
    """Two models with the same weights; softmax adds a layer of it."""
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

    torch.manual_seed(settings.seed)
    config = Qwen3_5TextConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.num_layers + softmax,
        layer_types=["linear_attention"] * settings.num_layers + ["full_attention"] * softmax,
        num_attention_heads=max(1, settings.hidden_size // 64),
        num_key_value_heads=1,
        head_dim=64,
        linear_num_key_heads=settings.num_key_heads,
        linear_num_value_heads=settings.num_value_heads,
        linear_key_head_dim=settings.head_dim,
        linear_value_head_dim=settings.head_dim,
        max_position_embeddings=max(32768, settings.num_tokens),
    )
    stock = Qwen3_5ForCausalLM(config).eval()
    ours = deepcopy(stock)
    accelerate_gated_delta(ours)
    return {"stock": stock, "ours": ours}


def _compare(models: dict[str, Any], tokens: Tensor) -> dict[str, float]:
    losses, gradients = [], []
    for model in models.values():
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    found = {
        "loss": float((losses[1] - losses[0]).abs() / losses[0].abs()),
        "gradient": float((gradients[1] - gradients[0]).norm() / gradients[0].norm()),
    }
    for name, difference in found.items():
        if not difference < _TOLERANCE:
            raise WrongResultError(
                f"both models must have the same {name} to {_TOLERANCE:.0e}; they differ by {difference:.1e}"
            )
    return found


def _prefill(model: Any, tokens: Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def prefill() -> None:
        model(tokens, use_cache=False, logits_to_keep=1)

    return prefill


def _decode(model: Any, tokens: Tensor) -> Callable[[], object]:
    """A token behind the prompt; its cache goes on from call to call, at the same cost."""
    with torch.inference_mode():
        out = model(tokens, use_cache=True, logits_to_keep=1)
    name = "cache" if "cache" in out else "past_key_values"  # from transformers 5.24 on, and before
    cache = {name: out[name]}

    @torch.inference_mode()
    def decode() -> None:
        model(tokens[:, :1], use_cache=True, **cache)

    return decode


def _train(model: Any, tokens: Tensor) -> Callable[[], object]:
    model = deepcopy(model).train()  # what is decoded keeps its weights
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _rules(settings: GatedDeltaSettings) -> dict[str, dict[str, Callable[[], object]]]:
    """The rule alone: forward, forward and backward, and one token of it."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    B, T, G, H, D = (
        settings.batch_size,
        settings.num_tokens,
        settings.num_key_heads,
        settings.num_value_heads,
        settings.head_dim,
    )
    q, k = torch.randn(2, B, T, G, D).unbind()
    v, g, beta = torch.randn(B, T, H, D), -torch.rand(B, T, H), torch.rand(B, T, H)
    given = [x.requires_grad_() for x in (q, k, v, g, beta)]
    token = [x[:, :1].detach().contiguous() for x in given]
    kv = torch.randn(B, H, D, D)
    rules = {
        "stock": (modeling.torch_chunk_gated_delta_rule, modeling.torch_recurrent_gated_delta_rule),
        "ours": (chunk_gated_delta_rule, recurrent_gated_delta_rule),
    }
    found: dict[str, dict[str, Callable[[], object]]] = {
        "the rule": {},
        "the rule, training": {},
        "the rule, a token": {},
    }
    for name, (chunk, recurrent) in rules.items():

        @torch.inference_mode()
        def forward(chunk: Any = chunk) -> None:
            chunk(*(x.detach() for x in given), output_final_state=True, use_qk_l2norm_in_kernel=True)

        def both(chunk: Any = chunk) -> None:
            o, _ = chunk(*given, use_qk_l2norm_in_kernel=True)
            torch.autograd.grad(o, given, v.detach())

        @torch.inference_mode()
        def step(recurrent: Any = recurrent) -> None:
            recurrent(*token, initial_state=kv, output_final_state=True, use_qk_l2norm_in_kernel=True)

        for work, call in zip(found, (forward, both, step), strict=True):
            found[work][name] = call
    return found


def gated_delta_as_text(report: GatedDeltaReport) -> str:
    """The machine and one table."""
    about, s = report.environment, report.settings
    native: Any = about["native"]
    how = native["instruction_set"] if native else "no native library"
    threads = f"{about['threads']} thread{'' if about['threads'] == 1 else 's'}"
    where = f"{about['processor']} ({how}), {threads}, torch {torch.__version__}"
    heads = f"{s.num_key_heads} key heads and {s.num_value_heads} value heads of {s.head_dim}"
    size = f"{report.num_parameters / 1e6:.1f} M parameters"
    lines = [
        f"{where}, load {about['load_at_start']} before the start",
        f"Qwen3.5 of {size}, random, float32: {s.num_layers} layers, all linear, hidden size {s.hidden_size}, {heads};",
        f"{s.batch_size} x {s.num_tokens} tokens",
        "",
        "{:<20}{:>13}{:>8}{:>13}{:>8}{:>9}".format("", "transformers", "spread", "ours", "spread", "faster"),
    ]
    for point in report.points:
        times = [
            f"{timing.median_s * 1e3:>10.2f} ms{'-' if timing.spread is None else f'{timing.spread:.0%}':>8}"
            for timing in (point.stock, point.ours)
        ]
        lines.append(f"{point.work:<20}{times[0]}{times[1]}{point.speedup:>8.1f}x")
    loss, gradients = (f"{x:.0e}" for x in (report.loss_difference, report.gradient_difference))
    lines += ["", "decoded token: with one more layer, of softmax attention, as a cache of transformers needs it"]
    lines += [f"the two models' losses differ by {loss}, their gradients by {gradients} of their norm"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m cottention.benchmarks.gated_delta",
        description="Measure transformers' gated delta layers on a CPU beside the same layers on our operation.",
    )
    for field in fields(GatedDeltaSettings):
        kind: Any = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="(%(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/bench-gated-delta"), help="(%(default)s)")
    given = vars(parser.parse_args(arguments))
    directory = given.pop("output_dir")
    try:
        settings = GatedDeltaSettings(**given)
        with report_directory(directory):
            report = benchmark_gated_delta(settings)
            text = gated_delta_as_text(report)
            data = json.dumps(report.to_dict(), indent=1)
            write_texts({"gated_delta.json": data, "gated_delta.txt": text}, directory)
    except CottentionError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
