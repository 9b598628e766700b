"""Times calls on a GPU by its own events, each from a cold cache.

A call that starts with its inputs in the L2 cache is faster than it can be in a model, where hundreds of megabytes lie
between one layer and the next. Before each call a buffer larger than the cache is written, outside of the timed span;
while the GPU writes, the CPU runs ahead, so that launching is not what is measured.

    seconds_on_gpu(call, num_calls=20)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# The largest L2 in sight is 256 MB (MI300's last level); others have 40 to 126.
_FLUSHED_BYTES = 512 << 20


def seconds_on_gpu(call: Callable[[], object], num_calls: int) -> float:
    """Mean seconds of a call, from its first kernel's start to its last one's end."""
    spans = []
    for _ in range(num_calls):
        _flush_buffer(torch.cuda.current_device()).zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in spans) / 1e3 / num_calls


@cache
def _flush_buffer(device: int) -> Tensor:
    return torch.empty(_FLUSHED_BYTES // 4, dtype=torch.int32, device=f"cuda:{device}")
