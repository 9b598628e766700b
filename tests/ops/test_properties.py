"""What cosine attention promises whatever the input: causality, padding, packing, splitting, scaling, permutation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cottention.ops import CosineState, cosine_attention, cosine_attention_step
from tests.ops.helpers import assert_same, make_case, run

_IMPLEMENTATIONS = st.sampled_from(["naive", "chunk"])
_SEEDS = st.integers(0, 2**31 - 1)
_CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11}

settings.register_profile("ops", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ops")


@given(implementation=_IMPLEMENTATIONS, seed=_SEEDS, T=st.integers(2, 40), data=st.data())
def test_a_token_never_sees_the_future(implementation: str, seed: int, T: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, T - 1))
    case = make_case(T=T, seed=seed)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    o, _ = _attend(implementation, q, k, v, case.norm_const, True)
    for gradient in torch.autograd.grad(o[:, :cut].sum(), (q, k, v)):
        assert (gradient[:, cut:] == 0).all()
    shorter, _ = _attend(implementation, q[:, :cut], k[:, :cut], v[:, :cut], case.norm_const, True)
    torch.testing.assert_close(o[:, :cut], shorter, **_CLOSE)


@given(
    implementation=_IMPLEMENTATIONS,
    seed=_SEEDS,
    causal=st.booleans(),
    T=st.integers(1, 30),
    padding=st.integers(1, 30),
    side=st.sampled_from(["left", "right", "holes"]),
)
def test_padding_changes_nothing(implementation: str, seed: int, causal: bool, T: int, padding: int, side: str) -> None:
    case = make_case(B=1, T=T, seed=seed, causal=causal)
    generator = torch.Generator().manual_seed(seed)
    if side == "holes":
        place = torch.randperm(T + padding, generator=generator)[:T].sort().values
    else:
        place = torch.arange(T) + (padding if side == "left" else 0)
    mask = torch.zeros(1, T + padding, dtype=torch.bool)
    mask[:, place] = True
    q, k, v = (torch.randn(1, T + padding, *x.shape[2:], dtype=x.dtype) for x in (case.q, case.k, case.v))
    for wide, x in zip((q, k, v), (case.q, case.k, case.v), strict=True):
        wide[:, place] = x
    o, state = _attend(implementation, q, k, v, case.norm_const, causal, attention_mask=mask, output_final_state=causal)
    alone, alone_state = _attend(
        implementation, case.q, case.k, case.v, case.norm_const, causal, output_final_state=causal
    )
    torch.testing.assert_close(o[:, place], alone, **_CLOSE)
    assert (o[~mask] == 0).all()
    if state is not None and alone_state is not None:
        torch.testing.assert_close(state.kv, alone_state.kv, **_CLOSE)
        assert torch.equal(state.seen, alone_state.seen)


@given(
    implementation=_IMPLEMENTATIONS,
    seed=_SEEDS,
    causal=st.booleans(),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
)
def test_packing_equals_separate_sequences(implementation: str, seed: int, causal: bool, lengths: list[int]) -> None:
    case = make_case(lengths=lengths, seed=seed, causal=causal, with_state=causal, output_final_state=causal)
    o, state = _attend(
        implementation,
        case.q,
        case.k,
        case.v,
        case.norm_const,
        causal,
        cu_seqlens=case.cu_seqlens,
        initial_state=case.initial_state,
        output_final_state=causal,
    )
    start = 0
    for i, length in enumerate(lengths):
        piece = slice(start, start + length)
        initial = None if case.initial_state is None else case.initial_state.index_select(torch.tensor([i]))
        alone, alone_state = _attend(
            implementation,
            case.q[:, piece],
            case.k[:, piece],
            case.v[:, piece],
            case.norm_const,
            causal,
            initial_state=initial,
            output_final_state=causal,
        )
        torch.testing.assert_close(o[:, piece], alone, **_CLOSE)
        if state is not None and alone_state is not None:
            torch.testing.assert_close(state.kv[i], alone_state.kv[0], **_CLOSE)
            assert state.seen[i] == alone_state.seen[0]
        start += length


@given(
    implementation=_IMPLEMENTATIONS,
    seed=_SEEDS,
    cuts=st.lists(st.integers(0, 50), max_size=4),
    mask=st.sampled_from([None, "right", "left", "holes", "empty_row"]),
)
def test_split_anywhere_equals_the_whole(implementation: str, seed: int, cuts: list[int], mask: str | None) -> None:
    case = make_case(T=50, seed=seed, mask=mask, with_state=True)
    whole, final = _attend(
        implementation,
        case.q,
        case.k,
        case.v,
        case.norm_const,
        True,
        attention_mask=case.attention_mask,
        initial_state=case.initial_state,
        output_final_state=True,
    )
    state, pieces = case.initial_state, []
    bounds = [0, *sorted(cuts), 50]
    for start, end in itertools.pairwise(bounds):
        piece = slice(start, end)
        o, state = _attend(
            implementation,
            case.q[:, piece],
            case.k[:, piece],
            case.v[:, piece],
            case.norm_const,
            True,
            attention_mask=None if case.attention_mask is None else case.attention_mask[:, piece],
            initial_state=state,
            output_final_state=True,
        )
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **_CLOSE)
    assert state is not None
    assert final is not None
    torch.testing.assert_close(state.kv, final.kv, **_CLOSE)
    assert torch.equal(state.seen, final.seen)


@given(seed=_SEEDS, mask=st.sampled_from([None, "right", "left", "holes", "empty_row"]), four_dims=st.booleans())
def test_one_token_steps_equal_one_pass(seed: int, mask: str | None, four_dims: bool) -> None:
    case = make_case(T=20, seed=seed, mask=mask, with_state=True)
    whole, final = _attend(
        "chunk",
        case.q,
        case.k,
        case.v,
        case.norm_const,
        True,
        attention_mask=case.attention_mask,
        initial_state=case.initial_state,
        output_final_state=True,
    )
    state = case.initial_state
    for t in range(20):
        token = slice(t, t + 1) if four_dims else t
        real = None if case.attention_mask is None else case.attention_mask[:, token]
        o, state = cosine_attention_step(
            case.q[:, token], case.k[:, token], case.v[:, token], case.norm_const, state, attention_mask=real
        )
        torch.testing.assert_close(o, whole[:, token], **_CLOSE)
    assert state is not None
    assert final is not None
    torch.testing.assert_close(state.kv, final.kv, **_CLOSE)
    assert torch.equal(state.seen, final.seen)


@given(implementation=_IMPLEMENTATIONS, seed=_SEEDS, causal=st.booleans(), exponent=st.floats(-4, 4))
def test_scaling_queries_or_keys_changes_nothing(implementation: str, seed: int, causal: bool, exponent: float) -> None:
    case = make_case(T=20, seed=seed, causal=causal)
    scale = 10**exponent * (0.5 + torch.rand(2, 20, 2, 1, dtype=torch.float64))
    o, _ = _attend(implementation, case.q, case.k, case.v, case.norm_const, causal)
    scaled, _ = _attend(implementation, case.q * scale, case.k / scale, case.v, case.norm_const, causal)
    torch.testing.assert_close(scaled, o, **_CLOSE)


@given(implementation=_IMPLEMENTATIONS, seed=_SEEDS, S=st.integers(1, 40))
def test_the_order_of_keys_does_not_matter_bidirectionally(implementation: str, seed: int, S: int) -> None:
    case = make_case(T=7, S=S, seed=seed, causal=False, mask="holes")
    assert case.attention_mask is not None
    order = torch.randperm(S, generator=torch.Generator().manual_seed(seed))
    if case.q.shape[1] == S:
        return  # the mask would speak of the queries too
    o, _ = _attend(implementation, case.q, case.k, case.v, case.norm_const, False, attention_mask=case.attention_mask)
    shuffled, _ = _attend(
        implementation,
        case.q,
        case.k[:, order],
        case.v[:, order],
        case.norm_const,
        False,
        attention_mask=case.attention_mask[:, order],
    )
    torch.testing.assert_close(shuffled, o, **_CLOSE)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["naive", "chunk"])
def test_empty_rows_give_zeros_and_finite_gradients(implementation: str, causal: bool) -> None:
    case = make_case(B=3, T=20, causal=causal, mask="empty_row")
    results = run(case, implementation)
    for name in ("o", "dq", "dk", "dv"):
        assert (results[name][0] == 0).all(), name
    assert all(torch.isfinite(x).all() for x in results.values())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("implementation", ["naive", "chunk"])
def test_zero_vectors_have_the_published_gradient(implementation: str, causal: bool) -> None:
    case = make_case(T=10, causal=causal)
    case.q[:, 3] = 0
    case.k[:, 4] = 0
    results = run(case, implementation)
    assert all(torch.isfinite(x).all() for x in results.values())
    assert results["dq"][:, 3].abs().max() > 1e10  # dq_hat / 1e-12
    assert results["dk"][:, 4].abs().max() > 1e10


@given(
    implementation=_IMPLEMENTATIONS,
    seed=_SEEDS,
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    exponents=st.tuples(st.floats(-6, 6), st.floats(-6, 6), st.floats(-6, 6)),
    norm_const=st.floats(-50, 50),
)
def test_no_nan_for_inputs_of_any_size(
    implementation: str,
    seed: int,
    causal: bool,
    dtype: torch.dtype,
    exponents: tuple[float, float, float],
    norm_const: float,
) -> None:
    case = make_case(T=20, seed=seed, causal=causal, mask="holes")
    largest = min(1e6, torch.finfo(dtype).max)
    q, k, v = (
        (x * 10**e).clamp(-largest, largest).to(dtype).requires_grad_()
        for x, e in zip((case.q, case.k, case.v), exponents, strict=True)
    )
    m = torch.full((2,), norm_const, dtype=dtype, requires_grad=True)
    o, _ = _attend(implementation, q, k, v, m, causal, attention_mask=case.attention_mask)
    for gradient in (o, *torch.autograd.grad(o.sum(), (q, k, v, m))):
        assert not gradient.isnan().any()


@given(
    seed=_SEEDS,
    causal=st.booleans(),
    B=st.integers(0, 3),
    T=st.integers(0, 70),
    H=st.integers(1, 3),
    K=st.integers(1, 20),
    V=st.integers(1, 20),
    chunk_size=st.sampled_from([None, 1, 5, 16, 64]),
    mask=st.sampled_from([None, "right", "left", "holes"]),
    norm_const=st.booleans(),
    with_state=st.booleans(),
    output_final_state=st.booleans(),
)
@settings(max_examples=100)
def test_chunk_equals_naive_on_anything(
    seed: int,
    causal: bool,
    B: int,
    T: int,
    H: int,
    K: int,
    V: int,
    chunk_size: int | None,
    mask: str | None,
    norm_const: bool,
    with_state: bool,
    output_final_state: bool,
) -> None:
    case = make_case(
        B=B,
        T=T,
        H=H,
        K=K,
        V=V,
        causal=causal,
        mask=mask,
        norm_const=norm_const,
        with_state=causal and with_state,
        output_final_state=causal and output_final_state,
        seed=seed,
    )
    assert_same(run(case, "chunk", chunk_size=chunk_size), run(case, "naive"), torch.float64)


def _attend(
    implementation: str, q: Tensor, k: Tensor, v: Tensor, norm_const: Tensor | None, causal: bool, **options: Any
) -> tuple[Tensor, CosineState | None]:
    """Chunks of 16, so that short sequences already span several."""
    return cosine_attention(q, k, v, norm_const, causal=causal, implementation=implementation, chunk_size=16, **options)
