"""The Triton kernels against naive, values and gradients, run by Triton's interpreter on the CPU.

The interpreter takes milliseconds for each product of tiles, so shapes and tiles are small; every form runs (short,
whole sequences, segments), over several chunks and segments. Two shapes for the same lines are one too many for every
day: the other one is slow.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cottention.ops import CosineState, cosine_attention
from cottention.ops.triton.config import Tiles, override
from tests.ops.helpers import Case, assert_same, make_case, run
from tests.ops.test_oracle import _FIXTURES, _SHARED_CASES
from tests.ops.test_oracle import _check as check_oracle

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

_SHORT, _WHOLE, _SEGMENTS = 0, 1024, 32  # tokens of a segment: quadratic, one segment a sequence, many
_NAMES = {_SHORT: "short", _WHOLE: "whole", _SEGMENTS: "segments"}
_FORMS = pytest.mark.parametrize("segment", _NAMES, ids=_NAMES.values())
_LONG = [pytest.mark.slow]  # the same kernels again, at another shape
_DIRECTIONS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def _forms_and_directions(*, short_is_causal: bool) -> pytest.MarkDecorator:
    """Every kernel on the slow day; half of them on every day, each form and each direction among them.

    A feature's lines are common to all, so tests take turns: each kernel meets three of six features.
    """
    cells = []
    for causal in (True, False):
        for number, (segment, name) in enumerate(_NAMES.items()):
            marks = [] if causal == (short_is_causal == (number != 1)) else _LONG
            cells.append(
                pytest.param(segment, causal, id=f"{name}-{'causal' if causal else 'bidirectional'}", marks=marks)
            )
    return pytest.mark.parametrize(("segment", "causal"), cells)


def _tiles(block_tokens: int, tile: int = 32) -> dict[str, Tiles]:
    tiles = Tiles(block_tokens=block_tokens, tile=tile, num_warps=4, num_stages=2)
    return dict.fromkeys(("forward", "backward", "short_forward", "short_backward"), tiles)


def _check(
    case: Case, segment: int | None, *, block: int = 16, tile: int = 32, dtype: torch.dtype = torch.float32
) -> None:
    with override(segment_tokens=segment, **_tiles(block, tile)):
        found = run(case.to(dtype), "triton")
    assert_same(found, run(case, "naive"), dtype)


def _case(**changes: Any) -> Case:
    sizes: dict[str, Any] = {"B": 1, "H": 2, "T": 37, "K": 16, "V": 16}
    return make_case(**(sizes | changes))


@_DIRECTIONS
@pytest.mark.parametrize("T", [1, pytest.param(63, marks=_LONG), pytest.param(64, marks=_LONG), 65])
def test_odd_lengths_with_tiles_of_64(T: int, causal: bool) -> None:
    case = _case(T=T, H=1, causal=causal)
    for segment in (_SHORT, _WHOLE):
        _check(case, segment, block=64)


@_DIRECTIONS
def test_several_chunks_over_several_segments(causal: bool) -> None:
    _check(_case(T=200, H=1, causal=causal), 64, block=32)
    _check(_case(T=129, H=1, causal=causal, mask="holes"), 128, block=64)


@_forms_and_directions(short_is_causal=True)
@pytest.mark.parametrize("mask", [*(pytest.param(x, marks=_LONG) for x in ("right", "left", "holes")), "empty_row"])
def test_padding(mask: str, segment: int, causal: bool) -> None:
    _check(_case(B=2, H=1, mask=mask, causal=causal), segment)


@_forms_and_directions(short_is_causal=False)
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([0, 16, 0, 17, 33, 0], marks=_LONG),
        [0, 1, 0, 17, 16, 0],
        [0, 0],
        pytest.param([1, 1, 1], marks=_LONG),
    ],
)
def test_packed_sequences(lengths: list[int], segment: int, causal: bool) -> None:
    _check(_case(lengths=lengths, H=1, causal=causal), segment)


@pytest.mark.parametrize("segment", [_WHOLE, _SEGMENTS], ids=["whole", "segments"])
@pytest.mark.parametrize(
    ("initial", "final"), [(True, True), pytest.param(True, False, marks=_LONG), pytest.param(False, True, marks=_LONG)]
)
def test_states(initial: bool, final: bool, segment: int) -> None:
    _check(_case(H=1, B=2, mask="holes", with_state=initial, output_final_state=final), segment)
    _check(_case(H=1, lengths=[5, 0, 40], with_state=initial, output_final_state=final), segment)


@_FORMS
@pytest.mark.parametrize("mask", [pytest.param(None, marks=_LONG), "left"])
@pytest.mark.parametrize(("T", "S"), [(1, 33), (40, 17)])
def test_cross_attention(T: int, S: int, mask: str | None, segment: int) -> None:
    _check(_case(T=T, S=S, H=1, causal=False, mask=mask), segment)


@_forms_and_directions(short_is_causal=True)
@pytest.mark.parametrize(("K", "V"), [(3, 17), *(pytest.param(*x, marks=_LONG) for x in ((2, 1), (17, 3), (48, 80)))])
def test_any_head_dims(K: int, V: int, segment: int, causal: bool) -> None:
    """Tiles are padded to powers of two; where K is wider than a tile of 32, gradients are projected afterwards."""
    _check(_case(T=20, H=1, K=K, V=V, causal=causal, mask="holes"), 16 if segment == _SEGMENTS else segment)


@pytest.mark.slow
@pytest.mark.parametrize("segment", [_WHOLE, _SEGMENTS], ids=["whole", "segments"])
@pytest.mark.parametrize(("initial", "final"), [(True, True), (True, False), (False, True)])
def test_states_over_longer_blocks(initial: bool, final: bool, segment: int) -> None:
    _check(_case(H=1, T=70, with_state=initial, output_final_state=final), segment, block=32)


def test_states_where_head_dims_are_split() -> None:
    for segment in (_WHOLE, 16):
        _check(_case(T=20, H=1, K=40, V=33, with_state=True, output_final_state=True), segment, tile=16)


@pytest.mark.slow
@_DIRECTIONS
@pytest.mark.parametrize(("K", "V"), [(256, 256), (160, 96), (64, 256), (256, 16)])
def test_wide_heads_with_the_default_tiles(K: int, V: int, causal: bool) -> None:
    case = make_case(B=1, T=70, H=1, K=K, V=V, causal=causal)
    for segment in (None, _WHOLE, 128):
        with override(segment_tokens=segment):
            assert_same(run(case.to(torch.float32), "triton"), run(case, "naive"), torch.float32)


@_DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=_LONG)])
def test_low_precision_to_rounding(dtype: torch.dtype, causal: bool) -> None:
    _check(_case(causal=causal, mask="holes"), _SEGMENTS, dtype=dtype)
    _check(_case(causal=causal, H=1), _SHORT, dtype=dtype)


@_forms_and_directions(short_is_causal=False)
def test_without_a_divisor(segment: int, causal: bool) -> None:
    _check(_case(norm_const=False, causal=causal, mask="holes", H=1), segment)


@pytest.mark.parametrize("causal", [pytest.param(True, marks=_LONG), False], ids=["causal", "bidirectional"])
def test_what_the_table_and_the_rules_choose(causal: bool) -> None:
    for case in (_case(H=1, T=70, causal=causal), _case(H=1, T=530, causal=causal, mask="left")):
        assert_same(run(case.to(torch.float32), "triton"), run(case, "naive"), torch.float32)


@_DIRECTIONS
@pytest.mark.parametrize("segment", [_SHORT, _SEGMENTS], ids=["short", "segments"])
@pytest.mark.slow
def test_any_strides_are_taken_and_inputs_are_left_alone(segment: int, causal: bool) -> None:
    case = _case(B=2, causal=causal, mask="holes").to(torch.float32)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with override(segment_tokens=segment, **_tiles(16)):
            return cosine_attention(
                q, k, v, case.norm_const, causal=causal, attention_mask=case.attention_mask, implementation="triton"
            )[0]

    expected = attend(case.q, case.k, case.v)
    inputs = (case.q, case.k, case.v)
    head_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    fused = torch.stack(inputs, dim=2).unbind(2)
    every_other = [x.repeat_interleave(2, dim=3)[..., ::2] for x in inputs]
    dims_first = [x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for x in inputs]
    for strided in (head_first, fused, every_other, dims_first):
        copies = [x.clone() for x in strided]
        assert torch.equal(attend(*strided), expected)
        assert all(torch.equal(x, copy) for x, copy in zip(strided, copies, strict=True))


def test_expanded_upstream_gradients_are_taken() -> None:
    case = _case(H=1).to(torch.float32)
    gradients = []
    for implementation in ("naive", "triton"):
        q = case.q.clone().requires_grad_()
        cosine_attention(q, case.k, case.v, case.norm_const, causal=True, implementation=implementation)[
            0
        ].sum().backward()
        gradients.append(q.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@_DIRECTIONS
def test_rows_beyond_the_reach_of_32_bits(causal: bool) -> None:
    """Memory that is never written is never resident, so this takes pages, not gigabytes."""
    T, H, K = 20, 1, 16
    case = make_case(B=2, T=T, H=H, K=K, V=K, causal=causal).to(torch.float16)
    memory = torch.empty(2**31 + 2**20, dtype=torch.float16)
    far = []
    for i, x in enumerate((case.q, case.k, case.v)):
        apart = torch.as_strided(memory, x.shape, (2**31, H * K * 4, K * 4, 1), K * i)
        far.append(apart.copy_(x))
    found, expected = (
        cosine_attention(q, k, v, case.norm_const, causal=causal, implementation=name)[0]
        for (q, k, v), name in ((far, "triton"), ((case.q, case.k, case.v), "triton"))
    )
    assert torch.equal(found, expected)


@_forms_and_directions(short_is_causal=True)
def test_fresh_memory_full_of_nan_does_not_leak(segment: int, causal: bool) -> None:
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    try:
        assert torch.empty(3).isnan().all()
        _check(_case(H=1, mask="holes", causal=causal, output_final_state=causal and segment > 0), segment)
        _check(_case(H=1, lengths=[20, 0, 3, 17], causal=causal), segment)
    finally:
        torch.use_deterministic_algorithms(False)


@_forms_and_directions(short_is_causal=False)
def test_garbage_at_padding_does_not_leak(segment: int, causal: bool) -> None:
    case = _case(B=2, H=1, mask="holes", causal=causal)
    assert case.attention_mask is not None
    padded = ~case.attention_mask[..., None, None]
    dirty = replace(
        case,
        q=case.q.masked_fill(padded, float("nan")),
        k=case.k.masked_fill(padded, float("inf")),
        v=case.v.masked_fill(padded, float("nan")),
    )
    with override(segment_tokens=segment, **_tiles(16)):
        assert_same(run(dirty.to(torch.float32), "triton"), run(case, "naive"), torch.float32)


@_DIRECTIONS
@pytest.mark.parametrize("empty", [{"T": 0}, {"B": 0}])
def test_an_empty_batch_or_sequence_gives_an_empty_output(empty: dict[str, int], causal: bool) -> None:
    _check(_case(causal=causal, **empty), _WHOLE)
    if causal:
        _check(_case(with_state=True, output_final_state=True, **empty), _WHOLE)


@pytest.mark.parametrize(("T", "S"), [(0, 5), (5, 0)])
def test_cross_attention_without_queries_or_keys(T: int, S: int) -> None:
    _check(_case(T=T, S=S, causal=False), _WHOLE)


def test_a_split_sequence_continues_where_it_was() -> None:
    case = _case(T=40, H=1, output_final_state=True).to(torch.float32)
    options: dict[str, Any] = {"causal": True, "output_final_state": True, "implementation": "triton"}
    whole, last = cosine_attention(case.q, case.k, case.v, case.norm_const, **options)
    state: CosineState | None = CosineState.zeros(1, 1, 16, 16)
    parts = []
    for a, b in ((0, 1), (1, 18), (18, 40)):
        q, k, v = (x[:, a:b] for x in (case.q, case.k, case.v))
        o, state = cosine_attention(q, k, v, case.norm_const, initial_state=state, **options)
        parts.append(o)
    assert last is not None
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert state is not None
    torch.testing.assert_close(state.kv, last.kv, rtol=1e-5, atol=1e-5)
    assert torch.equal(state.seen, last.seen)


@pytest.mark.parametrize("segment", [pytest.param(None, marks=_LONG), _SEGMENTS], ids=["table", "segments"])
@pytest.mark.parametrize("case", sorted(path.stem for path in _FIXTURES.glob("*.npz")))
def test_matches_the_original(case: str, segment: int | None) -> None:
    with override(segment_tokens=segment):
        check_oracle(_FIXTURES / f"{case}.npz", "triton", torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("segment", [None, 128], ids=["table", "segments"])
@pytest.mark.parametrize("case", _SHARED_CASES)
def test_matches_the_original_on_larger_cases(oracle_dir: Path, case: str, segment: int | None) -> None:
    with override(segment_tokens=segment):
        check_oracle(oracle_dir / "ops" / f"{case}.npz", "triton", torch.float32)
