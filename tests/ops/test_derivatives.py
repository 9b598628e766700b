"""Derivatives of derivatives, forward mode and torch.func: each route of PyTorch gives what the naive form gives.

A kernel that has a forward and a backward alone would answer many of these with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional
from torch.utils.checkpoint import checkpoint

from cottention.ops import CosineState, cosine_attention, cosine_attention_step
from cottention.ops.native import is_available
from tests.ops.helpers import Case, make_case

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning"),
]

Function = Callable[..., Any]
Leaves = tuple[Tensor, ...]

# float32 against float64: second derivatives of unit vectors multiply a few rounding errors.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
_FORMS = [("chunk", torch.float64), ("native", torch.float32)] if is_available() else [("chunk", torch.float64)]


def _case(kind: str, T: int) -> Case:
    sizes: dict[str, Any] = {"H": 2, "K": 3, "V": 2}
    return {
        "causal": lambda: make_case(B=2, T=T, mask="holes", **sizes),
        "no divisor": lambda: make_case(B=1, T=T, norm_const=False, **sizes),
        "bidirectional": lambda: make_case(B=2, T=T, causal=False, mask="left", **sizes),
        "cross": lambda: make_case(B=1, T=3, S=T, causal=False, mask="right", **sizes),
        "packed": lambda: make_case(lengths=[T - 3, 0, 3], with_state=True, output_final_state=True, **sizes),
        "packed bidirectional": lambda: make_case(lengths=[T - 3, 0, 3], causal=False, **sizes),
        "state": lambda: make_case(B=2, T=T, mask="holes", with_state=True, output_final_state=True, **sizes),
    }[kind]()


_KINDS = ["causal", "no divisor", "bidirectional", "cross", "packed", "packed bidirectional", "state"]


def _leaves(case: Case) -> Leaves:
    kv = None if case.initial_state is None else case.initial_state.kv
    return tuple(x for x in (case.q, case.k, case.v, case.norm_const, kv) if x is not None)


def _loss(case: Case, implementation: str, *, linear: bool) -> Function:
    """A number of all results; linear in them, it hands a constant gradient to the operation."""

    def loss(*leaves: Tensor) -> Tensor:
        q, k, v, *rest = leaves
        norm_const = None if case.norm_const is None else rest.pop(0)
        state = None if case.initial_state is None else CosineState(rest.pop(0), case.initial_state.seen)
        o, final = cosine_attention(
            q,
            k,
            v,
            norm_const,
            causal=case.causal,
            attention_mask=case.attention_mask,
            cu_seqlens=case.cu_seqlens,
            initial_state=state,
            output_final_state=case.output_final_state,
            implementation=implementation,
        )
        results = [o] if final is None else [o, final.kv]
        return torch.stack([_weighted(x).sum() if linear else (_weighted(x) * x).sum() for x in results]).sum()

    return loss


def _weighted(x: Tensor) -> Tensor:
    return x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)


def _directions(leaves: Leaves) -> Leaves:
    return tuple(torch.cos(torch.arange(x.numel(), dtype=torch.float64)).to(x.dtype).reshape(x.shape) for x in leaves)


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([x.sum() for x in tensors]).sum()


def _own(leaves: Leaves) -> Leaves:
    return tuple(x.clone().requires_grad_() for x in leaves)


def _gradient_of_gradient(f: Function, x: Leaves) -> Sequence[Any]:
    x = _own(x)
    found = torch.autograd.grad(f(*x), x, create_graph=True)
    return torch.autograd.grad(_total(g * t for g, t in zip(found, _directions(x), strict=True)), x)


def _backward(f: Function, x: Leaves) -> Sequence[Any]:
    x = _own(x)
    f(*x).backward(create_graph=True)
    gradients = [each.grad for each in x]
    return torch.autograd.grad(_total(g.square() for g in gradients if g is not None), x)


def _third(f: Function, x: Leaves) -> Sequence[Any]:
    x = _own(x)
    found = torch.autograd.grad(f(*x), x, create_graph=True)
    found = torch.autograd.grad(_total(g.square() for g in found), x, create_graph=True)
    return torch.autograd.grad(_total(g.square() for g in found), x)


def _dual_numbers(f: Function, x: Leaves) -> Sequence[Any]:
    with forward_ad.dual_level():
        out = f(*(forward_ad.make_dual(each, t) for each, t in zip(x, _directions(x), strict=True)))
        return [forward_ad.unpack_dual(out).tangent]


def _dual_without_gradient(f: Function, x: Leaves) -> Sequence[Any]:
    with torch.no_grad():
        return _dual_numbers(f, x)


def _dual_incoming(f: Function, x: Leaves) -> Sequence[Any]:
    x = _own(x)
    out = f(*x)
    with forward_ad.dual_level():
        incoming = forward_ad.make_dual(torch.ones_like(out), torch.full_like(out, 0.5))
        found = torch.autograd.grad(out, x, incoming)
        return [forward_ad.unpack_dual(g).tangent for g in found]


def _batched_gradient(f: Function, x: Leaves) -> Sequence[Any]:
    x = _own(x)
    return torch.autograd.grad(f(*x), x, torch.tensor([1.0, 0.5, -2.0], dtype=x[0].dtype), is_grads_batched=True)


def _mapped_gradient(f: Function, x: Leaves) -> Sequence[Any]:
    x = _own(x)
    out = f(*x)
    scales = torch.tensor([1.0, 0.5, -2.0], dtype=x[0].dtype)
    return torch.vmap(lambda scale: torch.autograd.grad(out, x, scale, retain_graph=True))(scales)


def _func_jvp(f: Function, x: Any) -> Sequence[Any]:
    return torch.func.jvp(f, x, _directions(x))


def _twice(x: Leaves) -> Leaves:
    return tuple(torch.stack([each, each.flip(-1)]) for each in x)


def _all(x: Leaves) -> tuple[int, ...]:
    return tuple(range(len(x)))


def _flat(found: Any) -> Sequence[Any]:
    return [found] if isinstance(found, Tensor) else [x for each in found for x in _flat(each)]


_ROUTES: dict[str, Callable[[Function, Leaves], Sequence[Any]]] = {
    "gradient of gradient": _gradient_of_gradient,
    "backward(create_graph)": _backward,
    "third": _third,
    "dual numbers": _dual_numbers,
    "dual numbers without gradient": _dual_without_gradient,
    "dual incoming": _dual_incoming,
    "batched gradient": _batched_gradient,
    "mapped gradient": _mapped_gradient,
    "hvp": lambda f, x: functional.hvp(f, x, _directions(x))[1],
    "vhp": lambda f, x: functional.vhp(f, x, _directions(x))[1],
    "hessian": lambda f, x: _flat(functional.hessian(f, x)),
    "vectorized hessian": lambda f, x: _flat(functional.hessian(f, x, vectorize=True)),
    "forward-mode hessian": lambda f, x: _flat(
        functional.hessian(f, x, vectorize=True, outer_jacobian_strategy="forward-mode")
    ),
    "forward-mode jacobian": lambda f, x: functional.jacobian(f, x, strategy="forward-mode", vectorize=True),
    "func.grad": lambda f, x: torch.func.grad(f, _all(x))(*x),
    "func.hessian": lambda f, x: _flat(torch.func.hessian(f, _all(x))(*x)),
    "func.jvp": _func_jvp,
    "func.vjp": lambda f, x: torch.func.vjp(f, *x)[1](f(*x)),
    "func.jacfwd": lambda f, x: torch.func.jacfwd(f, _all(x))(*x),
    "func.jacrev": lambda f, x: torch.func.jacrev(f, _all(x))(*x),
    "vmap": lambda f, x: [torch.vmap(f)(*_twice(x))],
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(f, _all(x)))(*_twice(x)),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f, _all(x)), x, _directions(x))[1],
    "grad of jvp": lambda f, x: torch.func.grad(lambda *y: _func_jvp(f, y)[1], _all(x))(*x),
}


def _to(leaves: Leaves, dtype: torch.dtype) -> Leaves:
    return tuple(x.to(dtype) for x in leaves)


def _assert_same(found: Sequence[Any], expected: Sequence[Any], dtype: torch.dtype) -> None:
    assert len(found) == len(expected)
    for actual, truth in zip(found, expected, strict=True):
        assert actual.shape == truth.shape
        error = (actual.double() - truth).abs().max().item() if truth.numel() else 0.0
        assert error <= _TOLERANCE[dtype] * max(1.0, truth.abs().max().item() if truth.numel() else 0.0)


@pytest.mark.parametrize("kind", ["state", "bidirectional", pytest.param("packed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("route", _ROUTES)
def test_each_route_gives_the_derivatives_of_naive(route: str, kind: str) -> None:
    case = _case(kind, T=4)
    for linear in (False, True):
        expected = _ROUTES[route](_loss(case, "naive", linear=linear), _leaves(case))
        assert any(x.abs().max() > 0 for x in expected)
        for implementation, dtype in _FORMS:
            given = case.to(dtype)
            found = _ROUTES[route](_loss(given, implementation, linear=linear), _leaves(given))
            _assert_same(found, expected, dtype)


@pytest.mark.parametrize("route", ["gradient of gradient", "func.jvp", "vmap of grad"])
@pytest.mark.parametrize("kind", _KINDS)
def test_they_hold_over_many_chunks(kind: str, route: str) -> None:
    case = _case(kind, T=150)
    expected = _ROUTES[route](_loss(case, "naive", linear=False), _leaves(case))
    _assert_same(_ROUTES[route](_loss(case, "chunk", linear=False), _leaves(case)), expected, torch.float64)


@pytest.mark.parametrize("index", range(5))
def test_each_input_alone_has_its_second_derivative(index: int) -> None:
    case = _case("state", T=5)
    results = []
    for implementation, dtype in (("naive", torch.float64), *_FORMS):
        given = case.to(dtype)
        values = list(_leaves(given))

        def alone(x: Tensor) -> Tensor:
            others = [*values[:index], x, *values[index + 1 :]]  # noqa: B023
            return _loss(given, implementation, linear=False)(*others)  # noqa: B023

        results.append(_flat(functional.hessian(alone, values[index])))
    assert results[0][0].abs().max() > 0
    for found, (_, dtype) in zip(results[1:], _FORMS, strict=True):
        _assert_same(found, results[0], dtype)


@pytest.mark.parametrize("implementation", [form for form, _ in _FORMS])
def test_one_tensor_in_all_places_is_differentiated_in_each(implementation: str) -> None:
    x = torch.randn(1, 5, 1, 3, generator=torch.Generator().manual_seed(0))

    def loss(x: Tensor, implementation: str) -> Tensor:
        return cosine_attention(x, x * x, x + 1, None, causal=True, implementation=implementation)[0].square().sum()

    found = functional.hessian(lambda x: loss(x, implementation), x)
    expected = functional.hessian(lambda x: loss(x, "naive"), x.double())
    _assert_same(_flat(found), _flat(expected), torch.float32)


@pytest.mark.parametrize("implementation", [form for form, _ in _FORMS])
def test_it_holds_under_autocast_and_checkpointing(implementation: str) -> None:
    case = _case("causal", T=20).to(torch.float32)
    x = _leaves(case)
    expected = _gradient_of_gradient(_loss(case, "naive", linear=False), x)

    def checkpointed(*x: Tensor) -> Tensor:
        return checkpoint(_loss(case, implementation, linear=False), *x, use_reentrant=False)  # type: ignore[return-value]

    _assert_same(_gradient_of_gradient(checkpointed, x), [g.double() for g in expected], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = _gradient_of_gradient(_loss(case, "naive", linear=False), x)
        found = _gradient_of_gradient(_loss(case, implementation, linear=False), x)
    for actual, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=0.05, atol=0.05 * truth.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["chunk", "native"])
def test_compiled_transforms_give_the_same_and_a_compiled_gradient_says_that_it_has_none(implementation: str) -> None:
    dtype = dict(_FORMS).get(implementation, torch.float64)
    case = _case("causal", T=5).to(dtype)
    x = _leaves(case)
    loss = _loss(case, implementation, linear=False)
    truth = _loss(_case("causal", T=5), "naive", linear=False)
    torch.compiler.reset()
    for route in ("func.grad", "func.jvp", "vmap"):
        compiled = torch.compile(lambda *x, run=_ROUTES[route]: run(loss, x), backend="aot_eager", fullgraph=True)
        _assert_same(compiled(*x), _ROUTES[route](truth, _leaves(_case("causal", T=5))), dtype)
    own = _own(x)
    (found,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(*own), own[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        found.sum().backward()


def _step_loss(*x: Tensor, in_place: bool = False) -> Tensor:
    q, k, v, m, kv = x
    state = CosineState(kv, torch.tensor([2, 0]))
    o, state = cosine_attention_step(q, k, v, m, state, attention_mask=torch.tensor([1, 1]), in_place=in_place)
    return (_weighted(o) * o).sum() + (_weighted(state.kv) * state.kv).sum()


def _step_by_naive(*x: Tensor) -> Tensor:
    q, k, v, m, kv = x
    o, state = cosine_attention(
        q[:, None],
        k[:, None],
        v[:, None],
        m,
        causal=True,
        initial_state=CosineState(kv, torch.tensor([2, 0])),
        output_final_state=True,
        implementation="naive",
    )
    assert state is not None
    return (_weighted(o[:, 0]) * o[:, 0]).sum() + (_weighted(state.kv) * state.kv).sum()


def _token(dtype: torch.dtype) -> Leaves:
    case = make_case(B=2, T=1, K=3, V=2, with_state=True).to(dtype)
    return tuple(x[:, 0] if i < 3 else x for i, x in enumerate(_leaves(case)))


@pytest.mark.parametrize("route", _ROUTES)
def test_each_route_gives_the_derivatives_of_the_step(route: str) -> None:
    expected = _ROUTES[route](_step_by_naive, _token(torch.float64))
    for dtype in (torch.float64, torch.float32):
        _assert_same(_ROUTES[route](_step_loss, _token(dtype)), expected, dtype)


def test_a_step_in_place_takes_nothing_that_is_differentiated() -> None:
    x = _token(torch.float32)

    def in_place(*x: Tensor) -> Tensor:
        return _step_loss(*x, in_place=True)

    for route in ("gradient of gradient", "func.jvp", "dual numbers without gradient", "vmap"):
        with pytest.raises(ValueError, match="in_place needs a state to write over and no gradient"):
            _ROUTES[route](in_place, x)


@pytest.mark.parametrize("form", ["naive", "step", "chunk"])
def test_second_derivatives_at_zero_are_finite_and_alike(form: str) -> None:
    """The norm has none there; what divides by it, max(||x||, 1e-12), is constant."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 2, 3, dtype=torch.float64, generator=generator) for _ in range(3))
    q[..., 0, :], k[..., 1, :] = 0, 0
    norm_const = torch.tensor([0.5, -1.0], dtype=torch.float64)
    leaves = tuple(x.requires_grad_() for x in (q, k, v, norm_const))

    def loss(implementation: str) -> Tensor:
        if implementation == "step":
            o, _ = cosine_attention_step(q, k, v, norm_const, None)
        else:
            o, _ = cosine_attention(q, k, v, norm_const, causal=True, implementation=implementation)
        return (_weighted(o) * o).sum()

    def derivatives(implementation: str) -> Leaves:
        first = torch.autograd.grad(loss(implementation), leaves, create_graph=True)
        return *first, *torch.autograd.grad(_total(first), leaves)

    for found, expected in zip(derivatives(form), derivatives("naive"), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
