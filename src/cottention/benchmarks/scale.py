"""What a training step costs at a size, a length and a number of GPUs that nobody has here: a simulator, and its table.

    python -m cottention.benchmarks.scale                               # the table of docs/scale.md
    python -m cottention.benchmarks.scale --linear-tflops 300           # with a rate that was measured

Every number is a formula of this file and of the assumptions in `Machine`, none of which was measured on such GPUs.
A step has a fixed number of tokens; ranks share sequences (R of them each) as far as rows are too few or too long, the
others divide the rows; weights, gradients and AdamW are sharded over all (FSDP2), blocks are recomputed in backward.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

_GB = 1e9
_CHUNK = 64  # tokens of a tile of the chunked form
_TOKENS_A_STEP = 1 << 22
_TOKENS_A_PASS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs and what joins them; the defaults are an H100's data sheet and shares of it that are usual."""

    memory_gb: float = 80.0
    """Of each GPU; a tenth stays free."""
    linear_tflops: float = 400.0
    """bfloat16 rate of matrix products in a block: 40 % of 989."""
    attention_tflops: float = 100.0
    """Of the cosine operation, whose products are small."""
    softmax_tflops: float = 350.0
    """Of flash attention, forward and backward together."""
    near_gb_s: float = 300.0
    """What a GPU sends within a node of 8."""
    far_gb_s: float = 40.0
    """What a GPU sends between nodes: 400 Gbit/s each, at 80 %."""
    latency_us: float = 20.0
    """Of a collective, for each doubling of its ranks."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A GPT."""

    name: str
    layers: int
    width: int
    heads: int
    inner: int
    vocab: int = 50400

    @property
    def head_dim(self) -> int:
        """K and V."""
        return self.width // self.heads

    @property
    def block_parameters(self) -> int:
        """Of all blocks; norms and biases are a thousandth."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.inner)

    @property
    def parameters(self) -> int:
        """With embedding and head."""
        return self.block_parameters + 2 * self.vocab * self.width


MODELS = (
    Model(name="300M", layers=20, width=1024, heads=16, inner=3072),
    Model(name="1.2B", layers=20, width=2048, heads=16, inner=8192),
    Model(name="7B", layers=32, width=4096, heads=32, inner=16384),
)
LENGTHS = (1 << 10, 1 << 14, 1 << 17, 1 << 20)
GPUS = (8, 64, 1024)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A step.

    Attributes:
        sequence: R, ranks that share each row.
        memory_gb: on each GPU.
        step_s: seconds of a step.
        exchange_share: of them in the exchange of states.
        softmax_step_s: the same step with softmax layers that gather keys and values.
    """

    sequence: int
    memory_gb: float
    step_s: float
    exchange_share: float
    softmax_step_s: float


def rows_at_a_time(length: int, rows: int) -> int:
    """Rows of a pass: short ones together."""
    return max(1, min(rows, _TOKENS_A_PASS // length))


def memory_of(model: Model, length: int, gpus: int, sequence: int) -> float:
    """Bytes on a GPU, with slices of b rows at a time.

    16 P / N        weights, gradients and two moments in float32, sharded
    4 P / L         two blocks' weights in bfloat16, gathered
    2 D L t         what enters each block, kept for its recomputation; t = b T / R
    2 (14 D + 2 I) t    the activations of the one block that is being differentiated, bfloat16
    2 b R H K V 4   the states of all slices, forward and backward, of one layer
    """
    together = rows_at_a_time(length, _rows_of(length, gpus, sequence))
    tokens = together * length / sequence
    state = model.heads * model.head_dim**2 * 4
    return (
        16 * model.parameters / gpus
        + 4 * model.parameters / model.layers
        + 2 * model.width * model.layers * tokens
        + 2 * (14 * model.width + 2 * model.inner) * tokens
        + 2 * together * sequence * state
    )


def cost_of(model: Model, length: int, gpus: int, machine: Machine) -> Cost | None:
    """The step with the fewest ranks to a row that fit; None: it fits with none."""
    rows = _TOKENS_A_STEP // length
    sequence = max(1, gpus // rows)
    while memory_of(model, length, gpus, sequence) > 0.9 * machine.memory_gb * _GB:
        sequence *= 2
        if sequence > gpus:
            return None
    own_rows = _rows_of(length, gpus, sequence)
    passes = math.ceil(own_rows / rows_at_a_time(length, own_rows))  # one after the other, on a group of R
    tokens = own_rows * length / sequence  # of a GPU in a step
    own = _compute_s(model, tokens, machine, None)
    weights = passes * 8 * model.parameters / _speed(gpus, machine)  # gathered twice and scattered: 2 + 2 + 4 bytes
    exchange = own_rows * _exchange_s(model, sequence, machine)
    softmax = _compute_s(model, tokens, machine, length)
    # keys and values, bfloat16, forward, again in the recomputation, and their gradients
    keys = own_rows * model.layers * 3 * 4 * model.width * length / _speed(sequence, machine) * (sequence > 1)
    step = max(own, weights) + exchange
    return Cost(
        sequence=sequence,
        memory_gb=memory_of(model, length, gpus, sequence) / _GB,
        step_s=step,
        exchange_share=exchange / step,
        softmax_step_s=max(softmax, weights) + keys,
    )


def _rows_of(length: int, gpus: int, sequence: int) -> int:
    """Rows of a group of R in a step."""
    return math.ceil(_TOKENS_A_STEP / length / (gpus // sequence))


def _compute_s(model: Model, tokens: float, machine: Machine, softmax_length: int | None) -> float:
    """Forward, its recomputation, and a backward of twice the forward; the head is not recomputed."""
    linear = tokens * (4 * 2 * model.block_parameters + 3 * 2 * model.vocab * model.width)
    if softmax_length is None:  # q_hat S, k_hat^T v, and C (K + V) within a tile
        attention = 2 * model.heads * (2 * model.head_dim**2 + 2 * _CHUNK * model.head_dim)
        rate = machine.attention_tflops
    else:  # q k^T and its product with v, of half of the pairs
        attention, rate = 2 * softmax_length * model.width, machine.softmax_tflops
    return linear / (machine.linear_tflops * 1e12) + 4 * tokens * model.layers * attention / (rate * 1e12)


def _exchange_s(model: Model, sequence: int, machine: Machine) -> float:
    """States of all layers, forward, recomputed and backward, as if nothing were computed meanwhile."""
    if sequence == 1:
        return 0.0
    moved = 3 * exchanged_bytes(model, sequence) + 2 * 8 * sequence  # and counts, which have no gradient
    return model.layers * (moved / _speed(sequence, machine) + 5 * machine.latency_us * 1e-6 * math.log2(sequence))


def exchanged_bytes(model: Model, ranks: int) -> int:
    """What a layer gathers of states, as `cottention.distributed.traffic_of_layer` says, without torch."""
    return 4 * ranks * model.heads * model.head_dim**2


def _speed(ranks: int, machine: Machine) -> float:
    """Bytes a second of a rank in a collective of so many."""
    return (machine.near_gb_s if ranks <= 8 else machine.far_gb_s) * _GB


def table(machine: Machine) -> str:
    """The table, in Markdown."""
    lines = [
        "| model | tokens a row | GPUs | ranks a row | GB a GPU | s a step | of it states | softmax, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for length in LENGTHS:
            for gpus in GPUS:
                cost = cost_of(model, length, gpus, machine)
                figures = "does not fit | | | |"
                if cost is not None:
                    figures = (
                        f"{cost.sequence} | {cost.memory_gb:.1f} | {cost.step_s:.3g} | {cost.exchange_share:.1%} | "
                        f"{cost.softmax_step_s:.3g} |"
                    )
                lines.append(f"| {model.name} | {length:,} | {gpus:,} | {figures}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table for the machine that the flags describe."""
    parser = argparse.ArgumentParser(
        prog="python -m cottention.benchmarks.scale", description="Print the table of docs/scale.md."
    )
    for field in dataclasses.fields(Machine):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    print(table(Machine(**vars(parser.parse_args(argv)))))


if __name__ == "__main__":
    main()
