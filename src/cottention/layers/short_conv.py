"""Short depthwise convolution of tokens along the text, as attention layers have it on queries, keys and values.

Each channel sees `width` tokens: causal, its own and those before it; centred, as many on both sides (of an even width
one more before). The taps run over the real tokens of one text alone, whatever stands between them: padding is skipped,
texts packed into a row do not see each other, and a text goes on from the last `width - 1` inputs of its earlier part.

    conv = ShortConv(channels=512, width=4, causal=True)
    y, inputs = conv(x, between_texts(x, conv.width, conv.num_before, attention_mask=mask), keep_inputs=True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from cottention.layers.rotary import sequence_of_each_token
from cottention.ops.derivatives import is_transformed, plain_gradients
from cottention.ops.native.binding import suits_native
from cottention.ops.native.convolution import MOST_TAPS, convolved, convolved_backward
from cottention.ops.state import accumulation_dtype
from cottention.ops.validation import check_boundaries


class Spacing(NamedTuple):
    """Where tokens go so that between the texts there is room for what the taps read there.

    Attributes:
        place: `[B * T]`, the row of each token; of padding: the last row, which nobody reads.
        starts: `[N]`, the first row of each text's room.
        counts: `[N]`, real tokens of each text.
        num_rows: all rows, without the last.
        real: `[B * T]`; None: all.
    """

    place: Int[Tensor, " B_times_T"]
    starts: Int[Tensor, " N"]
    counts: Int[Tensor, " N"]
    num_rows: int
    real: Bool[Tensor, " B_times_T"] | None


class ShortConv(nn.Module):
    """SiLU of a depthwise convolution, which starts near the identity.

    Args:
        channels: C.
        width: taps per channel.
        causal: whether they end at the token itself.
    """

    weight: nn.Parameter

    def __init__(self, channels: int, width: int, *, causal: bool) -> None:
        super().__init__()
        self.width = width
        self.num_before = width - 1 if causal else width // 2
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, copy: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        """1 at the token's own tap, noise at the others."""
        start = torch.randn_like(self.weight) * std
        start[:, self.num_before] = 1
        with torch.no_grad():
            copy(self.weight, start)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        spacing: Spacing | None = None,
        inputs: Float[Tensor, "N W_minus_1 C"] | None = None,
        *,
        keep_inputs: bool = False,
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "N W_minus_1 C"] | None]:
        """Convolve.

        Args:
            x: the tokens.
            spacing: of `between_texts`; None where each row is one text of real tokens.
            inputs: the last width - 1 real tokens before each text, zeros where there were none; causal only.
            keep_inputs: whether to return those that a later part goes on from.

        Returns:
            The tokens, 0 at padding, and the inputs when asked for.
        """
        T, C = x.shape[1:]
        room, before = self.width - 1, self.num_before
        inputs = None if inputs is None else inputs.to(x.dtype)
        if spacing is None:
            if inputs is None and not keep_inputs:
                return convolve(x, self.weight, before, room - before, activates=True), None
            rows = pad(x, (0, 0, before, room - before)) if inputs is None else torch.cat([inputs, x], dim=1)
            return convolve(rows, self.weight, activates=True), rows[:, T:] if keep_inputs else None
        step = torch.arange(room, device=x.device)
        rows = x.new_zeros(spacing.num_rows + 1, C).index_copy(0, spacing.place, x.flatten(0, 1))
        if inputs is not None:
            rows = rows.index_copy(0, (spacing.starts[:, None] + step).flatten(), inputs.flatten(0, 1))
        y = convolve(rows[None, :-1], self.weight, activates=True)[0]
        y = y.index_select(0, (spacing.place - before).clamp(max=max(y.shape[0] - 1, 0)))
        if spacing.real is not None:
            y = y.masked_fill(~spacing.real[:, None], 0)
        last = None
        if keep_inputs:
            ends = (spacing.starts + spacing.counts)[:, None] + step  # [N, W-1]
            last = rows.index_select(0, ends.flatten()).view(*ends.shape, C)
        return y.view_as(x), last

    def extra_repr(self) -> str:
        """Sizes."""
        return f"channels={self.weight.shape[0]}, width={self.width}"


def between_texts(
    x: Float[Tensor, "B T C"],
    width: int,
    num_before: int,
    *,
    attention_mask: Int[Tensor, "B T"] | None = None,
    cu_seqlens: Int[Tensor, " N_plus_1"] | None = None,
) -> Spacing | None:
    """The spacing for these tokens, which all convolutions of a layer share; None where none is needed.

    Args:
        x: tokens.
        width: taps of the convolutions.
        num_before: those in front of the token's own.
        attention_mask: 1 = real.
        cu_seqlens: boundaries of packed texts.

    Raises:
        ValueError: mask or boundaries are not those of such tokens.
    """
    B, T = x.shape[:2]
    room = width - 1
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(f"cu_seqlens needs a batch of one packed row, B=1; got B={B}")
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # pyright: ignore[reportPrivateImportUsage]
            check_boundaries(cu_seqlens.tolist(), T)
        boundaries = cu_seqlens.to(torch.int64)
        N = boundaries.shape[0] - 1  # not len, which torch.jit.trace keeps as a number
        place = torch.arange(T, device=x.device) + sequence_of_each_token(cu_seqlens, T) * room + num_before
        starts = boundaries[:-1] + torch.arange(N, device=x.device) * room
        return Spacing(place, starts, boundaries.diff(), T + N * room, None)
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != (B, T):
        raise ValueError(f"attention_mask must have shape [B, T] = {[B, T]}; got {list(attention_mask.shape)}")
    real, num_rows = attention_mask.to(torch.bool), B * (T + room)
    starts = torch.arange(B, device=x.device) * (T + room)
    place = (starts[:, None] + num_before + real.cumsum(-1) - 1).masked_fill(~real, num_rows)
    return Spacing(place.flatten(), starts, real.sum(-1), num_rows, real.flatten())


def convolve(
    x: Float[Tensor, "R T C"], weight: Float[Tensor, "C W"], before: int = 0, after: int = 0, *, activates: bool = False
) -> Float[Tensor, "R S C"]:
    """y_s = sum_i weight_i x_(s + i - before), for each channel, in the dtype of x; S = before + T + after - W + 1.

    Args:
        x: tokens.
        weight: taps.
        before: tokens in front of x, all 0.
        after: tokens behind x, all 0.
        activates: whether SiLU follows.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(x, weight):  # pyright: ignore[reportPrivateImportUsage]
        return _plain(x, weight, before, after, activates)
    return _Convolution.apply(x, weight, before, after, activates)


def _plain(x: Tensor, weight: Tensor, before: int, after: int, activates: bool) -> Tensor:
    y = _sum_of_taps(pad(x, (0, 0, before, after)), weight)
    return (silu(y) if activates else y).to(x.dtype)


def _sum_of_taps(rows: Tensor, weight: Tensor) -> Tensor:
    """In the accumulation dtype."""
    dtype = accumulation_dtype(rows.dtype)
    S = max(rows.shape[1] - weight.shape[1] + 1, 0)
    rows, taps = rows.to(dtype), weight.to(dtype).unbind(1)
    y = rows[:, :S] * taps[0]
    for i, tap in enumerate(taps[1:], start=1):
        y = torch.addcmul(y, rows[:, i : i + S], tap)
    return y


class _Convolution(torch.autograd.Function):
    """`_plain` by the native kernels where they suit, and a backward that keeps x and the taps alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, before: int, after: int, activates: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = before, after, activates
        if not _suits_native(x, weight):
            return _plain(x, weight, *ctx.options)
        S = max(before + x.shape[1] + after - weight.shape[1] + 1, 0)
        return convolved(x, weight, before=before, S=S, activates=activates)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,), (before, after, activates), wanted = grads, ctx.options, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or is_transformed(grad, x, weight):  # the gradient is to be differentiated

            def plain(x: Tensor, weight: Tensor) -> tuple[Tensor]:
                return (_plain(x, weight, before, after, activates),)

            found = plain_gradients(plain, (x, weight), grads, wanted)
        elif _suits_native(x, weight):
            options = {"before": before, "activates": activates}
            dx, dweight = convolved_backward(grad, x, weight, needs_dx=wanted[0], needs_dweight=wanted[1], **options)
            found = dx, None if dweight is None else dweight.to(weight.dtype)
        else:
            found = _gradients(grad, x, weight, before, after, activates, wanted)
        return *found, None, None, None


def _suits_native(x: Tensor, weight: Tensor) -> bool:
    return suits_native(x) and weight.dtype != torch.float64 and weight.shape[1] <= MOST_TAPS


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, before: int, after: int, activates: bool, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and weight, from operators of torch."""
    W, S = weight.shape[1], grad.shape[1]
    rows, dtype = pad(x, (0, 0, before, after)), accumulation_dtype(x.dtype)
    dz = grad.to(dtype)
    if activates:
        z = _sum_of_taps(rows, weight)
        gate = z.sigmoid()
        dz = dz * gate * (1 + z * (1 - gate))
    dx = dweight = None
    if wanted[0]:
        drows = _sum_of_taps(pad(dz, (0, 0, W - 1, W - 1)), weight.flip(1)) if S else torch.zeros_like(rows)
        dx = pad(drows, (0, 0, -before, -after)).to(x.dtype)
    if wanted[1]:
        dweight = torch.stack([(dz * rows[:, i : i + S]).sum((0, 1)) for i in range(W)], dim=1).to(weight.dtype)
    return dx, dweight
