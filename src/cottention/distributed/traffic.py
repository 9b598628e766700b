"""What collectives move: counted where they are called, and said by formula.

with count_traffic() as traffic:
    model(**slice_batch(model, batch)).loss.backward()
traffic.num_bytes["gather"], traffic.calls["gather"]
traffic_of_layer(ranks=8, rows=1, heads=16, key_dim=64, value_dim=64).gathered
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The operators under torch.distributed's functions -> what they are, and which argument is as large as what is moved.
_COLLECTIVES = {
    "_allgather_base_": ("gather", 0),
    "_reduce_scatter_base_": ("scatter", 1),
    "allreduce_": ("sum", 0),
}


class Traffic:
    """Collectives that one rank took part in.

    Attributes:
        num_bytes: by kind ("gather", "scatter", "sum"), of everyone's part of a gather or scatter, of a sum's tensor.
        calls: how many there were.
    """

    def __init__(self) -> None:
        self.num_bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.num_bytes.values())


class _Counting(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, position = _COLLECTIVES.get(func.__name__.partition(".")[0], (None, 0))
            if kind is not None:
                moved = args[position]
                tensors = moved if isinstance(moved, list | tuple) else [moved]
                self._traffic.calls[kind] += 1
                self._traffic.num_bytes[kind] += sum(x.nbytes for x in tensors)
        return func(*args, **(kwargs or {}))


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count this rank's collectives of the block, those of its backward passes on a CPU included."""
    traffic = Traffic()
    with _Counting(traffic):
        yield traffic


class LayerTraffic(NamedTuple):
    """Bytes of one layer's forward pass on a rank; its backward pass moves the floating-point ones again.

    Attributes:
        gathered: states (causal, or with decay), and inputs of short convolutions, of all ranks.
        summed: the one state of a bidirectional layer without decay.
        counts: numbers of real tokens.
    """

    gathered: int
    summed: int
    counts: int


def traffic_of_layer(
    *,
    ranks: int,
    rows: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    causal: bool = True,
    decay: bool = False,
    erase: bool = False,
    short_conv: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LayerTraffic:
    """What a cosine layer exchanges for padded rows; the number of tokens is no part of it.

    Args:
        ranks: R, that share each sequence.
        rows: B.
        heads: H.
        key_dim: K.
        value_dim: V.
        causal: or bidirectional.
        decay: whether the layer forgets.
        erase: whether it erases.
        short_conv: width of its convolutions.
        dtype: of the tokens; states are float32, of float64 tokens float64.
    """
    state = 8 if dtype == torch.float64 else 4
    size = key_dim * value_dim
    halo = ranks * rows * (max(short_conv, 1) - 1) * (heads * (2 * key_dim + value_dim) + 1) * dtype.itemsize
    if not causal and not decay:
        return LayerTraffic(halo, rows * heads * size * state, 8 * (rows + 1))
    if not causal:
        return LayerTraffic(halo + ranks * rows * heads * 2 * (size + 1) * state, 0, 8 * (rows + 1))
    extra = key_dim * key_dim if erase else int(decay)
    return LayerTraffic(halo + ranks * rows * heads * (size + extra) * state, 0, 8 * ranks * rows)
