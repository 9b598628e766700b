"""The optional parts of the attention layers: every combination holds with padding, packing, states and maps."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from cottention import CosineAttention, CosineState, SoftmaxAttention, cosine_attention
from cottention.layers import AttentionState
from cottention.layers.decay import DECAYS, Decay
from cottention.layers.options import DIVISORS, OUTPUT_GATES
from cottention.models import configuration

_SHARED: dict[str, tuple[Any, ...]] = {
    "short_conv": (None, 2, 4),
    "output_norm": (False, True),
    "output_gate": (None, *OUTPUT_GATES),
}
_OF_COSINE = {"decay": DECAYS, "erase": (False, True), "divisor": DIVISORS}
ALL_ON = {"short_conv": 4, "output_norm": True, "output_gate": "silu", "decay": "data", "erase": True}


def drawn(count: int, seed: int) -> list[Any]:
    """Layers' kinds and settings, any of all combinations."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        kind, causal = source.choice([CosineAttention, CosineAttention, SoftmaxAttention]), source.random() < 0.7
        choices = {**_SHARED, **(_OF_COSINE if kind is CosineAttention else {})}
        settings = {name: source.choice(values) for name, values in choices.items()}
        if not causal:
            settings.pop("erase", None)
        if kind is SoftmaxAttention and causal and source.random() < 0.5:
            settings["sliding_window"] = 3
        shown = ",".join(str(value) for value in settings.values())
        found.append(pytest.param(kind, causal, settings, id=f"{kind.__name__}-{causal}-{shown}"))
    return found


FEW, MANY = drawn(8, seed=1), [pytest.param(*each.values, id=each.id, marks=pytest.mark.slow) for each in drawn(250, 2)]


def layer_of(kind: Any, causal: bool, settings: Any, **more: Any) -> Any:
    layer = kind(24, 3, causal=causal, **{"rotary_dim": 8, **settings, **more}).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return layer.eval()


def tokens(B: int, T: int) -> Tensor:
    return torch.randn(B, T, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(T))


def with_holes(x: Tensor, num_columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The one row of x with padding anywhere: the tokens, the mask, and the columns of what is real."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(num_columns, generator=generator)[: x.shape[1]].sort().values
    padded = torch.full((1, num_columns, x.shape[2]), 7.0, dtype=x.dtype)
    padded[0, at] = x[0]
    return padded, torch.zeros(1, num_columns, dtype=torch.int64).index_fill(1, at, 1), at


def in_parts(layer: Any, x: Tensor, cuts: Any, mask: Tensor | None = None) -> Tensor:
    state, found = None, []
    for a, b in itertools.pairwise(cuts):
        part = None if mask is None else mask[:, a:b]
        y, state = layer(x[:, a:b], attention_mask=part, initial_state=state, output_final_state=True)
        found.append(y)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("kind", "causal", "settings"), [*FEW, *MANY])
def test_whole_is_padded_is_packed_is_split(kind: Any, causal: bool, settings: dict[str, Any]) -> None:
    layer, x = layer_of(kind, causal, settings), tokens(1, 13)
    whole = layer(x)[0]
    gradient = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, list(layer.parameters()), gradient, allow_unused=True)

    padded, mask, at = with_holes(x, 20, seed=3)
    y = layer(padded, attention_mask=mask)[0][:, at]
    torch.testing.assert_close(y, whole)
    torch.testing.assert_close(torch.autograd.grad(y, list(layer.parameters()), gradient, allow_unused=True), expected)
    bounds = [0, 1, 6, 6, 13]
    packed = layer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))[0]
    alone = [layer(x[:, a:b])[0] for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))
    if causal:
        for cuts in ([0, 1, 2, 3, 13], [0, 6, 6, 13], range(14)):
            torch.testing.assert_close(in_parts(layer, x, cuts), whole)
        torch.testing.assert_close(in_parts(layer, padded, [0, 4, 5, 11, 20], mask)[:, at], whole)
        torch.testing.assert_close(in_parts(layer, padded, range(21), mask)[:, at], whole)
    if not settings.get("erase"):
        maps: list[Tensor] = []
        torch.testing.assert_close(layer(padded, attention_mask=mask, maps=maps)[0][:, at], whole)
        assert maps[0].shape == (1, 3, 20, 20)


def test_packed_texts_go_on_from_their_own_states() -> None:
    layer, x = layer_of(CosineAttention, True, ALL_ON), tokens(1, 12)
    texts = [x[:, :7], x[:, 7:]]
    states = [layer(text[:, :2], output_final_state=True)[1] for text in texts]
    both = AttentionState(*(torch.cat(parts) for parts in zip(*states, strict=True)))
    rest = torch.cat([text[:, 2:] for text in texts], dim=1)
    bounds = torch.tensor([0, 5, 8], dtype=torch.int32)
    y, after = layer(rest, cu_seqlens=bounds, initial_state=both, output_final_state=True)
    expected = [layer(text, output_final_state=True) for text in texts]
    torch.testing.assert_close(y, torch.cat([o[:, 2:] for o, _ in expected], dim=1))
    for i, (_, state) in enumerate(expected):
        torch.testing.assert_close(after.index_select(torch.tensor([i])), state)


@pytest.mark.parametrize("output_gate", ["sigmoid", "silu"])
def test_the_layer_is_its_parts_around_the_operation(output_gate: str) -> None:
    settings = {**ALL_ON, "divisor": "key", "output_gate": output_gate}
    layer, x = layer_of(CosineAttention, True, settings, rotary_dim=None), tokens(2, 9)
    projected = [projection(x) for projection in (layer.q_proj, layer.k_proj, layer.v_proj)]
    taps = [conv.weight for conv in (layer.q_conv, layer.k_conv, layer.v_conv)]
    convolved = []
    for each, weight in zip(projected, taps, strict=True):
        before = torch.cat([torch.zeros(2, 3, 24, dtype=torch.float64), each], dim=1)
        summed = torch.stack([weight[:, i] * before[:, i : i + 9] for i in range(4)]).sum(0)
        convolved.append(silu(summed).view(2, 9, 3, 8))
    told = x @ layer.decay.weight.T + layer.decay.bias
    log_decay = -layer.decay.log_rate.exp() * (1 + told.exp()).log()
    beta = 1 / (1 + (-layer.beta_proj(x)).exp())
    q, k, v = convolved
    o, _ = cosine_attention(
        q, k, v, layer.norm_const, causal=True, log_decay=log_decay, beta=beta, implementation="naive"
    )
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.output_norm.weight
    told = layer.gate_proj(x)
    gate = silu(told) if output_gate == "silu" else 1 / (1 + (-told).exp())
    expected = layer.out_proj(o.reshape(2, 9, 24) * gate)
    found = layer(x)[0]
    torch.testing.assert_close(found, expected)
    parameters = list(layer.parameters())
    upstream = tokens(2, 9).flip(-1)
    for mine, right in zip(*(torch.autograd.grad(y, parameters, upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(mine, right)


def test_the_divisor_at_the_query_divides_the_sum() -> None:
    settings = {"divisor": "query"}
    layer, x = layer_of(CosineAttention, True, settings), tokens(1, 6)
    maps: list[Tensor] = []
    layer(x, maps=maps)
    undivided: list[Tensor] = []
    layer.divisor = "none"
    layer.norm_const = None
    layer(x, maps=undivided)
    p = torch.sigmoid(layer_of(CosineAttention, True, settings).norm_const)
    torch.testing.assert_close(maps[0], undivided[0] / torch.arange(1, 7)[:, None] ** p)


@pytest.mark.parametrize("kind", [CosineAttention, SoftmaxAttention])
def test_what_is_off_leaves_no_trace(kind: Any) -> None:
    torch.manual_seed(3)
    plain = kind(24, 3, causal=True)
    after = torch.rand(1)
    torch.manual_seed(3)
    off = kind(24, 3, causal=True, short_conv=0, output_norm=False, output_gate=None)
    assert torch.equal(torch.rand(1), after)
    assert [name for name, _ in off.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert str(off) == str(plain)


def test_half_lives_start_spread_from_8_tokens_to_the_longest() -> None:
    for kind in ("fixed", "learned"):
        layer = CosineAttention(24, 4, causal=True, decay=kind, longest_half_life=512)
        assert layer.decay is not None
        half_lives = -math.log(2) / layer.decay(torch.randn(1, 1, 24))[0, 0]
        torch.testing.assert_close(half_lives, torch.tensor([8.0, 32.0, 128.0, 512.0]))
    of_zeros = Decay("data", 24, 4, 512)(torch.zeros(1, 1, 24))[0, 0]
    torch.testing.assert_close(-math.log(2) / of_zeros, torch.tensor([8.0, 32.0, 128.0, 512.0]))
    assert Decay("fixed", 24, 1, 4)(torch.zeros(1, 1, 24)).item() == pytest.approx(-math.log(2) / 8)


def test_a_fixed_decay_is_saved_and_not_learned() -> None:
    layer = CosineAttention(24, 3, causal=True, decay="fixed", longest_half_life=64)
    assert "decay.log_rate" in layer.state_dict()
    assert not any(name.startswith("decay") for name, _ in layer.named_parameters())


def test_decay_is_computed_in_float32() -> None:
    x = torch.randn(2, 300, 24).bfloat16()
    for kind in ("fixed", "learned", "data"):
        decay = Decay(kind, 24, 3, 4096)
        expected = decay(x.float())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(decay(x), expected)
        assert decay(x.double()).dtype == torch.float64
        assert decay.to(torch.bfloat16)(x).dtype == torch.float32


def test_gates_start_where_they_are_said_to() -> None:
    x = torch.randn(2, 50, 24)
    layer = CosineAttention(24, 3, causal=True, output_gate="sigmoid")
    assert layer.gate_proj is not None
    assert (layer.gate_proj(x).sigmoid() > 0.95).all()
    silent = CosineAttention(24, 3, causal=True, output_gate="silu")
    assert silent.gate_proj is not None
    assert silent.gate_proj.bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_short_dtype_is_kept_and_near_float64(dtype: torch.dtype) -> None:
    layer, x = layer_of(CosineAttention, True, ALL_ON), tokens(2, 40)
    expected = layer(x)[0]
    got, state = layer.to(dtype)(x.to(dtype), output_final_state=True)
    assert (got.dtype, state.inputs.dtype, state.kv.dtype) == (dtype, dtype, torch.float32)
    # what its roundings of weights and tokens come to, of outputs about 2 in size
    assert (got - expected).abs().mean() < (1e-5 if dtype == torch.float32 else 0.1)


def test_autocast_trains_and_decodes() -> None:
    layer = layer_of(CosineAttention, True, ALL_ON).float()
    x = tokens(2, 20).float()
    with torch.autocast("cpu", torch.bfloat16):
        whole = layer(x)[0]
        whole.float().sum().backward()
        parts = in_parts(layer, x, [0, 7, 8, 20])
    torch.testing.assert_close(parts.float(), whole.float(), rtol=0.1, atol=0.1)
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("told", "backend"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]])}, "eager"),
        pytest.param({"cu_seqlens": torch.tensor([0, 4, 7], dtype=torch.int32)}, "aot_eager", marks=pytest.mark.slow),
        pytest.param({}, "inductor", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_compiled_layer_gives_the_same(told: dict[str, Tensor], backend: str) -> None:
    layer, x = layer_of(CosineAttention, True, ALL_ON).float(), tokens(1, 7).float()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, **told)[0], layer(x, **told)[0], rtol=1e-4, atol=1e-5)


def test_the_states_of_other_layers_are_refused() -> None:
    plain, convolved = (CosineAttention(24, 3, causal=True, short_conv=width) for width in (None, 4))
    x = torch.randn(1, 3, 24)
    state = plain(x, output_final_state=True)[1]
    assert isinstance(state, CosineState)
    expected = (
        r"^initial_state must be AttentionState\(kv, seen, inputs\) for a layer with short_conv=4; got CosineState"
    )
    with pytest.raises(TypeError, match=expected):
        convolved(x, initial_state=state)
    expected = r"^initial_state must be CosineState\(kv, seen\) for a layer with short_conv=None; got AttentionState"
    with pytest.raises(TypeError, match=expected):
        plain(x, initial_state=convolved(x, output_final_state=True)[1])
    empty = convolved.empty_state(2)
    assert isinstance(empty, AttentionState)
    assert empty.inputs.shape == (2, 3, 72)
    assert empty.nbytes == sum(part.nbytes for part in empty)
    y = convolved(x, initial_state=convolved.empty_state(1))[0]
    torch.testing.assert_close(y, convolved(x)[0])


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"short_conv": 65}, ValueError, r"short_conv must be from 0 \(none\) to 64 tokens; got 65"),
    ({"short_conv": -1}, ValueError, r"short_conv must be from 0 \(none\) to 64 tokens; got -1"),
    ({"short_conv": 4.0}, TypeError, r"short_conv must be an int or None; got 4\.0"),
    ({"output_norm": 1}, TypeError, r"output_norm must be True or False; got 1"),
    ({"output_gate": "tanh"}, ValueError, r"output_gate must be one of sigmoid, silu; got 'tanh'"),
    ({"decay": "fast"}, ValueError, r"decay must be one of none, fixed, learned, data; got 'fast'"),
    ({"decay": None}, ValueError, r"decay must be one of none, fixed, learned, data; got None"),
    ({"longest_half_life": 0}, ValueError, r"longest_half_life must be an int of at least 1 token; got 0"),
    ({"erase": "yes"}, TypeError, r"erase must be True or False; got 'yes'"),
    ({"divisor": "value"}, ValueError, r"divisor must be one of key, query, none; got 'value'"),
    ({"erase": True, "causal": False}, ValueError, r"erase needs a layer with causal=True"),
]


@pytest.mark.parametrize(("settings", "error", "line"), WRONG, ids=str)
def test_a_wrong_setting_is_one_line(settings: dict[str, Any], error: type[Exception], line: str) -> None:
    with pytest.raises(error, match=f"^{line}"):
        CosineAttention(24, 3, **{"causal": True, **settings})


def test_what_does_not_go_together_is_one_line() -> None:
    x = torch.randn(1, 3, 24)
    erasing = CosineAttention(24, 3, causal=True, erase=True)
    with pytest.raises(ValueError, match=r"^maps need a layer without erase, "):
        erasing(x, maps=[])
    options: tuple[Any, ...] = ({"short_conv": 4}, {"decay": "fixed"})
    for option in options:
        layer = CosineAttention(24, 3, causal=False, **option)
        with pytest.raises(ValueError, match=r"^key_value_states needs a layer without short_conv and decay, "):
            layer(x, torch.randn(1, 5, 24))
    crossing = layer_of(CosineAttention, False, {"output_norm": True, "output_gate": "silu"}, rotary_dim=None)
    assert crossing(tokens(1, 3), tokens(1, 5))[0].shape == (1, 3, 24)


def test_configs_know_the_values_that_layers_take() -> None:
    assert (configuration.OUTPUT_GATES, configuration.DECAYS, configuration.DIVISORS) == (
        OUTPUT_GATES,
        DECAYS,
        DIVISORS,
    )
    assert CosineAttention(24, 3, causal=True, short_conv=configuration.WIDEST_CONV).short_conv == 64
