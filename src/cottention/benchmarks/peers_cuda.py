"""The peers on a GPU: softmax attention by each of torch's kernels, flash-linear-attention, Mamba-2's scan.

flash-linear-attention normalises queries and keys in a kernel of its own, which is part of its time, as it is for
whoever trains with it. None of them has cosine attention's divisor. `peers.PEERS` names them.

    candidate = load_gpu_peer("fla-l2norm-chunk", "cuda")
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cottention.benchmarks.peers import Candidate, PeerUnavailableError, linear_reference, softmax_reference
from cottention.benchmarks.settings import Workload

_FLA_EPS = 1e-6  # its norm divides by sqrt(||x||^2 + eps), not by max(||x||, 1e-12)
_SSD_CHUNK = 256  # Mamba-2's own


def load_gpu_peer(name: str, device: str) -> Candidate:
    """The peer of that name, imported.

    Raises:
        PeerUnavailableError: it is not installed, or the device is no GPU.
    """
    if device == "cpu":
        raise PeerUnavailableError("its kernels run on a GPU alone: --device cuda")
    return _LOADERS[name](name)


def _sdpa(backend: SDPBackend) -> Callable[[str], Candidate]:
    def load(name: str) -> Candidate:
        def run(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

        def refuses(workload: Workload) -> str | None:
            if backend == SDPBackend.FLASH_ATTENTION and workload.dtype not in ("bfloat16", "float16"):
                return "bfloat16 and float16 only"
            return None

        return Candidate(name=name, is_peer=True, function=run, reference=softmax_reference, refuses=refuses)

    return load


def _fla(operator: str) -> Callable[[str], Candidate]:
    def load(name: str) -> Candidate:
        attend = getattr(_import("fla.ops.linear_attn", "flash-linear-attention"), operator)
        normalise = _import("fla.modules.l2norm", "flash-linear-attention").l2norm

        def run(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
            return attend(normalise(q), normalise(k), v, scale=1.0, normalize=False)[0]

        def reference(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
            q, k = (x / (x.square().sum(-1, keepdim=True) + _FLA_EPS).sqrt() for x in (q, k))
            return linear_reference(q, k, v, norm_const, causal)

        return Candidate(name=name, is_peer=True, function=run, reference=reference, refuses=_causal_alone)

    return load


def _mamba_ssd(name: str) -> Candidate:
    """Mamba-2's chunked scan without decay, which is linear attention: x = v, B = k, C = q, dt = 1, A = 0."""
    scan = _import("mamba_ssm.ops.triton.ssd_combined", "mamba-ssm").mamba_chunk_scan_combined

    def run(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
        dt = torch.ones(v.shape[:3], dtype=v.dtype, device=v.device)
        decay = torch.zeros(v.shape[2], dtype=torch.float32, device=v.device)
        return scan(v, dt, decay, k, q, chunk_size=_SSD_CHUNK)

    return Candidate(name=name, is_peer=True, function=run, reference=linear_reference, refuses=_causal_alone)


def _causal_alone(workload: Workload) -> str | None:
    return None if workload.causal else "causal only"


def _import(module: str, package: str) -> ModuleType | Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise PeerUnavailableError(f"not installed: pip install {package} ({error})") from error


_LOADERS: dict[str, Callable[[str], Candidate]] = {
    "sdpa-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-math": _sdpa(SDPBackend.MATH),
    "fla-l2norm-chunk": _fla("chunk_linear_attn"),
    "fla-l2norm-fused-chunk": _fla("fused_chunk_linear_attn"),
    "mamba-ssd": _mamba_ssd,
}
