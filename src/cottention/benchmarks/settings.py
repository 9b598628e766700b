"""What a run of a benchmark measures. Knows no torch, so that `--help` answers at once.

settings = AttentionSettings(lengths=(4096, 16384, 65536), passes=("forward+backward",))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from cottention.errors import SettingsError, did_you_mean

DIRECTIONS = ("causal", "bidirectional")
PASSES = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = ("cpu", "cuda")
ARCHS = ("bert", "gpt")

# The tile whose scores count as useful work of the causal form, in tokens: the same for every implementation, so that
# GFLOP/s compare times and nothing else.
_COUNTED_TILE = 64
# Backward does 2.5 times the matrix products of forward, as is usual to count for attention.
_FORWARD_AND_BACKWARD = 3.5


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One shape in one dtype, direction and pass: what all candidates are timed on side by side."""

    direction: str
    passes: str
    dtype: str
    batch_size: int
    num_heads: int
    head_dim: int
    length: int

    @property
    def causal(self) -> bool:
        """Whether each token sees the past alone."""
        return self.direction == "causal"

    @property
    def backward(self) -> bool:
        """Whether gradients are computed too."""
        return self.passes == "forward+backward"

    @property
    def useful_flops(self) -> float:
        """Operations of linear attention, counted alike for everyone: 4 K V a token and head, causal + 64 (K + V)."""
        K = V = self.head_dim
        per_token = 4 * K * V + (_COUNTED_TILE * (K + V) if self.causal else 0)
        forward = per_token * self.batch_size * self.num_heads * self.length
        return forward * (_FORWARD_AND_BACKWARD if self.backward else 1)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch."""
        return self.batch_size * self.length

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[B, T, H, K]` of q, k and v."""
        return self.batch_size, self.length, self.num_heads, self.head_dim


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """What `cottention bench attention` measures, and how long it may take."""

    device: str = "cpu"
    """Where to run: cpu or cuda."""
    lengths: tuple[int, ...] = (128, 512, 2048, 8192)
    """Tokens T of a sequence."""
    head_dims: tuple[int, ...] = (64,)
    """K = V, numbers per head."""
    batch_heads: tuple[tuple[int, int], ...] = ((1, 8),)
    """Batch size and number of heads, (B, H)."""
    dtypes: tuple[str, ...] = ("float32",)
    """Floating-point types of q, k and v."""
    directions: tuple[str, ...] = ("causal",)
    """causal, bidirectional."""
    passes: tuple[str, ...] = PASSES
    """forward, forward+backward."""
    implementations: tuple[str, ...] | None = None
    """Names of cottention.ops.IMPLEMENTATIONS, +decay, +erase or +decay+erase behind them; None takes all that run."""
    peers: tuple[str, ...] | None = None
    """Names of cottention.benchmarks.peers.PEERS; None takes all that are installed."""
    repeats: int = 10
    """Timed samples of each point, as far as the time limit allows; 0 measures memory alone."""
    time_limit_s: float = 10.0
    """Seconds that one implementation may spend on one point; a longer call is skipped."""
    memory_limit_gib: float | None = None
    """Memory that one call and its inputs may need; None takes half of what is free."""
    processor_time: bool = False
    """Whether times on a CPU are of the processor, for a machine with other work; needs one thread."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        _check_choice("device", (self.device,), DEVICES)
        _check_choice("dtypes", self.dtypes, DTYPES)
        _check_choice("directions", self.directions, DIRECTIONS)
        _check_choice("passes", self.passes, PASSES)
        _check_sizes(
            lengths=self.lengths,
            head_dims=self.head_dims,
            batch_heads=tuple(itertools.chain(*self.batch_heads)),
        )
        if self.repeats < 0:
            raise SettingsError(f"repeats must be 0 (memory alone) or more; got {self.repeats}")
        _check_limits(time_limit_s=self.time_limit_s, memory_limit_gib=self.memory_limit_gib)

    def groups(self) -> Iterator[list[Workload]]:
        """Workloads that differ in length alone, shortest first: one table, one figure."""
        for passes, direction, dtype, (B, H), K in itertools.product(
            self.passes, self.directions, self.dtypes, self.batch_heads, self.head_dims
        ):
            yield [
                Workload(
                    direction=direction,
                    passes=passes,
                    dtype=dtype,
                    batch_size=B,
                    num_heads=H,
                    head_dim=K,
                    length=T,
                )
                for T in sorted(set(self.lengths))
            ]


FULL_GRID = {
    "lengths": (128, 512, 2048, 8192, 32768, 65536),
    "head_dims": (32, 64, 128),
    "batch_heads": ((1, 1), (1, 8), (8, 12)),
    "dtypes": ("float32", "bfloat16"),
    "repeats": 3,
    "time_limit_s": 0.5,
}
"""What `--full` measures instead of the defaults: 36 groups of six lengths.

A call that would take more than half a second is skipped, and one that needs more than half of the free memory, so that
five candidates take 216 * 5 * (0.5 + 0.5) s = 18 minutes at most for time and memory together.
"""


LAYERS = ("layer-cosine", "layer-softmax-matrix", "layer-softmax")
"""Whole attention layers: cosine, softmax that writes its T x T scores out, and softmax in one fused pass."""

PUBLISHED_SWEEPS = {
    "length": tuple((T, 16, 128) for T in (256, 512, 1024, 2048, 4096, 8192, 16384)),
    "width": tuple((1024, 16, width // 16) for width in (1024, 2048, 4096, 8192, 16384)),
    "heads": tuple((1024, H, 4096 // H) for H in (1, 2, 4, 8, 16, 32, 64)),
}
"""What the published figures vary, as shapes (T, H, K) of one layer on one text."""

QUICK_SWEEPS = {
    "length": tuple((T, 16, 128) for T in (256, 1024, 4096)),
    "width": tuple((512, 16, width // 16) for width in (512, 1024, 2048)),
    "heads": tuple((512, H, 1024 // H) for H in (1, 4, 16, 64)),
}
"""The same pictures in minutes: fewer and smaller shapes."""


@dataclass(frozen=True, kw_only=True)
class FigureSettings(AttentionSettings):
    """What `cottention bench figures` measures: one layer forward over lengths, widths and numbers of heads."""

    sweeps: dict[str, tuple[tuple[int, int, int], ...]] = field(default_factory=lambda: PUBLISHED_SWEEPS)
    """Picture -> shapes (T, H, K), of which one size grows."""
    positions: tuple[int, ...] = (16, 128, 1024, 8192, 65536)
    """Tokens before the one that is decoded."""
    directions: tuple[str, ...] = DIRECTIONS
    passes: tuple[str, ...] = PASSES[:1]
    implementations: tuple[str, ...] | None = ()
    peers: tuple[str, ...] | None = LAYERS
    repeats: int = 5
    time_limit_s: float = 60.0

    def groups(self) -> Iterator[list[Workload]]:
        """Each shape once: shapes that differ in length alone together, the others by themselves."""
        shapes = dict.fromkeys(shape for shapes in self.sweeps.values() for shape in shapes)
        for direction in self.directions:
            groups: dict[tuple[int, int], list[Workload]] = {}
            for T, H, K in sorted(shapes):
                workload = Workload(
                    direction=direction,
                    passes=self.passes[0],
                    dtype=self.dtypes[0],
                    batch_size=1,
                    num_heads=H,
                    head_dim=K,
                    length=T,
                )
                groups.setdefault((H, K), []).append(workload)
            yield from groups.values()


QUICK_FIGURES = {
    "sweeps": QUICK_SWEEPS,
    "positions": (16, 128, 1024, 8192),
    "repeats": 3,
    "time_limit_s": 30.0,
    "memory_limit_gib": 4.0,
}
"""What `--quick` measures instead of the defaults."""


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """What `cottention bench decode` measures: one token, on the CPU, at several positions of a text."""

    positions: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    """Tokens before the one that is decoded."""
    batch_sizes: tuple[int, ...] = (1,)
    """Sequences that are decoded together."""
    num_heads: int = 12
    """Heads H."""
    head_dim: int = 64
    """K = V, numbers per head."""
    dtype: str = "float32"
    """Floating-point type of q, k and v."""
    implementations: tuple[str, ...] | None = None
    """Names of cottention.benchmarks.decode.STEPS; None takes all that run here."""
    repeats: int = 20
    """Timed samples of each point, as far as the time limit allows."""
    time_limit_s: float = 5.0
    """Seconds that one implementation may spend at one position."""
    processor_time: bool = False
    """Whether times are of the processor, for a machine with other work; needs one thread."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        _check_choice("dtype", (self.dtype,), DTYPES)
        _check_sizes(
            positions=self.positions,
            batch_sizes=self.batch_sizes,
            num_heads=(self.num_heads,),
            head_dim=(self.head_dim,),
            repeats=(self.repeats,),
        )
        _check_limits(time_limit_s=self.time_limit_s)


PAIR_LENGTHS = {
    # Every 5 % of the lengths, [CLS] and [SEP] included, of next-sentence examples of at most 128 tokens from novels
    # and Wikipedia (16 MB), in WordPieces of a vocabulary of 8192.
    "sentences": (8, 24, 31, 35, 40, 44, 48, 51, 55, 58, 61, 65, 69, 73, 77, 83, 88, 95, 104, 121, 128),
    "filled": (20, 59, 69, 76, 83, 88, 92, 97, 100, 103, 106, 109, 112, 114, 117, 120, 122, 124, 126, 128, 128),
}
"""How long sentence pairs are: one sentence on each side, as the paper has it, or whole sentences up to the length."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What `cottention bench model` measures: steps of BERT, packed and padded, and whole models beside their twins."""

    arch: str = "bert"
    """"bert" or "gpt"; pairs are packed for a BERT alone."""
    lengths: tuple[int, ...] = (128, 512)
    """Tokens of the rows that whole models are measured on; as many rows as make batch_size x 128 tokens."""
    mixes: tuple[str, ...] = ("sentences", "filled")
    """Names in PAIR_LENGTHS."""
    attention_type: str = "cosine"
    """"cosine" or "softmax"."""
    dtype: str = "float32"
    """What is computed in: float32, or bfloat16 under autocast. Losses are compared in float32."""
    device: str = "cpu"
    """Where to run: cpu or cuda."""
    batch_size: int = 32
    """Sentence pairs of a step."""
    hidden_size: int = 256
    """Width of the model."""
    num_layers: int = 4
    """Its layers."""
    num_heads: int = 4
    """Attention heads."""
    vocab_size: int = 8192
    """Words it knows."""
    repeats: int = 9
    """Timed steps of each, as far as the time limit allows."""
    time_limit_s: float = 30.0
    """Seconds that one of both may spend on a mix."""
    seed: int = 0
    """Of weights, lengths and tokens."""
    processor_time: bool = False
    """Whether times on a CPU are of the processor, for a machine with other work; needs one thread."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        _check_choice("arch", (self.arch,), ARCHS)
        _check_choice("mixes", self.mixes, tuple(PAIR_LENGTHS))
        _check_choice("attention_type", (self.attention_type,), ("cosine", "softmax"))
        _check_choice("dtype", (self.dtype,), DTYPES[:2])
        _check_choice("device", (self.device,), DEVICES)
        names = ("batch_size", "hidden_size", "num_layers", "num_heads", "vocab_size", "repeats")
        _check_sizes(lengths=self.lengths, **{name: (getattr(self, name),) for name in names})
        if self.hidden_size % self.num_heads:
            raise SettingsError(f"num_heads must divide hidden_size; got {self.num_heads} and {self.hidden_size}")
        _check_limits(time_limit_s=self.time_limit_s)


def _check_sizes(**sizes: tuple[int, ...]) -> None:
    for name, values in sizes.items():
        if not values or min(values) < 1:
            raise SettingsError(f"{name} must be whole numbers of at least 1; got {values}")


def _check_limits(**limits: float | None) -> None:
    for name, limit in limits.items():
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            raise SettingsError(f"{name} must be more than 0; got {limit}")


def _check_choice(name: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not given:
        raise SettingsError(f"{name} must name at least one of {', '.join(known)}")
    for each in given:
        if each not in known:
            raise SettingsError(f"{name} must be of {', '.join(known)}; got {each!r}{did_you_mean(each, known)}")
