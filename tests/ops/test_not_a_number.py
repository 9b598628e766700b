"""How far a number that is none reaches, as docs/attention.md says: never another head or row, nor out of padding."""

from __future__ import annotations

import pytest
import torch

from cottention import cosine_attention
from tests.ops.helpers import make_case


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("implementation", ["naive", "chunk", "native"])
def test_it_reaches_what_comes_behind_it_and_no_other_head_or_row(implementation: str, name: str, bad: float) -> None:
    case = make_case(T=100).to(torch.float32)
    clean, _ = cosine_attention(case.q, case.k, case.v, case.norm_const, causal=True, implementation=implementation)
    given = {each: getattr(case, each).clone() for each in ("q", "k", "v")}
    given[name][0, 40, 0, 1] = bad
    o, _ = cosine_attention(**given, norm_const=case.norm_const, causal=True, implementation=implementation)
    assert not o[0, 40:, 0].isfinite().all(-1).any()
    assert torch.equal(o[:, :, 1:], clean[:, :, 1:])
    assert torch.equal(o[1:], clean[1:])
    if implementation == "native":
        assert torch.equal(o[0, :32, 0], clean[0, :32, 0]), "beyond its chunk"
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[0, 40] = False
    o, _ = cosine_attention(
        **given, norm_const=case.norm_const, attention_mask=mask, causal=True, implementation=implementation
    )
    assert o.isfinite().all(), "padding"
