"""Which tiles, warps and segments a call runs with: a small fixed table and two rules, no tuning at run time.

The first call of a shape class compiles its kernels in seconds; nothing is measured then or later. For experiments

    with override(forward=Tiles(block_tokens=32, tile=64, num_warps=4, num_stages=2), segment_tokens=512):
        cosine_attention(q, k, v, m, causal=True, implementation="triton")

replaces entries for the whole process, backward included (autograd runs it in a thread of its own).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from cottention.ops.autocast import without_autocast
from cottention.ops.triton.table import DECAY, DECAY_FOUR_WARPS, FOUR_WARPS, TABLE, WIDTHS

# Programs of one wave, two a multiprocessor: below that, more segments pay for their states.
_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
_PROGRAMS_EACH = 2
# A state is written, summed and read again in float32. Four times as many tokens as its rows keep that at an eighth of
# the bytes of a bfloat16 segment, and the memory at 1/16 of inputs and output.
_TOKENS_PER_STATE_ROW = 4
_SEGMENT_MULTIPLE = 128  # of every block_tokens

MAX_HEAD_DIM = WIDTHS[-1]


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut and compiled."""

    block_tokens: int
    """Tokens in a tile, BT: a power of two, at least 16."""
    tile: int
    """Dimensions of the output in a tile, BZ: a power of two, at least 16."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a call needs beside its shapes."""

    forward: Tiles
    backward: Tiles
    short_forward: Tiles
    """The quadratic form."""
    short_backward: Tiles
    num_programs: int
    """Programs that fill the device."""
    short_up_to: int = 512
    """Tokens up to which the quadratic form may run while it does not fill the device."""
    segment_tokens: int | None = None
    """Tokens of a segment, 0 for the quadratic form; None: by the rule."""
    precision: str | None = None
    """Products of float32 tiles: ieee, tf32x3 or tf32. None: ieee, unless torch.set_float32_matmul_precision says high
    or medium."""


def pad(dim: int) -> int:
    """The power of two that holds a head dim, as tiles need it; 16 at least, for tensor cores."""
    return next(size for size in WIDTHS if dim <= size)  # comparisons alone: a traced dim becomes a guard


def architecture(device: torch.device) -> str:
    """The entry of the table: of the device itself, or of the next older one; sm_90 where kernels are interpreted."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def compiler_options(device: torch.device) -> dict[str, int]:
    """What every kernel is compiled with beside its tiles.

    Left to itself ptxas spills a register or two to stay on a step of the occupancy; told the machine's limit of
    registers a thread, it does not. AMD's compiler has no such option.
    """
    return {"maxnreg": 255} if architecture(device).startswith("sm_") else {}


@cache
def has_race_of_warps() -> bool:
    """Whether the installed Triton lets the warps of a program of 8 race on sm_100: before 3.8 (its issue 10590)."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)


_overrides: dict[str, Any] = {}


@contextmanager
def override(**fields: Any) -> Iterator[None]:
    """Replace fields of every `Config` inside the block, in all threads."""
    unknown = set(fields) - set(Config.__dataclass_fields__)
    if unknown:
        raise ValueError(f"override takes fields of Config, {', '.join(Config.__dataclass_fields__)}; got {unknown}")
    before = dict(_overrides)
    _overrides.update(fields)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


@torch.compiler.assume_constant_result
def choose(device: torch.device, dtype: torch.dtype, width: int, *, forgets: bool = False) -> Config:
    """The configuration of a call whose larger padded head dim is `width`, with what `override` says.

    torch.compile takes it as it is when tracing: the device and the settings of a process are not to be looked up.
    """
    arch = architecture(device)
    # tf32x3 stands between the two, and is given the smaller tiles
    kind = {"tf32x3": "ieee"}.get(arithmetic(dtype), arithmetic(dtype))
    entries = TABLE[arch][kind, width]
    has_race = arch == "sm_100" and has_race_of_warps()
    if has_race:
        entries = FOUR_WARPS.get((kind, width), entries)
    if forgets:
        own = DECAY[arch].get((kind, width), entries[:2])
        own = DECAY_FOUR_WARPS.get((kind, width), own) if has_race else own
        entries = (*own, *entries[2:])
    forward, backward, short_forward, short_backward = (Tiles(*entry) for entry in entries)
    config = Config(
        forward=forward,
        backward=backward,
        short_forward=short_forward,
        short_backward=short_backward,
        num_programs=_MULTIPROCESSORS[arch] * _PROGRAMS_EACH,
    )
    return replace(config, **_overrides)


def arithmetic(dtype: torch.dtype) -> str:
    """How tiles of a dtype are multiplied: bf16, tf32 or ieee.

    float16 goes to tensor cores as tf32, which has its 10 bits and float32's range: neither sums over many tokens nor
    gradients under a loss scale overflow.
    """
    if dtype == torch.bfloat16:
        return "bf16"
    if dtype == torch.float16:
        return "tf32"
    precision = _overrides.get("precision")
    if precision is None:
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return precision


def segment_length(
    config: Config, sequences: int, H: int, T: int, S: int, K: int, V: int, causal: bool, states: bool
) -> int:
    """Tokens of a segment; -1: each sequence is one, 0: the quadratic form.

    Quadratic where that is less arithmetic, T (K + V) / 2 a token (twice that without the causal half) against 2 K V
    and half a chunk, or where T is at most `short_up_to` and heads and tiles do not fill the device.
    Else one segment a sequence where they do, and where they do not segments long enough to be worth their state.
    """
    programs = sequences * H * -(-pad(V) // min(pad(V), config.forward.tile))
    fills = programs >= config.num_programs
    longest = max(T, S)
    if config.segment_tokens is not None:
        return -1 if config.segment_tokens >= longest else config.segment_tokens
    if not states:
        equal = 2 * K * V // (K + V)
        equal = 2 * equal + config.forward.block_tokens if causal else equal
        if longest <= equal or (longest <= config.short_up_to and not fills):
            return 0
    if fills:
        return -1
    fair = -(-programs * longest // (2 * config.num_programs))
    length = round_up(max(fair, _TOKENS_PER_STATE_ROW * max(pad(K), pad(V))))
    return -1 if length >= longest else length


def round_up(tokens: int) -> int:
    """The next length of a segment that every tile divides."""
    return -(-tokens // _SEGMENT_MULTIPLE) * _SEGMENT_MULTIPLE


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function of a tensor and more where Triton launches on that tensor's device, without autocast."""

    @wraps(function)
    def wrapper(first: Tensor, *others: Any) -> Any:
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return function(first, *others)

    return without_autocast(wrapper)
