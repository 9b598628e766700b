"""Whether two users of the cores disturb each other: torch.mm and the attention in turns, against each by itself.

Threads of one that keep spinning while the other works would show as a factor of two and more. Each round times a run
of either alone and then both in turns, so that a busy moment of the machine hits all of it.

    python -m cottention.benchmarks.interference
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cottention.ops import cosine_attention

_MATRIX = 1024
_SHAPE = (1, 2048, 8, 64)
_CALLS = 4  # in a row; the first of a run follows the other user and is not of the "alone" figure


@dataclass(frozen=True, kw_only=True)
class Interference:
    """Median seconds of a call."""

    matmul_alone_s: float
    attention_alone_s: float
    matmul_in_turns_s: float
    attention_in_turns_s: float

    @property
    def matmul_ratio(self) -> float:
        """How many times as long torch.mm takes right behind an attention; 1: not disturbed."""
        return self.matmul_in_turns_s / self.matmul_alone_s

    @property
    def attention_ratio(self) -> float:
        """How many times as long an attention takes right behind torch.mm."""
        return self.attention_in_turns_s / self.attention_alone_s


def measure_interference(implementation: str = "native", rounds: int = 20) -> Interference:
    """Time both users, alone and in turns."""
    a, b = torch.randn(_MATRIX, _MATRIX), torch.randn(_MATRIX, _MATRIX)
    out = torch.empty_like(a)
    q, k, v = (torch.randn(_SHAPE) for _ in range(3))
    norm_const = torch.full((_SHAPE[2],), 0.5)

    def matmul() -> object:
        return torch.mm(a, b, out=out)

    def attention() -> object:
        return cosine_attention(q, k, v, norm_const, causal=True, implementation=implementation)

    seconds: dict[str, list[float]] = {
        name: [] for name in ("matmul", "attention", "matmul behind", "attention behind")
    }
    with torch.no_grad():
        for _ in range(rounds):
            for name, call in (("matmul", matmul), ("attention", attention)):
                seconds[name] += [_seconds(call) for _ in range(_CALLS)][1:]
            for _ in range(_CALLS - 1):
                seconds["matmul behind"].append(_seconds(matmul))
                seconds["attention behind"].append(_seconds(attention))
    medians = [statistics.median(taken) for taken in seconds.values()]
    return Interference(
        matmul_alone_s=medians[0],
        attention_alone_s=medians[1],
        matmul_in_turns_s=medians[2],
        attention_in_turns_s=medians[3],
    )


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _main() -> None:
    found = measure_interference()
    print(f"{torch.get_num_threads()} threads, alone and in turns with the other, ms (median)")
    for name, alone, behind, ratio in (
        (f"torch.mm {_MATRIX}^3", found.matmul_alone_s, found.matmul_in_turns_s, found.matmul_ratio),
        (f"native {_SHAPE}", found.attention_alone_s, found.attention_in_turns_s, found.attention_ratio),
    ):
        print(f"{name:<26}{alone * 1e3:>9.3f}{behind * 1e3:>9.3f}   x{ratio:.2f}")


if __name__ == "__main__":
    _main()
