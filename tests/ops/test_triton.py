"""The Triton implementation where there is no GPU: what it says, and what tracing sees of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from cottention.ops import CosineState, choose_implementation, cosine_attention, cosine_attention_step
from tests.ops.helpers import make_case
from tests.subprocesses import run_python


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


def test_auto_takes_it_on_a_gpu_where_it_can_run() -> None:
    pytest.importorskip("triton")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for device, dtype, K, name in (
            ("cuda", torch.bfloat16, 64, "triton"),
            ("cuda", torch.float32, 256, "triton"),
            ("cuda", torch.float64, 64, "chunk"),
            ("cuda", torch.bfloat16, 512, "chunk"),
        ):
            x = torch.empty(2, 8, 3, K, device=device, dtype=dtype)
            assert choose_implementation("auto", x, x) == name
            assert choose_implementation("auto", x, x, is_gated=True) == name
            assert choose_implementation("triton", x, x) == "triton"
    assert choose_implementation("auto", torch.empty(2, 8, 3, 64), torch.empty(2, 8, 3, 64)) != "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [40, 700, 5000])
def test_shapes_and_dtypes_are_known_without_running_on_a_gpu(T: int, dtype: torch.dtype) -> None:
    """What torch.compile sees: a traced call on a CUDA device, at lengths of every form."""
    pytest.importorskip("triton")
    with FakeTensorMode():
        q, k, v = (torch.empty(2, T, 3, K, device="cuda", dtype=dtype) for K in (64, 64, 32))
        m = torch.empty(3, device="cuda")
        state = CosineState.zeros(2, 3, 64, 32, device="cuda")
        o, final = cosine_attention(
            q, k, v, m, causal=True, initial_state=state, output_final_state=True, implementation="triton"
        )
        keys, values = (torch.empty(2, 7, 3, K, device="cuda", dtype=dtype) for K in (64, 32))
        both, _ = cosine_attention(q, keys, values, m, causal=False, implementation="triton")
        decay = torch.empty(3, device="cuda").expand(2, T, 3)
        decayed, last = cosine_attention(q, k, v, m, causal=True, log_decay=decay, output_final_state=True)
        pool = CosineState.zeros(9, 3, 64, 32, device="cuda")
        rows, strengths = torch.empty(2, dtype=torch.int64, device="cuda"), torch.empty(2, 3, device="cuda")
        q1, k1, v1 = (torch.empty(2, 3, K, device="cuda", dtype=dtype) for K in (64, 64, 32))
        step, after = cosine_attention_step(q1, k1, v1, m, state)
        gates: dict[str, Any] = {"log_decay": strengths, "beta": strengths, "state_indices": rows}
        _, written = cosine_attention_step(q1, k1, v1, m, pool, **gates)
    assert final is not None
    assert last is not None
    assert written is pool
    assert decayed.shape == (2, T, 3, 32)
    assert decayed.dtype == dtype
    assert last.kv.shape == (2, 3, 64, 32)
    assert o.shape == both.shape == (2, T, 3, 32)
    assert o.dtype == both.dtype == step.dtype == dtype
    assert final.kv.shape == after.kv.shape == (2, 3, 64, 32)
    assert final.kv.is_cuda
    assert step.shape == (2, 3, 32)


@pytest.mark.parametrize(("version", "most"), [("3.6.0", 4), ("3.7.1", 4), ("3.8.0", 8), ("3.9.0+git1", 8), ("4.0", 8)])
def test_on_sm_100_eight_warps_wait_for_triton_3_8(version: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from cottention.ops.triton import config
    from cottention.ops.triton.table import WIDTHS

    monkeypatch.setattr(triton, "__version__", version)
    config.has_race_of_warps.cache_clear()
    try:
        for arch, expected in (("sm_100", most), ("sm_90", 8)):
            monkeypatch.setattr(config, "architecture", lambda device, arch=arch: arch)
            warps = {
                tiles.num_warps
                for dtype in (torch.bfloat16, torch.float16, torch.float32)
                for width in WIDTHS
                for forgets in (False, True)
                for chosen in [config.choose(torch.device("cpu"), dtype, width, forgets=forgets)]
                for tiles in (chosen.forward, chosen.backward, chosen.short_forward, chosen.short_backward)
            }
            assert max(warps) == expected
    finally:
        config.has_race_of_warps.cache_clear()
