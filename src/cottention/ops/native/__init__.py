"""The fused C++ kernels for the CPU: forward, backward and the decode step, compiled at install, loaded without torch.

Everything that the operation does to a token (norm, divisor, mask, state, score tile, and their gradients) happens in
one pass over the tokens while a chunk lies in the cache; see `src/sweeps.h` for the passes, `src/erase.h` for those of
the delta rule, `src/schedule.cpp` for the threads and `binding.py` for the interface between the two languages.

    o, state = cosine_attention(q, k, v, norm_const, causal=True, implementation="native")     # on the CPU, not float64
"""

from __future__ import annotations

from cottention.ops.native.binding import is_available

__all__ = ["is_available"]
