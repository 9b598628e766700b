"""`accelerate_gated_delta`: transformers' models on our operation give what they gave, in every use, and go back."""

from __future__ import annotations

import copy
from functools import wraps
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cottention.integrations import accelerate_gated_delta, delta_rule, gated_delta, restore_gated_delta
from tests.integrations.families import FAMILIES, InFloat64, make_model, modeling, relative, their_rule

_LAYERS = tuple(f"model.layers.{i}" for i in (0, 1, 3))
_TOKENS = torch.randint(2, 97, (3, 75), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A family, computed by transformers' PyTorch form even where kernels for GPUs are installed."""
    module = modeling(request.param)
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        rule = their_rule(request.param, name, torch.float32)
        monkeypatch.setattr(module, name, rule)
    return request.param


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of our two forms ran, call by call: a test that compares a model with itself would pass too."""
    calls: list[str] = []
    for name in ("cosine_attention", "cosine_attention_step"):
        function = getattr(delta_rule, name)

        def counted(*args: Any, _function: Any = function, _name: str = name, **kwargs: Any) -> Any:
            calls.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(delta_rule, name, counted)
    return calls


def _padded() -> Tensor:
    mask = torch.ones_like(_TOKENS)
    mask[1, :20] = 0
    mask[2, :74] = 0
    return mask


def _loss_and_gradients(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    model.zero_grad()
    labels = _TOKENS.masked_fill(inputs.get("attention_mask", torch.ones_like(_TOKENS)) == 0, -100)
    out = model(_TOKENS, labels=labels, use_cache=False, **inputs)
    out.loss.backward()
    model.eval()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), gradients


def _together(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in gradients.values()])


@pytest.mark.parametrize("padding", [False, True], ids=["no mask", "left padding"])
def test_outputs_and_gradients_are_the_same(family: str, padding: bool, used: list[str]) -> None:
    model = make_model(family)
    inputs = {"attention_mask": _padded()} if padding else {}
    logits, gradients = _loss_and_gradients(model, **inputs)
    assert not used
    with accelerate_gated_delta(model) as layers:
        found, found_gradients = _loss_and_gradients(model, **inputs)
    assert used == ["cosine_attention"] * len(layers)
    real = _padded().bool() if padding else torch.ones_like(_TOKENS, dtype=torch.bool)
    assert relative(found[real], logits[real]) < 1e-5
    assert found_gradients.keys() == gradients.keys()
    assert relative(_together(found_gradients), _together(gradients)) < 1e-5


def test_every_single_gradient_is_the_same_in_float64(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # In float32 theirs is off by 1e-3 in gradients of gates, which are small differences of large sums; ours by 1e-6.
    module = modeling(family)
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        monkeypatch.setattr(module, name, their_rule(family, name, torch.float64))
    monkeypatch.setattr(module, "torch", InFloat64())  # their norms compute in float32, too
    model = make_model(family)
    in_float32 = copy.deepcopy(model)
    model.double()
    expected_logits, expected = _loss_and_gradients(model, attention_mask=_padded())
    accelerate_gated_delta(model)
    logits, found = _loss_and_gradients(model, attention_mask=_padded())
    real = _padded().bool()
    assert relative(logits[real], expected_logits[real]) < 1e-9
    for name, gradient in found.items():
        assert relative(gradient, expected[name]) < 1e-6, name  # gates are computed in float32 on both sides
    monkeypatch.setattr(module, "torch", torch)
    accelerate_gated_delta(in_float32)
    _, found = _loss_and_gradients(in_float32, attention_mask=_padded())
    for name, gradient in found.items():
        assert relative(gradient.double(), expected[name]) < 1e-5, name


def test_prefill_then_tokens_one_by_one(family: str, used: list[str]) -> None:
    model = make_model(family)
    tokens = _TOKENS[:, :40]

    def decoded() -> Tensor:
        with torch.no_grad():
            out = model(tokens[:, :30], use_cache=True)
            cache, logits = out.get("cache", out.get("past_key_values")), [out.logits]
            name = "cache" if "cache" in out else "past_key_values"
            for part in tokens[:, 30:].split([1, 1, 1, 1, 1, 5], 1):  # and several, with a past
                logits += [model(part, use_cache=True, **{name: cache}).logits]
        return torch.cat(logits, 1)

    expected = decoded()
    layers = accelerate_gated_delta(model)
    assert relative(decoded(), expected) < 1e-5
    each = ["cosine_attention"] + 5 * ["cosine_attention_step"] + ["cosine_attention"]
    assert used == [name for name in each for _ in layers.names]
    with torch.no_grad():
        assert relative(expected, model(tokens, use_cache=False).logits) < 1e-5


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_writes_the_same(family: str, options: dict[str, Any], used: list[str]) -> None:
    model = make_model(family)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": _padded()[:, 60:], **options}
    expected = model.generate(_TOKENS[:, 60:], **settings)
    assert not used
    accelerate_gated_delta(model)
    assert torch.equal(model.generate(_TOKENS[:, 60:], **settings), expected)
    assert "cosine_attention_step" in used


def test_gradients_with_checkpoints_are_the_same(family: str) -> None:
    model = make_model(family)
    _, expected = _loss_and_gradients(model)
    accelerate_gated_delta(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # from 5.23 on
    enable()
    _, found = _loss_and_gradients(model)
    assert relative(_together(found), _together(expected)) < 1e-5


def test_packed_texts_do_not_run_into_each_other(family: str) -> None:
    model = make_model(family)
    accelerate_gated_delta(model)
    lengths = [20, 1, 54]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    numbers = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    position_ids = (torch.arange(75) - starts[numbers])[None]
    bounds = {"cu_seq_lens_q": starts.int(), "cu_seq_lens_k": starts.int(), "max_length_q": 54, "max_length_k": 54}
    row = _TOKENS[:1]
    for packing in (bounds, {**bounds, "seq_idx": numbers[None].int()}, {"seq_idx": numbers[None].int()}):
        with torch.no_grad():
            packed = model(row, position_ids=position_ids, use_cache=False, **packing).logits
            alone = [model(text, use_cache=False).logits for text in row.split(lengths, 1)]
        assert relative(packed, torch.cat(alone, 1)) < 1e-5


def test_the_layers_are_reported_and_other_models_left_alone(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, other = make_model(family), make_model(family)
    with caplog.at_level("INFO", "cottention"):
        layers = accelerate_gated_delta(model)
    assert len(layers) == 3
    assert [name.rpartition(".")[0] for name in layers.names] == list(_LAYERS)
    assert layers.names[0] in caplog.text
    assert type(model).__name__ in repr(layers)
    for name, module in [*other.named_modules(), *model.named_modules()]:
        changed = module.__dict__.get("forward")
        assert (changed is not None) == (name in layers.names and module is model.get_submodule(name))


def test_restored_and_accelerated_again(family: str, used: list[str]) -> None:
    model = make_model(family)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    state = {name: x.clone() for name, x in model.state_dict().items()}
    first = accelerate_gated_delta(model)
    forwards = [model.get_submodule(name).forward for name in first.names]
    assert accelerate_gated_delta(model).names == first.names
    assert [model.get_submodule(name).forward for name in first.names] == forwards
    copied = copy.deepcopy(model)
    for undo in (first.restore, first.restore, lambda: restore_gated_delta(model)):
        undo()
        for name, module in model.named_modules():
            assert module.__dict__.keys() == before[name].keys()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        model(_TOKENS[:1, :5])
        assert not used
        copied(_TOKENS[:1, :5])
        assert len(used) == 3
        accelerate_gated_delta(model)
        model(_TOKENS[:1, :5])
        assert len(used) == 6


def test_a_forward_that_was_set_on_the_layer_runs_on_and_comes_back(used: list[str]) -> None:
    model = make_model("qwen3_next")
    layer = model.get_submodule("model.layers.0.linear_attn")
    stock, calls = type(layer).forward, []

    @wraps(stock)
    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return stock(self, *args, **kwargs)

    layer.forward = MethodType(own, layer)
    accelerate_gated_delta(model)
    with torch.no_grad():
        model(_TOKENS[:1, :9])
    assert calls == [layer]
    assert len(used) == 3
    restore_gated_delta(model)
    assert layer.__dict__["forward"] == MethodType(own, layer)


def test_what_cannot_be_accelerated_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"must have gated delta layers.*; got Linear, which has none"):
        accelerate_gated_delta(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
        accelerate_gated_delta("Qwen/Qwen3.5-4B")  # pyright: ignore[reportArgumentType]
    model = make_model("qwen3_next")
    layer = model.get_submodule("model.layers.3.linear_attn")
    layer.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=r"model\.layers\.3\.linear_attn\.forward must be the forward of its class"):
        accelerate_gated_delta(model)
    assert "forward" not in model.get_submodule("model.layers.0.linear_attn").__dict__


def test_a_rule_with_other_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("olmo_hybrid")
    changed = lambda query, key, value, beta, decay: None  # noqa: E731
    monkeypatch.setattr(modeling("olmo_hybrid"), "torch_chunk_gated_delta_rule", changed)
    gated_delta._with_our_rules.cache_clear()  # forwards are made once for a class
    with pytest.raises(
        ValueError, match=r"torch_chunk_gated_delta_rule of transformers must take query, key, value, g"
    ):
        accelerate_gated_delta(model)


def test_packed_rows_with_a_past_are_refused() -> None:
    model = make_model("olmo_hybrid")
    accelerate_gated_delta(model)
    bounds = torch.tensor([0, 5, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"packed sequences must be one row of cu_seq_lens_q\[-1\] = 9 tokens"):
        model(_TOKENS[:2, :9], cu_seq_lens_q=bounds, use_cache=False)


@pytest.mark.slow
def test_a_compiled_model_is_one_graph() -> None:
    model = make_model("olmo_hybrid")
    accelerate_gated_delta(model)
    with torch.no_grad():
        expected = model(_TOKENS, use_cache=False).logits
        found = torch.compile(model, fullgraph=True)(_TOKENS, use_cache=False).logits
    assert relative(found, expected) < 1e-5
