"""What is found to be measured, and what is said about the rest."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from cottention.benchmarks.peers import PEERS, find_candidates, load_candidate
from cottention.benchmarks.settings import AttentionSettings, Workload
from cottention.errors import SettingsError
from cottention.ops import IMPLEMENTATIONS

PACKAGES = {"fla-chunk": "flash-linear-attention", "fast-transformers": "pytorch-fast-transformers"}


def refuses_to_run(*args, **options):
    raise RuntimeError("this one needs a GPU:\n  get one")


def workload(**changes) -> Workload:
    values = {
        "direction": "causal",
        "passes": "forward",
        "dtype": "float32",
        "batch_size": 1,
        "num_heads": 2,
        "head_dim": 16,
        "length": 64,
    }
    return Workload(**{**values, **changes})


def test_every_registered_implementation_is_found_without_being_named(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "brand-new", IMPLEMENTATIONS["chunk"])
    candidates, unavailable = find_candidates(AttentionSettings(peers=()))
    assert [each.name for each in candidates] == [name for name in IMPLEMENTATIONS if name not in unavailable]
    assert "brand-new" in IMPLEMENTATIONS
    assert not any(each.is_peer for each in candidates)


def test_an_implementation_that_does_not_run_here_is_left_out_with_its_own_words(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "gpu-only", refuses_to_run)
    candidates, unavailable = find_candidates(AttentionSettings(peers=()))
    assert "gpu-only" not in {each.name for each in candidates}
    assert unavailable["gpu-only"] == "this one needs a GPU: get one"


def test_one_that_was_asked_for_by_name_must_run(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "gpu-only", refuses_to_run)
    with pytest.raises(SettingsError, match="implementation 'gpu-only' cannot be measured here: this one needs a GPU"):
        find_candidates(AttentionSettings(implementations=("gpu-only",), peers=()))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_peer_that_is_not_installed_is_named_with_its_package(monkeypatch, name):
    for module in ("fla", "fla.ops.linear_attn.naive", "fast_transformers", "fast_transformers.causal_product"):
        monkeypatch.setitem(sys.modules, module, None)
    candidates, unavailable = find_candidates(AttentionSettings())
    assert [each.name for each in candidates if each.is_peer] == ["sdpa"]
    assert f"not installed: pip install {PACKAGES[name]}" in unavailable[name]
    with pytest.raises(SettingsError, match=f"peer '{name}' cannot be measured here: not installed"):
        find_candidates(AttentionSettings(peers=(name,)))


def test_the_dispatch_is_measured_when_asked_for_alone():
    candidates, _ = find_candidates(AttentionSettings(implementations=("auto", "chunk", "auto"), peers=("sdpa",)))
    assert [each.name for each in candidates] == ["auto", "chunk", "sdpa"]
    assert "auto" not in {each.name for each in find_candidates(AttentionSettings(peers=()))[0]}


def test_decay_and_erase_are_measured_when_asked_for_alone():
    names = ("chunk", "chunk+decay", "chunk+erase", "auto+decay+erase")
    candidates, _ = find_candidates(AttentionSettings(implementations=names, peers=()))
    assert [each.name for each in candidates] == list(names)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, 3, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    m = torch.zeros(3, dtype=torch.float64)
    outputs = [each.function(q, k, v, m, True) for each in candidates]
    for candidate, o in zip(candidates, outputs, strict=True):
        torch.testing.assert_close(o, candidate.reference(q, k, v, m, True))
    for a, b in itertools.combinations(outputs, 2):
        assert not torch.allclose(a, b)
    assert [each.refuses(workload(direction="bidirectional")) for each in candidates] == [
        None,
        None,
        *["causal only"] * 2,
    ]


def test_transformers_gated_delta_rule_is_measured_when_asked_for_alone():
    assert "transformers-gated-delta" not in {each.name for each in find_candidates(AttentionSettings())[0]}
    (candidate,) = find_candidates(AttentionSettings(implementations=(), peers=("transformers-gated-delta",)))[0]
    assert candidate.refuses(workload(direction="bidirectional")) == "causal only"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, 3, 8, generator=generator) for _ in range(3))
    m = torch.zeros(3)
    torch.testing.assert_close(candidate.function(q, k, v, m, True), candidate.reference(q, k, v, m, True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AttentionSettings(implementations=("chunk+dcay",)), "implementation must be one of .*; got 'chunk.dcay'"),
        (
            AttentionSettings(implementations=("chnk",)),
            "implementation must be one of .*; got 'chnk'; did you mean 'chunk'",
        ),
        (AttentionSettings(peers=("spda",)), "peer must be one of .*; got 'spda'; did you mean 'sdpa'"),
        (AttentionSettings(implementations=(), peers=()), "there is nothing to measure"),
    ],
)
def test_unknown_names_are_refused_in_one_line(settings, message):
    with pytest.raises(SettingsError, match=message):
        find_candidates(settings)


def test_the_linear_peers_say_what_they_cannot_run(monkeypatch):
    fake = type(sys)("fake")
    fake.naive_chunk_linear_attn = lambda q, k, v, scale, normalize: v  # pyright: ignore[reportAttributeAccessIssue]
    fake.causal_dot_product = lambda q, k, v: v  # pyright: ignore[reportAttributeAccessIssue]
    for module in ("fla", "fla.ops", "fla.ops.linear_attn", "fla.ops.linear_attn.naive"):
        monkeypatch.setitem(sys.modules, module, fake)
    for module in ("fast_transformers", "fast_transformers.causal_product"):
        monkeypatch.setitem(sys.modules, module, fake)
    fla, fast = load_candidate("fla-chunk", "cpu"), load_candidate("fast-transformers", "cpu")
    assert fla.refuses(workload()) is None
    assert fla.refuses(workload(length=65)) == "takes multiples of 64 tokens only"
    assert fla.refuses(workload(direction="bidirectional")) == "causal only"
    assert fast.refuses(workload(length=65)) is None
    assert fast.refuses(workload(dtype="bfloat16")) == "float32 only"
    assert fast.refuses(workload(direction="bidirectional")) == "causal only"
    x = torch.randn(1, 64, 2, 16)
    for candidate in (fla, fast):
        assert candidate.function(x, x, x, torch.zeros(2), True).shape == x.shape


def test_the_names_of_peers_and_implementations_do_not_meet():
    assert not set(PEERS) & {*IMPLEMENTATIONS, "auto"}
