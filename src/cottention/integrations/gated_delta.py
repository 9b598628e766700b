"""`cosine_attention` under the gated delta layers of transformers: Qwen3-Next, Qwen3.5, OLMo-hybrid and their kin.

On a CPU transformers computes these layers in a long form of PyTorch operators. Their projections, convolution, cache
and norms stay as they are; the two functions that the layer's forward calls become ours.

    layers = accelerate_gated_delta(model)      # says which; the same outputs and gradients, faster
    layers.restore()                            # or restore_gated_delta(model)

transformers chooses its kernels when a modeling file is imported, or for a whole process through the package `kernels`:
its functions are one object for all models. So a layer here gets a forward of its own, set on the layer itself as
`kernels` sets one: the forward of its class, in which the two names stand for ours. Other models never see it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache, update_wrapper
from types import CellType, FunctionType, MethodType, TracebackType
from typing import Any

from torch import Tensor, nn

from cottention.integrations.delta_rule import (
    boundaries_of,
    chunk_gated_delta_rule,
    packed_causal_conv1d,
    recurrent_gated_delta_rule,
)
from cottention.logging import get_logger

_RULES = {
    "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
    "torch_recurrent_gated_delta_rule": recurrent_gated_delta_rule,
}
_CONV = "causal_conv1d_fn"
# What a rule must be called with to be ours.
_FIRST_PARAMETERS = ("query", "key", "value", "g", "beta")
_OPTIONS = frozenset({"initial_state", "output_final_state", "use_qk_l2norm_in_kernel"})

_logger = get_logger(__name__)


class AcceleratedLayers:
    """The gated delta layers of a model that run on `cosine_attention`; as a context manager, until its end.

    Attributes:
        names: of the layers, as in `model.named_modules()`.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self._model = model
        self.names = names

    def restore(self) -> None:
        """Give the layers transformers' own functions back; nothing where that is done."""
        restore_gated_delta(self._model)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"{len(self.names)} gated delta layers of {type(self._model).__name__}: {', '.join(self.names)}"

    def __enter__(self) -> AcceleratedLayers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def accelerate_gated_delta(model: nn.Module) -> AcceleratedLayers:
    """Put `cosine_attention` and its step under a model's gated delta layers: prefill, decoding and training on a CPU.

    Outputs, gradients, caches and saved files are as before, to float32's rounding; tensors on another device go to
    transformers' own functions. Sequences packed by `cu_seq_lens_q` or `seq_idx`, which transformers refuses on a CPU
    or lets run into each other, are kept apart. Copies of the model are accelerated too; what is saved and loaded is
    not. A second call changes nothing.

    Args:
        model: of transformers' families Qwen3-Next, Qwen3.5 (dense or MoE) and OLMo-hybrid, or another whose layers
            call the same two functions; any module around such layers.
    Returns:
        The layers, by name, which undo it (`restore`, or as a context manager).
    Raises:
        TypeError: the model is no module.
        ValueError: it has no such layer, or one that this version of transformers or another library changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    layers = dict(_layers_of(model))
    if not layers:
        raise ValueError(
            "model must have gated delta layers, as Qwen3-Next, Qwen3.5 and OLMo-hybrid of transformers do; "
            f"got {type(model).__name__}, which has none"
        )
    forwards = {name: _accelerated_forward(layer, name) for name, layer in layers.items()}  # of all, before any is set
    for name, layer in layers.items():
        layer.forward = MethodType(forwards[name], layer)
    accelerated = AcceleratedLayers(model, tuple(layers))
    _logger.info("cosine attention runs under %s", accelerated)
    return accelerated


def restore_gated_delta(model: nn.Module) -> None:
    """Undo `accelerate_gated_delta`: every layer is as before; nothing where there is nothing to undo."""
    for _, layer in _layers_of(model):
        if _is_ours(layer):
            before = _function_of(layer).forward_before
            del layer.forward
            if before is not type(layer).forward:  # one that was set on the layer, as `kernels` sets one
                layer.forward = MethodType(before, layer)


def _layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers whose class calls both rules, by name."""
    for name, module in model.named_modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and set(_RULES) <= set(code.co_names):
            yield name, module


def _function_of(layer: nn.Module) -> Any:
    """What runs as the layer's forward: a function of the layer, unless another library put something else there."""
    return getattr(layer.forward, "__func__", layer.forward)


def _is_ours(layer: nn.Module) -> bool:
    return hasattr(_function_of(layer), "forward_before")


def _accelerated_forward(layer: nn.Module, name: str) -> Any:
    """The function that the layer's forward becomes; the one it is where that is done."""
    forward = _function_of(layer)
    if _is_ours(layer):
        return forward
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if not isinstance(forward, FunctionType) or code is None or not set(_RULES) <= set(code.co_names):
        raise ValueError(
            f"{name}.forward must be the forward of its class, {type(layer).__name__}; another library has replaced "
            "it: accelerate the model before that"
        )
    return _with_our_rules(forward)


@cache  # one function for all layers of a class: torch.compile knows it again
def _with_our_rules(forward: FunctionType) -> Any:
    copy: Any = _copied(forward)
    copy.forward_before = forward
    return copy


def _copied(function: FunctionType) -> FunctionType:
    """A forward, with the decorators around it, in whose scope the names stand for ours."""
    inner = getattr(function, "__wrapped__", None)
    scope, cells = function.__globals__, function.__closure__ or ()
    if inner is None:
        rules = {name: _on_cpu(ours, _checked(scope[name], name)) for name, ours in _RULES.items()}
        # without __name__: torch.compile would look the names up in the module of that name
        scope = {name: value for name, value in scope.items() if name != "__name__"} | rules
        if _CONV in scope:
            scope[_CONV] = _packed_apart(scope[_CONV])
    else:
        cells = tuple(CellType(_copied(inner)) if cell.cell_contents is inner else cell for cell in cells)
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    update_wrapper(copy, function)
    return copy


def _checked(rule: Callable[..., Any], name: str) -> Callable[..., Any]:
    """transformers' function, if ours can stand in its place."""
    # with `kernels` it is a module, whose forward tells
    parameters = tuple(inspect.signature(getattr(rule, "forward", rule)).parameters)
    if parameters[: len(_FIRST_PARAMETERS)] != _FIRST_PARAMETERS or not _OPTIONS.issubset(parameters):
        expected = ", ".join([*_FIRST_PARAMETERS, *sorted(_OPTIONS)])
        raise ValueError(f"{name} of transformers must take {expected}; this version's takes {', '.join(parameters)}")
    return rule


def _on_cpu(ours: Callable[..., Any], stock: Callable[..., Any]) -> Callable[..., Any]:
    """Ours for tensors on the CPU, transformers' function for others."""

    def rule(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (ours if query.device.type == "cpu" else stock)(query, *args, **kwargs)

    return rule


def _packed_apart(stock: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' convolution, but that on the CPU packed sequences do not run into each other."""

    def conv(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
    ) -> Any:
        cu_seqlens = boundaries_of(kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx"))
        if cu_seqlens is None or hidden_states.device.type != "cpu":
            return stock(hidden_states, weight, bias, activation=activation, **kwargs)
        return packed_causal_conv1d(hidden_states, weight, bias, activation, cu_seqlens)

    return conv
