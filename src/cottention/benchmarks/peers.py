"""What is measured: every registered implementation of cosine attention, and the peers that can be had here.

All take q, k, v as projections give them, `[B, T, H, K]`, and return the same layout; what a peer has to rearrange for
that is part of its time, as it is for its users. Each comes with the plain float64 form of what it computes, so that it
is checked before it is timed.

    candidates, unavailable = find_candidates(settings)     # unavailable: {"fla-chunk": "not installed ..."}

An implementation's name may be followed by rules: native+decay, native+erase, native+decay+erase.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cottention.benchmarks.gates import RULES, gates_of
from cottention.benchmarks.settings import LAYERS, AttentionSettings, Workload
from cottention.errors import SettingsError, did_you_mean
from cottention.ops import IMPLEMENTATIONS, cosine_attention
from cottention.ops.naive import naive_cosine_attention

# (q, k, v, norm_const, causal) -> o
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]

# Not an implementation but the choice of one: measured when asked for, to see that it chooses well.
_DISPATCH = "auto"


class PeerUnavailableError(Exception):
    """This peer cannot be measured here; the message says why."""


def _takes_everything(workload: Workload) -> str | None:
    return None


def _needs_nothing(workload: Workload) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to measure.

    Attributes:
        name: how tables and figures call it.
        is_peer: somebody else's, another function than cosine attention.
        function: what is timed.
        reference: what it computes, in its plainest form.
        refuses: why it cannot run a workload; None when it can.
        set_up: makes what a workload needs beside its inputs, such as weights, before anything is measured.
    """

    name: str
    is_peer: bool
    function: Attention
    reference: Attention
    refuses: Callable[[Workload], str | None] = _takes_everything
    set_up: Callable[[Workload], None] = _needs_nothing


def find_candidates(settings: AttentionSettings) -> tuple[list[Candidate], dict[str, str]]:
    """Everything that was asked for and runs here.

    Returns:
        The candidates, implementations first, and for the others the reason why they are left out.

    Raises:
        SettingsError: a name is unknown, or something that was asked for by name does not run here.
    """
    candidates: list[Candidate] = []
    unavailable: dict[str, str] = {}
    for kind, known, given in (
        ("implementation", IMPLEMENTATIONS, settings.implementations),
        ("peer", PEERS, settings.peers),
    ):
        for name in _selected(kind, known, given):
            try:
                candidates.append(load_candidate(name, settings.device))
            except PeerUnavailableError as reason:
                if given is not None:
                    raise SettingsError(f"{kind} {name!r} cannot be measured here: {reason}") from reason
                unavailable[name] = str(reason)
    if not candidates:
        raise SettingsError("there is nothing to measure: name at least one implementation or peer")
    return candidates, unavailable


def load_candidate(name: str, device: str) -> Candidate:
    """The candidate of that name, imported and able to run on the device.

    Raises:
        PeerUnavailableError: it is not installed, or does not run there.
    """
    if _without_rules(name) in (*IMPLEMENTATIONS, _DISPATCH):
        return _implementation(name, device)
    return PEERS[name](device)


def _selected(kind: str, known: Iterable[str], given: tuple[str, ...] | None) -> list[str]:
    names = list(known)
    if given is None:
        return [name for name in names if name not in _ON_REQUEST]
    names += [_DISPATCH] if kind == "implementation" else []
    for name in given:
        if (_without_rules(name) if kind == "implementation" else name) not in names:
            expected = ", ".join(names)
            raise SettingsError(f"{kind} must be one of {expected}; got {name!r}{did_you_mean(name, names)}")
    return list(dict.fromkeys(given))


def _without_rules(name: str) -> str:
    """The implementation of a name such as native+decay; the name itself where no rules follow it."""
    implementation, *rules = name.split("+")
    return implementation if tuple(rules) in (RULES[:1], RULES[1:], RULES) else name


def cosine_reference(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
    """The paper's equations."""
    return naive_cosine_attention(q, k, v, norm_const, causal=causal)[0]


def softmax_reference(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
    """Softmax attention, quadratic."""
    scores = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~_lower_triangle(scores), -torch.inf)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)


def linear_reference(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
    """Linear attention without feature map, norm or divisor, quadratic: o_t = sum_{j <= t} (q_t . k_j) v_j."""
    scores = torch.einsum("bthk,bshk->bhts", q, k)
    return torch.einsum("bhts,bshv->bthv", scores * _lower_triangle(scores) if causal else scores, v)


def _lower_triangle(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()


def _implementation(name: str, device: str) -> Candidate:
    implementation, *rest = name.split("+")
    rules = tuple(rest)

    def run(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
        gates = gates_of(rules, q)
        return cosine_attention(q, k, v, norm_const, causal=causal, implementation=implementation, **gates)[0]

    def reference(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
        return naive_cosine_attention(q, k, v, norm_const, causal=causal, **gates_of(rules, q))[0]

    @cache
    def why_not(dtype: torch.dtype) -> str | None:
        """What it says itself when it does not run on this device, in this dtype, or was not built."""
        one = torch.ones(1, 1, 1, 16, device=device, dtype=dtype)
        try:
            run(one, one, one, torch.ones(1, device=device), True)
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            return " ".join(str(error).split())
        return None

    def refuses(workload: Workload) -> str | None:
        if "erase" in rules and not workload.causal:
            return "causal only"
        return why_not(getattr(torch, workload.dtype))

    if (reason := why_not(torch.float32)) is not None:
        raise PeerUnavailableError(reason)
    return Candidate(name=name, is_peer=False, function=run, reference=reference, refuses=refuses)


def _sdpa(device: str) -> Candidate:
    def run(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    return Candidate(name="sdpa", is_peer=True, function=run, reference=softmax_reference)


def _fla_chunk(device: str) -> Candidate:
    """flash-linear-attention's chunked form in PyTorch: its Triton kernels do not run on a CPU, yet it needs Triton."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says on import that there is no GPU
        try:
            from fla.ops.linear_attn.naive import naive_chunk_linear_attn  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise PeerUnavailableError(f"not installed: pip install flash-linear-attention triton ({error})") from error

    def run(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
        return naive_chunk_linear_attn(q, k, v, scale=1.0, normalize=False)

    def refuses(workload: Workload) -> str | None:
        if not workload.causal:
            return "causal only"
        return "takes multiples of 64 tokens only" if workload.length % 64 else None

    return Candidate(name="fla-chunk", is_peer=True, function=run, reference=linear_reference, refuses=refuses)


def _fast_transformers(device: str) -> Candidate:
    """pytorch-fast-transformers' causal product, a scan over tokens in C++; it builds where no nvcc is in the PATH."""
    try:
        from fast_transformers.causal_product import causal_dot_product  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PeerUnavailableError(f"not installed: pip install pytorch-fast-transformers ({error})") from error

    def run(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
        return causal_dot_product(*(x.transpose(1, 2).contiguous() for x in (q, k, v))).transpose(1, 2)

    def refuses(workload: Workload) -> str | None:
        if not workload.causal:
            return "causal only"
        return None if workload.dtype == "float32" else "float32 only"

    return Candidate(name="fast-transformers", is_peer=True, function=run, reference=linear_reference, refuses=refuses)


def _transformers_gated_delta(device: str) -> Candidate:
    """The form in PyTorch of Qwen3-Next's gated delta rule, which transformers runs on a CPU."""
    try:
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    except ImportError as error:
        raise PeerUnavailableError(f"not in this transformers ({error})") from error

    def run(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
        gates = gates_of(RULES, q)
        return torch_chunk_gated_delta_rule(
            q, k, v, g=gates["log_decay"], beta=gates["beta"].to(q.dtype), use_qk_l2norm_in_kernel=True
        )[0]

    def reference(q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor, causal: bool) -> Tensor:
        return naive_cosine_attention(q, k, v, None, causal=True, **gates_of(RULES, q))[0] * q.shape[-1] ** -0.5

    def refuses(workload: Workload) -> str | None:
        return None if workload.causal else "causal only"

    return Candidate(name="transformers-gated-delta", is_peer=True, function=run, reference=reference, refuses=refuses)


def _gpu_peer(name: str) -> Callable[[str], Candidate]:
    def load(device: str) -> Candidate:
        from cottention.benchmarks.peers_cuda import load_gpu_peer  # takes Candidate from here

        return load_gpu_peer(name, device)

    return load


def _layer(name: str) -> Callable[[str], Candidate]:
    def load(device: str) -> Candidate:
        from cottention.benchmarks.layers import load_layer  # takes Candidate from here

        return load_layer(name, device)

    return load


_GPU_PEERS = ("sdpa-flash", "sdpa-math", "fla-l2norm-chunk", "fla-l2norm-fused-chunk", "mamba-ssd")

PEERS: dict[str, Callable[[str], Candidate]] = {
    "sdpa": _sdpa,
    "fla-chunk": _fla_chunk,
    "fast-transformers": _fast_transformers,
    "transformers-gated-delta": _transformers_gated_delta,
    **{name: _gpu_peer(name) for name in _GPU_PEERS},
    **{name: _layer(name) for name in LAYERS},
}
"""Name -> what loads it for a device, or raises PeerUnavailableError."""

# Not what the operation without gates is measured beside.
_ON_REQUEST = ("transformers-gated-delta", *LAYERS)
