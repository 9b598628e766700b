"""The fused C++ kernels for the CPU: forward, backward and the decode step, compiled at install, loaded without torch.

Everything that the operation does to a token (norm, divisor, mask, state, score tile, and their gradients) happens in
one pass over the tokens while a chunk lies in the cache; see `src/sweeps.h` for the passes, `src/schedule.cpp` for the
threads and `binding.py` for the interface between the two languages.

    o, state = native_cosine_attention(q, k, v, norm_const, causal=True)      # CPU; float32, bfloat16, float16
"""

from __future__ import annotations

from cottention.ops.native.attention import native_cosine_attention
from cottention.ops.native.binding import is_available

__all__ = ["is_available", "native_cosine_attention"]
