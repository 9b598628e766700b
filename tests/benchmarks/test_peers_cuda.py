"""The GPU peers: told where there is no GPU, and doing what their references say where a CPU can imitate them."""

from __future__ import annotations

import sys

import pytest
import torch

from cottention.benchmarks import measure_cuda, peers_cuda
from cottention.benchmarks.measure import time_interleaved
from cottention.benchmarks.peers import _GPU_PEERS, PeerUnavailableError, find_candidates, linear_reference
from cottention.benchmarks.settings import AttentionSettings, Workload


def workload(**changes) -> Workload:
    values = {
        "direction": "causal",
        "passes": "forward",
        "dtype": "bfloat16",
        "batch_size": 1,
        "num_heads": 2,
        "head_dim": 16,
        "length": 64,
    }
    return Workload(**{**values, **changes})


def test_the_names_are_those_that_can_be_loaded():
    assert set(_GPU_PEERS) == set(peers_cuda._LOADERS)


def test_on_a_cpu_they_say_what_they_need():
    _, unavailable = find_candidates(AttentionSettings(implementations=("chunk",)))
    for name in _GPU_PEERS:
        assert unavailable[name] == "its kernels run on a GPU alone: --device cuda"


@pytest.mark.parametrize(("name", "package"), [("fla-l2norm-chunk", "flash-linear-attention"), ("mamba-ssd", "mamba")])
def test_one_that_is_not_installed_is_named_with_its_package(monkeypatch, name, package):
    for module in ("fla", "mamba_ssm", "fla.ops.linear_attn", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PeerUnavailableError, match=f"not installed: pip install {package}"):
        peers_cuda.load_gpu_peer(name, "cuda")


def test_softmax_by_its_plain_kernel_is_what_its_reference_says():
    candidate = peers_cuda.load_gpu_peer("sdpa-math", "cuda")
    q, k, v = torch.randn(3, 2, 9, 2, 8, dtype=torch.float64)
    for causal in (True, False):
        o = candidate.function(q, k, v, torch.zeros(2), causal)
        torch.testing.assert_close(o, candidate.reference(q, k, v, torch.zeros(2), causal))
    flash = peers_cuda.load_gpu_peer("sdpa-flash", "cuda")
    assert flash.refuses(workload(dtype="float32")) == "bfloat16 and float16 only"
    assert flash.refuses(workload()) is None


def test_linear_peers_are_given_unit_vectors_and_the_order_they_take(monkeypatch):
    fake = type(sys)("fake")
    fake.l2norm = lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()  # pyright: ignore[reportAttributeAccessIssue]

    def attend(q, k, v, scale, normalize):
        assert (scale, normalize) == (1.0, False)
        return linear_reference(q, k, v, torch.zeros(1), True), None

    def scan(x, dt, decay, keys, queries, chunk_size):
        assert dt.unique().tolist() == [1.0]
        assert decay.unique().tolist() == [0.0]
        return linear_reference(queries, keys, x, torch.zeros(1), True)

    fake.chunk_linear_attn = fake.fused_chunk_linear_attn = attend  # pyright: ignore[reportAttributeAccessIssue]
    fake.mamba_chunk_scan_combined = scan  # pyright: ignore[reportAttributeAccessIssue]
    for module in ("fla", "fla.ops", "fla.ops.linear_attn", "fla.modules", "fla.modules.l2norm"):
        monkeypatch.setitem(sys.modules, module, fake)
    for module in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined"):
        monkeypatch.setitem(sys.modules, module, fake)
    q, k, v = torch.randn(3, 2, 9, 2, 8, dtype=torch.float64)
    for name in ("fla-l2norm-chunk", "fla-l2norm-fused-chunk", "mamba-ssd"):
        candidate = peers_cuda.load_gpu_peer(name, "cuda")
        found, expected = (f(q, k, v, torch.zeros(2), True) for f in (candidate.function, candidate.reference))
        torch.testing.assert_close(found, expected)
        assert candidate.refuses(workload(direction="bidirectional")) == "causal only"


def test_on_a_gpu_its_events_are_the_clock_and_the_cache_is_cold(monkeypatch):
    order: list[str] = []

    class Event:
        now = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")
            self.at_ms = Event.now

        def elapsed_time(self, end: Event) -> float:
            return end.at_ms - self.at_ms

    class Buffer:
        def zero_(self) -> None:
            order.append("flush")
            Event.now += 100.0

    def call() -> None:
        order.append("call")
        Event.now += 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(measure_cuda, "_flush_buffer", lambda device: Buffer())
    timing = time_interleaved({"call": call}, "cuda", repeats=2, time_limit_s=10)["call"]
    assert timing.samples_s == pytest.approx([0.003, 0.003])
    assert order == ["flush", "event", "call", "event"] * (len(order) // 4)
