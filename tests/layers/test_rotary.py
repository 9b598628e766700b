"""Rotary embedding: GPT-J's angles, at any position."""

from __future__ import annotations

import pytest
import torch

from cottention.layers import apply_rotary, packed_positions, rotary_table


def turned_by_definition(x: torch.Tensor, position: int, rotary_dim: int) -> torch.Tensor:
    """One head vector turned pair by pair, as complex numbers."""
    out = x.clone()
    for i in range(rotary_dim // 2):
        angle = torch.tensor(position, dtype=torch.float32) * (1.0 / (10000.0 ** torch.tensor(2 * i / rotary_dim)))
        pair = torch.complex(x[2 * i], x[2 * i + 1])
        turned = pair * torch.complex(torch.cos(angle).to(x.dtype), torch.sin(angle).to(x.dtype))
        out[2 * i], out[2 * i + 1] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("position", [0, 1, 63, 5000, 123_456])
@pytest.mark.parametrize("rotary_dim", [2, 6, 8])
def test_pairs_turn_by_their_angle_at_any_position(position: int, rotary_dim: int) -> None:
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64)
    got = apply_rotary(x, rotary_table(torch.tensor([[position]]), rotary_dim))
    torch.testing.assert_close(got[0, 0, 0], turned_by_definition(x[0, 0, 0], position, rotary_dim), rtol=1e-12, atol=0)


def test_table_equals_stock_gptj() -> None:
    from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

    stock = create_sinusoidal_positions(2048, 64)
    table = rotary_table(torch.arange(2048)[None], 64)
    assert torch.equal(torch.cat(table, dim=-1)[0], stock)


def test_table_is_float32_whatever_the_default_dtype() -> None:
    expected = rotary_table(torch.arange(9)[None], 8)
    torch.set_default_dtype(torch.float64)
    try:
        got = rotary_table(torch.arange(9)[None], 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.sin.dtype == torch.float32
    assert torch.equal(got.sin, expected.sin)
    assert torch.equal(got.cos, expected.cos)


def test_only_the_first_dims_turn() -> None:
    x = torch.randn(2, 5, 3, 16)
    got = apply_rotary(x, rotary_table(torch.arange(5)[None], 4))
    assert torch.equal(got[..., 4:], x[..., 4:])
    assert not torch.equal(got[:, 1:, :, :4], x[:, 1:, :, :4])


def test_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    near = [apply_rotary(x, rotary_table(torch.tensor([[p]]), 16)) for x, p in ((q, 7), (k, 3))]
    far = [apply_rotary(x, rotary_table(torch.tensor([[p]]), 16)) for x, p in ((q, 1007), (k, 1003))]
    # float32 angles near 1000 are off by 6e-5 at most.
    torch.testing.assert_close((near[0] * near[1]).sum(), (far[0] * far[1]).sum(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    x = torch.randn(1, 9, 2, 8).to(dtype)
    table = rotary_table(torch.arange(9)[None], 8)
    got = apply_rotary(x, table)
    assert got.dtype == dtype
    assert torch.equal(got, apply_rotary(x.float(), table).to(dtype))


def test_packed_positions_restart() -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 4, 7], dtype=torch.int32)
    assert packed_positions(cu_seqlens, 7).tolist() == [[0, 1, 2, 0, 0, 1, 2]]
