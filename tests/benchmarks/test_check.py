"""Nothing is timed that is wrong."""

from __future__ import annotations

import pytest
import torch

from cottention.benchmarks.check import WrongResultError, check_candidates
from cottention.benchmarks.peers import Candidate, find_candidates, linear_reference
from cottention.benchmarks.settings import DIRECTIONS, AttentionSettings, Workload
from cottention.ops import IMPLEMENTATIONS, naive

SETTINGS = AttentionSettings(implementations=("chunk",), peers=())


def with_wrong(monkeypatch, name: str, change):
    """Register an implementation whose result is naive's with a change."""

    def wrong(*args, chunk_size=None, **options):
        o, state = naive.naive_cosine_attention(*args, **options)
        return change(o), state

    monkeypatch.setitem(IMPLEMENTATIONS, name, wrong)


def peer(function, **options) -> Candidate:
    return Candidate(name="other", is_peer=True, function=function, reference=linear_reference, **options)


def test_implementations_and_peers_pass_in_every_direction_and_dtype():
    settings = AttentionSettings(
        directions=DIRECTIONS, dtypes=("float32", "bfloat16", "float16", "float64"), head_dims=(32,)
    )
    found, _ = find_candidates(settings)
    checks, passed, wrong = check_candidates(found, settings)
    assert {"naive", "chunk", "sdpa"} <= {each.name for each in passed}
    assert not wrong
    assert all(check.error <= check.tolerance for check in checks)
    assert {check.workload.direction for check in checks if check.name == "chunk"} == set(DIRECTIONS)


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o * 1.0001,
        lambda o: o.where(torch.arange(o.shape[1])[:, None, None] < 128, 0),  # the last, incomplete chunk is lost
        lambda o: o * torch.nan,
    ],
    ids=["scaled", "rim lost", "NaN"],
)
def test_a_wrong_implementation_stops_everything(monkeypatch, change):
    with_wrong(monkeypatch, "chunk", change)
    candidates, _ = find_candidates(SETTINGS)
    with pytest.raises(WrongResultError, match=r"nothing is reported: implementation 'chunk' is wrong: \w+ differs"):
        check_candidates(candidates, SETTINGS)


def test_a_wrong_gradient_behind_right_values_is_found(monkeypatch):
    def wrong_gradient(o):
        return o.detach() + (o - o.detach()) * 1.001

    with_wrong(monkeypatch, "chunk", wrong_gradient)
    candidates, _ = find_candidates(SETTINGS)
    with pytest.raises(WrongResultError, match="is wrong: d"):
        check_candidates(candidates, SETTINGS)
    forward = AttentionSettings(implementations=("chunk",), peers=(), passes=("forward",))
    assert check_candidates(candidates, forward)[1] == candidates


def test_a_wrong_peer_is_left_out_with_the_reason():
    wrong_peer = peer(lambda q, k, v, m, causal: linear_reference(q, k, v, m, causal) * 1.1)
    _, passed, wrong = check_candidates([wrong_peer], SETTINGS)
    assert passed == []
    assert wrong["other"].startswith("wrong values: ")
    assert "causal, float32, K = V = 64" in wrong["other"]


def test_a_peer_that_takes_whole_chunks_alone_is_checked_on_whole_chunks():
    def refuses(workload: Workload) -> str | None:
        return "whole chunks only" if workload.length % 64 else None

    checks, passed, _ = check_candidates([peer(linear_reference, refuses=refuses)], SETTINGS)
    assert [check.workload.length for check in checks] == [192]
    assert len(passed) == 1
