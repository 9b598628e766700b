"""The optional parts of an attention layer, all off by default: convolution, gates of the state, norm, output gate.

    q, k, v     short_conv: each a depthwise convolution of its projection, then SiLU, before rotary and normalisation
    state       decay, erase: log_decay and beta of `cosine_attention`; divisor: where the count's power divides
    output      output_norm: RMS norm of each head; output_gate: times sigmoid or SiLU of a projection of the input

Both attention layers and BERT's have them under the same names.

    class CosineAttention(WithOptions): ...; self.add_options(sizes..., short_conv=4, output_norm=True)
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from cottention.layers.decay import DECAYS, Decay
from cottention.layers.short_conv import ShortConv, between_texts
from cottention.ops.state import accumulation_dtype

OUTPUT_GATES = ("sigmoid", "silu")
DIVISORS = ("key", "query", "none")
WIDEST_CONV = 64
_NORM_EPSILON = 1e-6
_OPEN = 4.0  # the sigmoid of it is 0.98


class HeadRMSNorm(nn.Module):
    """Each head divided by its root mean square, computed in float32; one learned scale per dim, which heads share.

    Args:
        head_dim: V.
    """

    without_weight_decay: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, o: Float[Tensor, "B T H V"]) -> Float[Tensor, "B T H V"]:
        """Normalise; a head of zeros stays zero."""
        dtype = accumulation_dtype(o.dtype)
        return rms_norm(o.to(dtype), self.weight.shape, self.weight.to(dtype), _NORM_EPSILON).to(o.dtype)


class GateProjection(nn.Linear):
    """The projection under an output gate's activation.

    Args:
        hidden_size: width of the tokens.
        inner: width of all heads.
        kind: "sigmoid", which has a bias by which it starts near one, or "silu".
    """

    def __init__(self, hidden_size: int, inner: int, kind: str) -> None:
        super().__init__(hidden_size, inner, bias=kind == "sigmoid")

    def reset_parameters(self, std: float = 0.02) -> None:
        """Little weight on the token, and a gate that is open."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.constant_(self.bias, _OPEN)


class WithOptions(nn.Module):
    """A layer with the parts that it was asked for; the others are None."""

    q_conv: ShortConv | None
    k_conv: ShortConv | None
    v_conv: ShortConv | None
    output_norm: HeadRMSNorm | None
    gate_proj: GateProjection | None
    decay: Decay | None
    beta_proj: nn.Linear | None
    # Ranks that share the sequence, of which the layer is then given a slice: see `cottention.distributed`.
    process_group: Any = None

    def add_options(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        causal: bool,
        short_conv: int | None = None,
        output_norm: bool = False,
        output_gate: str | None = None,
    ) -> None:
        """Make the parts of any attention layer.

        Raises:
            ValueError: an option has no such value.
        """
        check_short_conv(short_conv)
        _check_bool("output_norm", output_norm)
        if output_gate is not None:
            _check_choice("output_gate", output_gate, OUTPUT_GATES)
        inner = num_heads * head_dim
        self.short_conv = short_conv or None
        for name in ("q_conv", "k_conv", "v_conv"):
            setattr(self, name, ShortConv(inner, short_conv, causal=causal) if short_conv else None)
        self.output_norm = HeadRMSNorm(head_dim) if output_norm else None
        self.output_gate = output_gate
        self.gate_proj = None if output_gate is None else GateProjection(hidden_size, inner, output_gate)
        self.decay, self.beta_proj, self.divisor = None, None, "key"

    def add_memory_options(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        causal: bool,
        decay: str = "none",
        longest_half_life: int = 2048,
        erase: bool = False,
        divisor: str = "key",
    ) -> None:
        """Make the parts that cosine attention alone has.

        Raises:
            ValueError: an option has no such value, or none without an order of the tokens.
        """
        _check_choice("decay", decay, DECAYS)
        _check_bool("erase", erase)
        _check_choice("divisor", divisor, DIVISORS)
        if erase and not causal:
            raise ValueError("erase needs a layer with causal=True: what erases what has no order otherwise; got both")
        if not isinstance(longest_half_life, int) or longest_half_life < 1:
            raise ValueError(f"longest_half_life must be an int of at least 1 token; got {longest_half_life!r}")
        self.divisor = divisor
        self.decay = None if decay == "none" else Decay(decay, hidden_size, num_heads, longest_half_life)
        self.beta_proj = nn.Linear(hidden_size, num_heads) if erase else None

    def convolve(
        self,
        q: Float[Tensor, "B T C"],
        k: Float[Tensor, "B T C"],
        v: Float[Tensor, "B T C"],
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inputs: Tensor | None = None,
        keep_inputs: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The projections, convolved where the layer does so, and what a later part goes on from when asked for."""
        q_conv, k_conv, v_conv = self.q_conv, self.k_conv, self.v_conv
        if q_conv is None or k_conv is None or v_conv is None:
            return q, k, v, None
        given: dict[str, Any] = {
            "attention_mask": attention_mask,
            "cu_seqlens": cu_seqlens,
            "inputs": inputs,
            "keep_inputs": keep_inputs,
        }
        if self.process_group is not None:
            from cottention.layers.slices import convolve_slice  # torch.distributed, for those who ask for it

            width, before = q_conv.width, q_conv.num_before
            return convolve_slice(self._convolved, (q, k, v), width, before, self.process_group, **given)
        return self._convolved(q, k, v, **given)

    def _convolved(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        inputs: Tensor | None,
        keep_inputs: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q_conv, k_conv, v_conv = self.q_conv, self.k_conv, self.v_conv
        assert q_conv is not None and k_conv is not None and v_conv is not None  # noqa: PT018
        spacing = between_texts(
            q, q_conv.width, q_conv.num_before, attention_mask=attention_mask, cu_seqlens=cu_seqlens
        )
        q_in, k_in, v_in = (None, None, None) if inputs is None else inputs.chunk(3, dim=-1)
        q, q_last = q_conv(q, spacing, q_in, keep_inputs=keep_inputs)
        k, k_last = k_conv(k, spacing, k_in, keep_inputs=keep_inputs)
        v, v_last = v_conv(v, spacing, v_in, keep_inputs=keep_inputs)
        return q, k, v, torch.cat([q_last, k_last, v_last], dim=-1) if keep_inputs else None

    def check_whole(self, what: str) -> None:
        """Refuse what a slice of a sequence cannot give.

        Raises:
            ValueError: a process group shares the sequence.
        """
        if self.process_group is not None:
            raise ValueError(f"{what} and process_group exclude each other: a rank holds a slice of the sequence")

    def empty_inputs(self, B: int, like: Tensor) -> Float[Tensor, "B W_minus_1 C"] | None:
        """What the convolutions of B rows read before the first token; None without any."""
        if self.q_conv is None:
            return None
        return like.new_zeros(B, self.q_conv.width - 1, 3 * self.q_conv.weight.shape[0])

    def gates(self, x: Float[Tensor, "B T D"]) -> dict[str, Any]:
        """log_decay and beta of these tokens, as `cosine_attention` takes them; those that the layer has."""
        gates: dict[str, Any] = {}
        if self.decay is not None:
            gates["log_decay"] = self.decay(x)
        if self.beta_proj is not None:
            told = self.beta_proj(x)
            gates["beta"] = told.to(accumulation_dtype(told.dtype)).sigmoid()
        return gates

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks of a module first."""
        refuse_torchscript(self)

    def options_repr(self) -> str:
        """The options that are on and whose parts do not tell it, for `extra_repr`."""
        shown = [f"{name}={getattr(self, name)!r}" for name in ("short_conv", "output_gate") if getattr(self, name)]
        if self.divisor != "key":
            shown.append(f"divisor={self.divisor!r}")
        return "".join(f", {each}" for each in shown)

    def finish(self, o: Float[Tensor, "B T H V"], x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H_times_V"]:
        """The heads side by side, normed and gated where the layer does so; x is the layer's input."""
        if self.output_norm is not None:
            o = self.output_norm(o)
        o = o.flatten(-2)
        if self.gate_proj is not None:
            gate = self.gate_proj(x)
            o = o * (gate.sigmoid() if self.output_gate == "sigmoid" else silu(gate))
        return o


def refuse_torchscript(module: nn.Module) -> NoReturn:
    """Say what to take instead of torch.jit.script, whose language lacks keyword-only arguments and optional parts.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"{type(module).__name__} has no form in torch.jit.script, which PyTorch has given up: take torch.compile, "
        "torch.export or torch.jit.trace"
    )


def divide_queries(o: Float[Tensor, "B T H V"], norm_const: Tensor, counts: Tensor) -> Float[Tensor, "B T H V"]:
    """o_t / counts_t ** sigmoid(m): the divisor at the query, of the tokens that it sees (`[B or 1, T or 1]`)."""
    dtype = accumulation_dtype(o.dtype)
    p = torch.sigmoid(norm_const.to(dtype)).reshape(-1)
    weight = counts.clamp(min=1).to(dtype)[..., None] ** -p  # [B, T, H]
    return (o.to(dtype) * weight[..., None]).to(o.dtype)


def check_short_conv(width: Any) -> None:
    """Refuse anything but a width, 0 or None.

    Raises:
        TypeError: it is no int.
        ValueError: it is none that a short convolution has.
    """
    if width is None:
        return
    if not isinstance(width, int) or isinstance(width, bool):
        raise TypeError(f"short_conv must be an int or None; got {width!r}")
    if not 0 <= width <= WIDEST_CONV:
        raise ValueError(f"short_conv must be from 0 (none) to {WIDEST_CONV} tokens; got {width}")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
