"""The Triton kernels equal naive in values and gradients: everything in `interpreted_triton`, without a GPU."""

from __future__ import annotations

import pytest
import torch

from cottention.ops import cosine_attention
from tests.ops.helpers import make_case
from tests.ops.triton_process import run_interpreted
from tests.subprocesses import run_python


def test_kernels_match_naive_in_the_interpreter() -> None:
    run_interpreted("interpreted_triton.py", "not slow")


@pytest.mark.slow
def test_kernels_match_naive_on_larger_cases_in_the_interpreter() -> None:
    run_interpreted("interpreted_triton.py", "slow")


def test_without_a_device_it_raises_with_the_remedy() -> None:
    case = make_case(K=16, V=16).to(torch.float32)
    with pytest.raises(ValueError, match="needs tensors on a CUDA or HIP device, these are on cpu: move them there"):
        cosine_attention(case.q, case.k, case.v, case.norm_const, causal=True, implementation="triton")


def test_without_the_package_it_raises_with_the_remedy_and_the_rest_runs() -> None:
    run_python(
        """
        import torch
        from cottention.ops import cosine_attention
        from cottention.ops.triton import why_not
        reason = why_not(torch.device("cuda"), torch.float32, 64, 64)
        assert reason == "it needs the package triton: pip install 'triton>=3.6'", reason
        q = torch.randn(1, 5, 1, 16)
        cosine_attention(q, q, q, None, causal=True)
        """,
        hidden=["triton"],
    )


@pytest.mark.parametrize(
    ("dtype", "K", "V", "told"),
    [
        (torch.float64, 64, 64, "takes float32, bfloat16 and float16, not float64"),
        (torch.bfloat16, 300, 64, "takes head dims up to 256, not K=300, V=64"),
        (torch.bfloat16, 64, 257, "takes head dims up to 256, not K=64, V=257"),
    ],
)
def test_what_it_cannot_take_is_told_with_the_remedy(dtype: torch.dtype, K: int, V: int, told: str) -> None:
    pytest.importorskip("triton")
    from cottention.ops.triton import why_not

    reason = why_not(torch.device("cuda"), dtype, K, V)
    assert reason is not None
    assert told in reason
    assert 'implementation="chunk"' in reason
    assert why_not(torch.device("cuda"), torch.bfloat16, 256, 16) is None
