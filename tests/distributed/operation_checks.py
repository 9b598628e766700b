"""What `test_sequence.py` runs on every rank: attention over slices against attention over the whole sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cottention import CosineState, cosine_attention


class Case(NamedTuple):
    """A call, and how its tokens are cut."""

    lengths: tuple[int, ...]
    causal: bool = True
    options: tuple[str, ...] = ()  # mask, packed, decay, beta, state, final, cross, no_divisor
    bounds: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64
    implementation: str = "auto"
    sizes: tuple[int, int, int, int] = (2, 3, 4, 5)  # B H K V


def arguments(case: Case) -> dict[str, Any]:
    """The arguments for the whole sequence, leaves that want gradients."""
    generator = torch.Generator().manual_seed(hash(case.lengths) % 1000)
    B, H, K, V = case.sizes
    T, has = sum(case.lengths), case.options
    B = 1 if case.bounds else B
    S = T + 3 * len(case.lengths) if "cross" in has else T
    exact = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = exact) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    found: dict[str, Any] = {
        "q": normal(B, T, H, K, dtype=case.dtype),
        "k": normal(B, S, H, K, dtype=case.dtype),
        "v": normal(B, S, H, V, dtype=case.dtype),
        "norm_const": None if "no_divisor" in has else normal(H),
    }
    if "decay" in has:
        found["log_decay"] = -normal(B, T, H).abs() / 4
        if T:
            found["log_decay"][0, T // 2] = -50
    if "beta" in has:
        found["beta"] = torch.rand(B, T, H, generator=generator, dtype=torch.float64).to(exact) * 2
    if "mask" in has:
        found["attention_mask"] = torch.rand(B, S, generator=generator) > 0.3
        found["attention_mask"][0, : case.lengths[0] + 1] = False  # a slice without a real token
    N = B
    if case.bounds:
        found["cu_seqlens"] = torch.tensor(case.bounds, dtype=torch.int32)
        N = len(case.bounds) - 1
    for x in found.values():
        if x is not None and x.dtype.is_floating_point:
            x.requires_grad_()
    if "state" in has:
        kv = normal(N, H, K, V).requires_grad_()
        found["initial_state"] = CosineState(kv, torch.arange(N) * 3)
    return found


PER_TOKEN = ("q", "k", "v", "log_decay", "beta", "attention_mask")


def sliced(case: Case, given: dict[str, Any], rank: int) -> dict[str, Any]:
    """This rank's part of the arguments, leaves of its own."""

    def own(name: str, x: Any) -> Any:
        if isinstance(x, CosineState):
            return CosineState(x.kv.detach().clone().requires_grad_(), x.seen)
        if x is None or not isinstance(x, Tensor):
            return x
        if name in PER_TOKEN:
            lengths = [n + 3 for n in case.lengths] if x.shape[1] > sum(case.lengths) else case.lengths
            x = x.split(lengths, 1)[rank]
        x = x.detach().clone()
        return x.requires_grad_() if x.dtype.is_floating_point else x

    return {name: own(name, x) for name, x in given.items()}


def leaves(given: dict[str, Any]) -> dict[str, Tensor]:
    """What has a gradient."""
    found = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    if "initial_state" in given:
        found["initial_state"] = given["initial_state"].kv
    return found


def close(found: Tensor, expected: Tensor, case: Case, what: str) -> None:
    """fp64 to 1e-10, fp32 to 1e-5, relative to the largest; half precision to its own roundings."""
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(case.dtype, 2 * torch.finfo(case.dtype).eps)
    assert found.shape == expected.shape, f"{what}: {found.shape} and {expected.shape} in {case}"
    assert found.dtype == expected.dtype, what
    if expected.numel():
        error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"{what} is off by {error:.1e} in {case}"


def check_equal_to_one_process(group: dist.ProcessGroup, cases: list[Case]) -> None:
    """Values, states and gradients."""
    for case in cases:
        try:
            _check(group, case)
        except RuntimeError as error:
            raise RuntimeError(f"in {case}") from error


def _check(group: dist.ProcessGroup, case: Case) -> None:
    rank, size = group.rank(), group.size()
    whole = arguments(case)
    fixed = {
        "causal": case.causal,
        "output_final_state": "final" in case.options,
        "implementation": case.implementation,
    }
    expected, state = cosine_attention(**whole, **fixed)
    own = sliced(case, whole, rank)
    found, own_state = cosine_attention(**own, **fixed, process_group=group)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(expected.dtype)
    loss, own_loss = (expected * weight).sum(), (found * weight.split(case.lengths, 1)[rank]).sum()
    if state is not None and own_state is not None:
        close(own_state.kv, state.kv, case, "final kv")
        assert torch.equal(own_state.seen, state.seen), f"{own_state.seen} is not {state.seen} in {case}"
        weight = torch.randn(state.kv.shape, generator=generator, dtype=torch.float64).to(state.kv.dtype)
        loss, own_loss = loss + (state.kv * weight).sum(), own_loss + (own_state.kv * weight).sum() / size
    close(found, expected.split(case.lengths, 1)[rank], case, "output")
    names = list(leaves(whole))
    gradients = torch.autograd.grad(loss, list(leaves(whole).values()))
    own_gradients = torch.autograd.grad(own_loss, list(leaves(own).values()))
    expected_parts = sliced(case, dict(zip(names, gradients, strict=True)), rank)
    for name, gradient in zip(names, own_gradients, strict=True):
        if name not in PER_TOKEN:
            dist.all_reduce(gradient, group=group)
        close(gradient, expected_parts[name], case, f"gradient of {name}")
