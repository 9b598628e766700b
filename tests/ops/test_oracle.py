"""The operation gives the numbers of the original code, for every implementation, in float64 and float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cottention.ops import IMPLEMENTATIONS, cosine_attention

_FIXTURES = Path(__file__).parents[1] / "fixtures" / "ops"
_SHARED_CASES = [
    f"{form}_{case}"
    for case in ("c00_right", "c03_nomask", "c05_right_odd", "c06_left_257", "c09_nc_extreme", "c10_long", "c11_square")
    for form in ("bert", "gpt")
]
# relative to the largest entry of the tensor, and of one head vector: the fixtures' own recommendation
_TOLERANCE = {torch.float64: (1e-11, 1e-10, 1e-11), torch.float32: (3e-6, 2e-4, 1e-5)}
_RUNS = [
    pytest.param(name, dtype, id=f"{name}-{dtype}".replace("torch.float", "f"))
    for name in IMPLEMENTATIONS
    for dtype in (torch.float64, torch.float32)
    if name != "triton"  # needs a device, or the interpreter of test_triton.py
    and (name != "native" or dtype != torch.float64)  # the fused kernels compute in float32
]


@pytest.mark.parametrize(("implementation", "dtype"), _RUNS)
@pytest.mark.parametrize("case", sorted(path.stem for path in _FIXTURES.glob("*.npz")))
def test_matches_the_original(case: str, implementation: str, dtype: torch.dtype) -> None:
    _check(_FIXTURES / f"{case}.npz", implementation, dtype)


@pytest.mark.parametrize(("implementation", "dtype"), _RUNS)
@pytest.mark.parametrize("case", _SHARED_CASES)
def test_matches_the_original_on_larger_cases(
    oracle_dir: Path, case: str, implementation: str, dtype: torch.dtype
) -> None:
    _check(oracle_dir / "ops" / f"{case}.npz", implementation, dtype)


def _check(path: Path, implementation: str, dtype: torch.dtype) -> None:
    with np.load(path) as arrays:
        data = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    q, k, v, dout = (data[name].transpose(1, 2).to(dtype) for name in ("q", "k", "v", "dout"))
    leaves = [x.requires_grad_() for x in (q, k, v, data["norm_const"].to(dtype))]
    o, _ = cosine_attention(
        *leaves,
        causal=path.stem.startswith("gpt"),
        attention_mask=data["mask"],
        implementation=implementation,
    )
    gradients = torch.autograd.grad(o, leaves, dout)
    by_tensor, by_token, for_norm_const = _TOLERANCE[dtype]
    names = ("out", "dq", "dk", "dv")
    for name, got in zip(names, (o, *gradients), strict=False):
        truth = data[f"{name}_f64"].transpose(1, 2)
        difference, size = (got.detach().double() - truth).abs().amax(-1), truth.abs().amax(-1)  # [B, T, H]
        assert (difference[size == 0] == 0).all(), f"{name} is not exactly zero where it must be"
        ratio = (difference / size)[size > 0]
        assert ratio.numel() == 0 or ratio.max() <= by_token, f"{name}: {ratio.max()} in one head vector"
        if "scales" not in path.stem:  # there zero rows have gradients near 1e12 that hide all others
            assert difference.max() <= by_tensor * size.max(), name
    truth = data["dnorm_const_f64"]
    assert (gradients[3].double() - truth).abs().max() <= for_norm_const * truth.abs().max()
