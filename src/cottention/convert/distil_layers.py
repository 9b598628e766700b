"""A model's attention sublayers, seen alike in BERT and GPT: what goes in, what comes out, which parameters they have.

calls, hidden_states = record(teacher, batch)
for sublayer, call in zip(attention_sublayers(student), calls):
    sublayer(*call.args, **call.kwargs)          # beside call.output, the teacher's
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from cottention.layers import CosineAttention
from cottention.models.bert.modeling_bert import CottentionBertModel


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """One layer's attention, from the tokens that it reads to the output projection; no residual, no LayerNorm."""

    core: nn.Module
    """The module that is called with the tokens."""
    finish: Callable[[Any], Tensor]
    """Makes the sublayer's output of what it returns: `[B, T, D]`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The sublayer's output."""
        return self.finish(self.core(*args, **kwargs))

    @property
    def is_cosine(self) -> bool:
        """Whether it has another attention than its source."""
        return isinstance(self.core, CosineAttention) or getattr(self.core, "is_cosine", False)

    def parameters(self) -> list[nn.Parameter]:
        """Projections and, of a cosine layer, norm_const."""
        finish = self.finish.parameters() if isinstance(self.finish, nn.Module) else []
        return [*self.core.parameters(), *finish]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a sublayer's core, to be repeated with another model's."""

    args: tuple[Any, ...]
    """Its positional arguments."""
    kwargs: dict[str, Any]
    """Its named ones."""
    output: Tensor
    """The sublayer's output."""


def attention_sublayers(model: PreTrainedModel) -> list[Sublayer]:
    """The attention of every layer, first to last."""
    body: Any = model.base_model
    if isinstance(body, CottentionBertModel):
        return [
            Sublayer(core=layer.attention.self, finish=layer.attention.output.dense)  # pyright: ignore
            for layer in body.encoder.layer
        ]
    return [Sublayer(core=block.attn, finish=itemgetter(0)) for block in body.h]


def hidden_states_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Output of the embedding and of every layer."""
    body: Any = model.base_model
    # A cache would be filled for nothing.
    options = {} if isinstance(body, CottentionBertModel) else {"use_cache": False}
    return body(**batch, output_hidden_states=True, **options).hidden_states


def record(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[list[Call], tuple[Tensor, ...]]:
    """Run a model and keep every attention sublayer's input and output.

    Returns:
        The calls, first layer to last, and the hidden states.
    """
    calls: list[Call] = []
    with ExitStack() as stack:
        for sublayer in attention_sublayers(model):
            # The default binds this sublayer, not the loop's last.
            def keep(_: nn.Module, args: Any, kwargs: Any, output: Any, finish: Any = sublayer.finish) -> None:
                calls.append(Call(args=args, kwargs=kwargs, output=finish(output)))

            stack.enter_context(sublayer.core.register_forward_hook(keep, with_kwargs=True))
        hidden_states = hidden_states_of(model, batch)
    return calls, hidden_states
