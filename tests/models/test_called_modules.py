"""Every part of a model is called, never read past: adapters, hooks and offloaded weights take effect everywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as QuantisedLinear
from torch.nn.utils import parametrize, prune

from cottention import models as ours
from cottention.models import (
    CottentionBertForMaskedLM,
    CottentionBertModel,
    CottentionGPTForCausalLM,
    fused_loss,
    linear_cross_entropy,
)
from cottention.models.fused_loss import is_plain_linear
from tests.models.helpers import ATTENTION_TYPES, bert_config, gpt_config, gradients, randomised, some_tokens

TOKENS = some_tokens(2, 11)
LABELS = TOKENS.masked_fill(TOKENS % 5 == 0, -100)


class Adapted(nn.Module):
    """What an adapter makes of a layer: the layer and a low-rank update beside it."""

    def __init__(self, base: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Linear(width, 2, bias=False), nn.Linear(2, outputs, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def adapt(model: Any) -> None:
    model.lm_head = Adapted(model.lm_head, 32, 61).double()


def hook_the_output(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: output * 2)


def hook_the_input(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))


def hook_everything(_model: Any) -> Any:
    def double(module: nn.Module, _inputs: Any, output: Any) -> Any:
        return output * 2 if getattr(module, "out_features", 0) == 61 else output

    return nn.modules.module.register_module_forward_hook(double)


def parametrise(model: Any) -> None:
    parametrize.register_parametrization(model.lm_head, "weight", Half())


def prune_half(model: Any) -> None:
    prune.l1_unstructured(model.lm_head, "weight", amount=0.5)


def put_a_subclass_there(model: Any) -> None:
    old = model.lm_head
    model.lm_head = Scaled(32, 61).double()
    model.lm_head.load_state_dict(old.state_dict())


def put_a_forward_there(model: Any) -> None:
    old = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * old(x)


def offload(model: Any) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


HEADS: list[Callable[[Any], Any]] = [
    adapt,
    hook_the_output,
    hook_the_input,
    hook_everything,
    parametrise,
    prune_half,
    put_a_subclass_there,
    put_a_forward_there,
    offload,
]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_CPU_TOKENS", 5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("change", HEADS)
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_the_fused_loss_is_that_of_the_head_as_it_is(change: Callable[[Any], Any], attention_type: str) -> None:
    plain = randomised(CottentionGPTForCausalLM(gpt_config(attention_type)))
    found = {}
    changed = copy.deepcopy(plain)
    handle = change(changed)
    try:
        assert not is_plain_linear(changed.lm_head)
        for fused in (False, True):
            changed.zero_grad()
            changed.fused_loss = fused
            out = changed(TOKENS, labels=LABELS)
            assert (out.logits is None) == fused
            if change is not offload:
                out.loss.backward()
            found[fused] = out.loss, gradients(changed)
    finally:
        if handle is not None:
            handle.remove()
    torch.testing.assert_close(found[True], found[False], rtol=1e-12, atol=1e-13)
    if change is adapt:
        assert {"lm_head.a.weight", "lm_head.b.weight"} <= set(found[True][1])
    if change is not offload:
        assert found[True][0] != plain(TOKENS, labels=LABELS).loss


@pytest.mark.usefixtures("small_chunks")
def test_an_adapter_on_the_head_alone_learns_under_the_fused_loss() -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config())).requires_grad_(False)
    model.lm_head = Adapted(model.lm_head, 32, 61).double()
    model.lm_head.base_layer.requires_grad_(False)
    model.fused_loss = True
    model(TOKENS, labels=LABELS, num_items_in_batch=7).loss.backward()
    found = gradients(model)
    model.zero_grad()
    model.fused_loss = False
    model(TOKENS, labels=LABELS, num_items_in_batch=7).loss.backward()
    assert set(found) == {"lm_head.a.weight", "lm_head.b.weight"}
    torch.testing.assert_close(found, gradients(model), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # torch's own quantiser calls it
def test_a_quantised_head_is_called() -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config()), torch.float32)
    plain = model(TOKENS, labels=LABELS).loss
    model.lm_head = QuantisedLinear.from_float(quantisable(model.lm_head))
    expected = model(TOKENS, labels=LABELS).loss
    model.fused_loss = True
    torch.testing.assert_close(model(TOKENS, labels=LABELS).loss, expected)
    assert expected != plain


def quantisable(layer: nn.Linear) -> nn.Linear:
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig  # type: ignore[assignment]
    return layer


def test_a_backward_hook_on_the_head_runs() -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config()))
    seen: list[Any] = []
    model.lm_head.register_full_backward_hook(lambda *gradients: seen.append(gradients))
    model.fused_loss = True
    model(TOKENS, labels=LABELS).loss.backward()
    assert seen


def test_a_head_that_is_nothing_else_takes_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config()))
    assert is_plain_linear(model.lm_head)
    assert is_plain_linear(nn.Linear(3, 4, bias=False))
    assert not is_plain_linear(nn.Linear(3, 4, device="meta"))
    calls: list[Any] = []
    monkeypatch.setattr(fused_loss, "linear_cross_entropy", lambda *args: calls.append(args) or args[0].sum())
    model.fused_loss = True
    model(TOKENS, labels=LABELS)
    assert len(calls) == 1


@pytest.mark.usefixtures("small_chunks")
def test_a_called_head_holds_the_logits_of_one_chunk() -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config(vocab_size=1000)))
    adapted = Adapted(model.lm_head, 32, 1000).double()
    rows: list[int] = []
    adapted.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    model.lm_head, model.fused_loss = adapted, True
    saved: list[int] = []

    def save(x: Tensor) -> Tensor:
        saved.append(x.numel() if x.shape[-1:] == (1000,) else 0)
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        loss = model(TOKENS, labels=LABELS).loss
    assert rows == [5, 5, 5, 5, 2]
    assert sum(saved) == 0
    loss.backward()
    assert rows == [5, 5, 5, 5, 2, 2, 5, 5, 5, 5]


def offloaded(model: Any, where: str, folder: Any) -> Any:
    if where == "disk":
        return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_offloaded_models_answer_as_others(attention_type: str, where: str, tmp_path: Any) -> None:
    for name, make in (("bert", bert_config), ("gpt", gpt_config)):
        kind: Any = CottentionBertForMaskedLM if name == "bert" else CottentionGPTForCausalLM
        model = randomised(kind(make(attention_type)))
        with torch.no_grad():
            expected = model(TOKENS, labels=LABELS)
            found = offloaded(model, where, tmp_path / name)(TOKENS, labels=LABELS)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
        torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=0)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_an_adapter_on_token_types_counts_without_token_types(attention_type: str) -> None:
    model = randomised(CottentionBertModel(bert_config(attention_type)))
    before = model(TOKENS).last_hidden_state
    model.embeddings.token_type_embeddings.register_forward_hook(lambda _module, _inputs, output: output * 2)
    after = model(TOKENS).last_hidden_state
    torch.testing.assert_close(after, model(TOKENS, token_type_ids=torch.zeros_like(TOKENS)).last_hidden_state)
    assert not torch.allclose(before, after)


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, part) for name, part in model.named_modules() if not isinstance(part, nn.ModuleList))


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("name", [name for name in ours.__all__ if "For" in name or name.endswith("Model")])
def test_every_module_is_called(name: str, attention_type: str) -> None:
    make = gpt_config if "GPT" in name else bert_config
    model = getattr(ours, name)(make(attention_type)).eval()
    called: dict[str, int] = {}
    for part, module in parts_of(model):
        module.register_forward_pre_hook(lambda *_, part=part: called.update({part: called.get(part, 0) + 1}))
    model(TOKENS[None] if name.endswith("MultipleChoice") else TOKENS)
    assert set(called) == {part for part, _ in parts_of(model)}
    assert set(called.values()) == {1}


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_every_module_is_called_in_decoding(attention_type: str) -> None:
    model = CottentionGPTForCausalLM(gpt_config(attention_type)).eval()
    past = model(TOKENS, use_cache=True).past_key_values
    called: set[str] = set()
    for part, module in parts_of(model):
        module.register_forward_pre_hook(lambda *_, part=part: called.add(part))
    model(TOKENS[:, :1], past_key_values=past)
    assert called == {part for part, _ in parts_of(model)}
