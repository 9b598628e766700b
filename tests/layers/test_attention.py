"""The layers: masks, packing, cross-attention, rotary and carried states, for cosine and softmax alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cottention import CosineAttention, SoftmaxAttention, cosine_attention
from cottention.layers import apply_rotary, rotary_table

LAYERS = [CosineAttention, SoftmaxAttention]


def layer_of(kind: Any, **settings: Any) -> Any:
    layer = kind(24, 3, **{"causal": True, **settings}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return layer.eval()


def tokens(B: int = 2, T: int = 9) -> Tensor:
    return torch.randn(B, T, 24, dtype=torch.float64)


def test_cosine_layer_is_projections_around_the_operation() -> None:
    layer, x = layer_of(CosineAttention, rotary_dim=4), tokens()
    q, k, v = (p(x).view(2, 9, 3, 8) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    table = rotary_table(torch.arange(9)[None], 4)
    o, _ = cosine_attention(
        apply_rotary(q, table), apply_rotary(k, table), v, layer.norm_const, causal=True, implementation="naive"
    )
    torch.testing.assert_close(layer(x)[0], layer.out_proj(o.reshape(2, 9, 24)))


def test_parameters_are_named_ordered_and_shaped_as_published() -> None:
    layer = CosineAttention(24, 3, causal=True, bias=False, norm_const_init=0.25)
    assert [name for name, _ in layer.named_parameters()] == [
        "norm_const",
        "k_proj.weight",
        "v_proj.weight",
        "q_proj.weight",
        "out_proj.weight",
    ]
    assert layer.norm_const is not None
    assert layer.norm_const.shape == (1, 3, 1, 1)
    assert (layer.norm_const == 0.25).all()
    twin = dict(SoftmaxAttention(24, 3, causal=True, bias=False).named_parameters())
    assert set(twin) == {name for name, _ in layer.named_parameters()} - {"norm_const"}


def test_head_dim_may_differ_from_the_width_over_heads() -> None:
    layer = CosineAttention(24, 3, causal=False, head_dim=16)
    assert layer.k_proj.weight.shape == (48, 24)
    assert layer(torch.randn(2, 5, 24))[0].shape == (2, 5, 24)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind: Any, causal: bool, side: str) -> None:
    layer, x = layer_of(kind, causal=causal, rotary_dim=8), tokens(B=1)
    alone = layer(x)[0]
    filler = torch.randn(1, 4, 24, dtype=torch.float64)
    parts = [(filler, 0), (x, 1)] if side == "left" else [(x, 1), (filler, 0)]
    padded = torch.cat([part for part, _ in parts], dim=1)
    mask = torch.cat([torch.full(part.shape[:2], real) for part, real in parts], dim=1)
    torch.testing.assert_close(layer(padded, attention_mask=mask)[0][mask.bool()], alone[0])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_separate(kind: Any, causal: bool) -> None:
    layer, x = layer_of(kind, causal=causal, rotary_dim=8), tokens(B=1, T=11)
    cu_seqlens = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    packed = layer(x, cu_seqlens=cu_seqlens)[0]
    separate = torch.cat([layer(x[:, a:b])[0] for a, b in ((0, 4), (4, 5), (5, 11))], dim=1)
    torch.testing.assert_close(packed, separate)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5], [2, 1, 6]])
@pytest.mark.parametrize("padded", [False, True])
def test_carrying_the_state_equals_one_pass(kind: Any, sizes: list[int], padded: bool) -> None:
    layer, x = layer_of(kind, rotary_dim=8), tokens()
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0], [1] * 9]) if padded else None
    whole, whole_state = layer(x, attention_mask=mask, output_final_state=True)
    state: Any = None
    parts, a = [], 0
    for size in sizes:
        part_mask = None if mask is None else mask[:, a : a + size]
        part, state = layer(x[:, a : a + size], attention_mask=part_mask, initial_state=state, output_final_state=True)
        parts.append(part)
        a += size
    real = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real])
    assert torch.equal(state.seen, whole_state.seen)
    assert state.seen.tolist() == ([5, 9] if padded else [9, 9])


@pytest.mark.parametrize("num_keys", [5, 9])
@pytest.mark.parametrize("kind", LAYERS)
def test_cross_attention_reads_real_keys_and_masks_no_query(kind: Any, num_keys: int) -> None:
    layer, x, y = layer_of(kind, causal=False), tokens(), tokens(T=num_keys)
    mask = torch.ones(2, num_keys, dtype=torch.int64)
    mask[0, [0, 3]] = 0
    got = layer(x, y, attention_mask=mask)[0]
    torch.testing.assert_close(got[:1], layer(x[:1], y[:1][:, mask[0].bool()])[0])
    torch.testing.assert_close(got[1:], layer(x[1:], y[1:])[0])


def test_padded_queries_give_the_output_bias_alone() -> None:
    layer, x = layer_of(CosineAttention, causal=False), tokens()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    assert torch.equal(layer(x, attention_mask=mask)[0][0, 5:], layer.out_proj.bias.expand(4, -1))


def test_explicit_positions_and_a_shared_table_are_the_same() -> None:
    layer, x = layer_of(CosineAttention, rotary_dim=8), tokens()
    positions = torch.arange(9)[None] * 3 + torch.tensor([[0], [5]])
    by_positions = layer(x, position_ids=positions)[0]
    assert torch.equal(by_positions, layer(x, rotary=rotary_table(positions, 8))[0])
    assert not torch.allclose(by_positions, layer(x)[0])


def test_a_form_asked_for_by_name_runs_even_for_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from cottention.layers import attention

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the one-token step ran")

    layer, x = layer_of(CosineAttention, implementation="naive"), tokens()
    _, state = layer(x, output_final_state=True)
    monkeypatch.setattr(attention, "cosine_attention_step", refuse)
    layer(x[:, :1], initial_state=state)
    layer.implementation = "auto"
    with pytest.raises(AssertionError, match="one-token step ran"):
        layer(x[:, :1], initial_state=state)


def test_dropout_acts_in_training_only() -> None:
    layer, x = layer_of(SoftmaxAttention, dropout=0.5), tokens()
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("sizes", "settings", "error", "message"),
    [
        ((770, 12), {}, ValueError, "num_attention_heads must divide hidden_size; got 12 and 770"),
        ((24, 0), {}, ValueError, "num_attention_heads must be at least 1; got 0"),
        ((24, 3.0), {}, TypeError, "num_attention_heads must be an int; got 3.0"),
        ((24, 3), {"rotary_dim": 10}, ValueError, "rotary_dim must be even, from 2 to the head dim 8; got 10"),
        ((24, 3), {"rotary_dim": 3}, ValueError, "rotary_dim must be even, from 2 to the head dim 8; got 3"),
        ((24, 3), {"rotary_dim": True}, TypeError, "rotary_dim must be an int or None; got True"),
        ((24, 3), {"causal": 1}, TypeError, "causal must be True or False; got 1"),
    ],
)
def test_settings_that_make_no_sense_are_named(
    kind: Any, sizes: tuple[Any, Any], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(*sizes, **{"causal": True, **settings})


@pytest.mark.parametrize("kind", LAYERS)
def test_arguments_that_contradict_each_other_are_named(kind: Any) -> None:
    x = tokens()
    with pytest.raises(ValueError, match="position_ids needs a layer with rotary_dim"):
        layer_of(kind)(x, position_ids=torch.arange(9)[None])
    with pytest.raises(ValueError, match=r"key_value_states .* needs a layer with causal=False"):
        layer_of(kind)(x, x)
    with pytest.raises(ValueError, match=r"key_value_states needs a layer without rotary.* got rotary_dim=8"):
        layer_of(kind, causal=False, rotary_dim=8)(x, x)
    with pytest.raises(ValueError, match="key_value_states and cu_seqlens exclude each other"):
        layer_of(kind, causal=False)(x[:1], x[:1], cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="causal=True"):
        layer_of(kind, causal=False)(x, output_final_state=True)


def test_softmax_keeps_no_state_of_packed_texts() -> None:
    with pytest.raises(ValueError, match="a state and cu_seqlens exclude each other"):
        layer_of(SoftmaxAttention)(tokens(B=1), cu_seqlens=torch.tensor([0, 9]), output_final_state=True)


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_and_half_precision_run(kind: Any) -> None:
    layer, x = kind(24, 3, causal=True, rotary_dim=8), torch.randn(2, 9, 24)
    expected = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x)[0].dtype == torch.bfloat16
    half = layer.to(torch.bfloat16)(x.bfloat16())[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.03)
