"""Whole attention layers as candidates: projections, attention, output projection, as published figures measure them.

A layer takes one tensor of tokens, `[B, T, H K]`, for which q is taken as it lies; k and v are not looked at. Weights
are made before a call is measured, by `set_up`, and count as no part of it.

    candidate = load_layer("layer-cosine", "cpu")
    candidate.set_up(workload)
    o = candidate.function(q, k, v, norm_const, True)       # [B, T, H, K]
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cottention.benchmarks.peers import Candidate
from cottention.benchmarks.settings import LAYERS, Workload
from cottention.layers import CosineAttention, SoftmaxAttention

_COSINE, _MATRIX, _FUSED = LAYERS

Key = tuple[bool, int, int, torch.dtype]
"""Causal, H, K and the dtype of the weights: what one layer is made for."""


def load_layer(name: str, device: str) -> Candidate:
    """The layer of that name in `settings.LAYERS`."""

    @lru_cache(maxsize=2)  # two dtypes of a shape are timed in turns
    def layer_for(*key: Any) -> torch.nn.Module:
        return _new_layer(name, key).to(device)

    def run(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
        layer = layer_for(causal, q.shape[2], q.shape[3], q.dtype)
        with sdpa_kernel(SDPBackend.MATH) if name == _MATRIX else nullcontext():
            return layer(q.flatten(2))[0].view(q.shape)

    def reference(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
        # Drawn in float32, as those that it is a reference for.
        layer = _new_layer(name, (causal, q.shape[2], q.shape[3], torch.float32)).to(q)
        if name == _COSINE:
            layer.implementation = "naive"
            return layer(q.flatten(2))[0].view(q.shape)
        return layer(q.flatten(2), maps=[])[0].view(q.shape)  # the matrix itself, computed here

    def set_up(workload: Workload) -> None:
        dtype = getattr(torch, workload.dtype)
        layer_for(workload.causal, workload.num_heads, workload.head_dim, dtype)

    return Candidate(name=name, is_peer=name != _COSINE, function=run, reference=reference, set_up=set_up)


def _new_layer(name: str, key: Key) -> Any:
    """The same weights for every kind of layer, direction and dtype."""
    causal, num_heads, head_dim, dtype = key
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = (CosineAttention if name == _COSINE else SoftmaxAttention)(
            num_heads * head_dim, num_heads, causal=causal
        )
    return layer.to(dtype).requires_grad_(False)
