"""The loss without logits equals the plain one, in value and in every gradient, and holds no logits of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import functional
from torch.nn.functional import linear

from cottention.models import CottentionGPTForCausalLM
from cottention.models import linear_cross_entropy as module
from cottention.models.linear_cross_entropy import linear_cross_entropy
from cottention.models.losses import cross_entropy
from tests.models.helpers import gpt_config, gradients, randomised, some_tokens


@pytest.fixture(params=[1, 7, 64])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CPU_TOKENS", request.param)


def _inputs(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((3, 11, 8), (29, 8)))
    labels = torch.randint(0, 29, (3, 11)).masked_fill(torch.arange(11) % 4 == 1, -100)
    return x, weight, torch.randn(29, dtype=dtype, requires_grad=True) if bias else None, labels


def _loss_and_gradients(loss: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [each for each in inputs if each is not None])]


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("num_items", [None, 50, torch.tensor(50)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_plain_loss_and_its_gradients(bias: bool, num_items: Any) -> None:
    x, weight, b, labels = _inputs(bias=bias)
    found = _loss_and_gradients(3 * linear_cross_entropy(x, weight, b, labels, num_items), x, weight, b)
    expected = _loss_and_gradients(3 * cross_entropy(linear(x, weight, b), labels, num_items), x, weight, b)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("chunk")
@pytest.mark.slow
def test_passes_gradcheck() -> None:
    x, weight, bias, labels = _inputs()
    assert bias is not None
    assert torch.autograd.gradcheck(lambda x, w, b: linear_cross_entropy(x, w, b, labels), (x, weight, bias))


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_each_input_may_be_frozen(trained: int) -> None:
    inputs = _inputs()
    for number, each in enumerate(inputs[:3]):
        assert each is not None
        each.requires_grad_(number == trained)
    chosen = inputs[trained]
    found = _loss_and_gradients(linear_cross_entropy(*inputs), chosen)
    expected = _loss_and_gradients(cross_entropy(linear(*inputs[:3]), inputs[3]), chosen)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_without_gradients_and_without_labels() -> None:
    x, weight, bias, labels = _inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(x, weight, bias, labels), cross_entropy(linear(x, weight, bias), labels)
        )
    loss = linear_cross_entropy(x, weight, bias, torch.full_like(labels, -100))
    assert loss == 0
    assert all(gradient.count_nonzero() == 0 for gradient in torch.autograd.grad(loss, (x, weight)))


def test_under_autocast_sums_gradients_in_float32() -> None:
    x, weight, bias, labels = _inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _loss_and_gradients(linear_cross_entropy(x, weight, bias, labels), x, weight, bias)
    expected = _loss_and_gradients(cross_entropy(linear(x, weight, bias), labels), x, weight, bias)
    assert [each.dtype for each in found] == [torch.float32] * 4
    for each, exact in zip(found, expected, strict=True):
        assert (each - exact).norm() < 1e-2 * exact.norm()  # bfloat16 has 8 bits
        assert (each - exact).norm() > 0


# torch's own tracer makes an instance of the class, of which torch warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_graph_break() -> None:
    x, weight, bias, labels = _inputs()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    found = _loss_and_gradients(compiled(x, weight, bias, labels), x, weight, bias)
    torch.testing.assert_close(
        found, _loss_and_gradients(linear_cross_entropy(x, weight, bias, labels), x, weight, bias)
    )


_ROUTES: dict[str, Any] = {
    "hvp": lambda f, x, t: functional.hvp(f, x, t)[1],
    "hessian": lambda f, x, t: [h for row in functional.hessian(f, x) for h in row],
    "forward-mode jacobian": lambda f, x, t: functional.jacobian(f, x, strategy="forward-mode", vectorize=True),
    "func.grad": lambda f, x, t: torch.func.grad(f, (0, 1, 2))(*x),
    "func.hessian": lambda f, x, t: [h for row in torch.func.hessian(f, (0, 1, 2))(*x) for h in row],
    "func.jvp": lambda f, x, t: torch.func.jvp(f, x, t),
    "func.jacrev": lambda f, x, t: torch.func.jacrev(f, (0, 1, 2))(*x),
    "vmap of grad": lambda f, x, t: torch.vmap(torch.func.grad(f, (0, 1, 2)))(
        *(torch.stack(pair) for pair in zip(x, t, strict=True))
    ),
}


def _penalty(loss: Tensor, inputs: Any, *, by_backward: bool) -> list[Tensor]:
    """Gradients of the squared norm of the gradients."""
    if by_backward:
        loss.backward(create_graph=True)
        gradients = [each.grad for each in inputs]
    else:
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    return list(torch.autograd.grad(torch.stack([g.square().sum() for g in gradients]).sum(), inputs))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("route", _ROUTES)
def test_each_route_gives_the_derivatives_of_the_plain_loss(route: str) -> None:
    x, weight, bias, labels = _inputs()
    assert bias is not None
    inputs = (x[0, :, :5].detach(), weight[:, :5].detach(), bias.detach())
    tangents = tuple(torch.randn_like(each) for each in inputs)
    found = _ROUTES[route](lambda x, w, b: linear_cross_entropy(x, w, b, labels[0]), inputs, tangents)
    expected = _ROUTES[route](lambda x, w, b: cross_entropy(linear(x, w, b), labels[0]), inputs, tangents)
    assert any(each.abs().max() > 0 for each in expected)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("by_backward", [False, True])
def test_a_gradient_penalty_is_that_of_the_plain_loss(by_backward: bool) -> None:
    x, weight, bias, labels = _inputs()
    assert bias is not None
    found = _penalty(linear_cross_entropy(x, weight, bias, labels), (x, weight, bias), by_backward=by_backward)
    for each in (x, weight, bias):
        each.grad = None
    expected = _penalty(cross_entropy(linear(x, weight, bias), labels), (x, weight, bias), by_backward=by_backward)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("route", ["func.grad", "func.jvp", "vmap of grad"])
def test_a_compiled_transform_gives_the_same(route: str) -> None:
    x, weight, bias, labels = _inputs()
    assert bias is not None
    inputs = (x[0].detach(), weight.detach(), bias.detach())
    tangents = tuple(torch.randn_like(each) for each in inputs)

    def run(x: Any, t: Any) -> Any:
        return tuple(_ROUTES[route](lambda x, w, b: linear_cross_entropy(x, w, b, labels[0]), x, t))

    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(inputs, tangents), run(inputs, tangents))


@pytest.mark.parametrize("wrong", [-1, -101, 29, 10**6])
def test_a_label_out_of_range_raises_as_the_plain_loss_does(wrong: int) -> None:
    x, weight, bias, labels = _inputs()
    labels[1, 2] = wrong
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy(linear(x, weight, bias), labels)
    with pytest.raises(IndexError, match=f"labels must be -100 or from 0 to 28; got {wrong}, which is out of bounds"):
        linear_cross_entropy(x, weight, bias, labels)
    with pytest.raises(IndexError, match="out of bounds"):
        torch.func.grad(linear_cross_entropy, 0)(x, weight, bias, labels)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_whole_gpt_has_the_curvature_of_naive(fused: bool, checkpointing: bool) -> None:
    ids = some_tokens(2, 12)
    results = []
    for implementation in ("naive", "auto", "native"):
        model = randomised(CottentionGPTForCausalLM(gpt_config())).train()
        if implementation == "native":
            model = model.float()
        model.set_implementation(implementation)
        model.fused_loss = fused and implementation != "naive"
        if checkpointing and implementation != "naive":
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        parameters = [p for p in model.parameters() if p.requires_grad]
        directions = [
            torch.cos(torch.arange(p.numel(), dtype=torch.float64)).view_as(p).to(p.dtype) for p in parameters
        ]
        loss = model(ids, labels=ids).loss
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        along = torch.stack([(g * t).sum() for g, t in zip(first, directions, strict=True)]).sum()
        product = torch.autograd.grad(along, parameters, retain_graph=True)
        penalty = torch.autograd.grad(loss + torch.stack([g.square().sum() for g in first]).sum(), parameters)
        results.append(torch.cat([g.flatten().double() for g in (*product, *penalty)]))
    naive, auto, native = results
    assert (auto - naive).norm() < 1e-9 * naive.norm()
    assert (native - naive).norm() < 1e-3 * naive.norm()  # float32, twice through unit vectors


@pytest.mark.parametrize("how", ["labels", "shift_labels", "cu_seqlens"])
def test_a_gpt_trains_alike_with_and_without_logits(how: str) -> None:
    model = randomised(CottentionGPTForCausalLM(gpt_config()))
    ids = some_tokens(1 if how == "cu_seqlens" else 3, 12)
    inputs: dict[str, Any] = {
        "shift_labels" if how == "shift_labels" else "labels": ids.masked_fill(ids % 5 == 0, -100)
    }
    if how == "cu_seqlens":
        inputs["cu_seqlens"] = torch.tensor([0, 5, 12], dtype=torch.int32)
    outputs, found = [], []
    for fused in (False, True):
        model.fused_loss = fused
        model.zero_grad()
        outputs.append(model(ids, num_items_in_batch=40, **inputs))
        outputs[-1].loss.backward()
        found.append({name: gradient.clone() for name, gradient in gradients(model).items()})
    assert outputs[0].logits is not None
    assert outputs[1].logits is None
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-14)
    assert model(ids).logits is not None


def test_no_more_than_a_chunk_of_logits_is_held() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    x, weight = torch.randn(2048, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    with Watch():
        linear_cross_entropy(x, weight, None, torch.randint(0, 1000, (2048,))).backward()
    assert largest == 256 * 1000
