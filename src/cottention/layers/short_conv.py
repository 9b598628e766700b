"""Short depthwise convolution of tokens along the text, as attention layers have it on queries, keys and values.

Each channel sees `width` tokens: causal, its own and those before it; centred, as many on both sides (of an even width
one more before). The taps run over the real tokens of one text alone, whatever stands between them: padding is skipped,
texts packed into a row do not see each other, and a text goes on from the last `width - 1` inputs of its earlier part.

    conv = ShortConv(channels=512, width=4, causal=True)
    y, inputs = conv(x, between_texts(x, conv.width, conv.num_before, attention_mask=mask), keep_inputs=True)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, silu

from cottention.layers.rotary import sequence_of_each_token
from cottention.ops.autocast import without_autocast
from cottention.ops.derivatives import is_transformed
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
            rows = pad(x, (0, 0, before, room - before)) if inputs is None else torch.cat([inputs, x], dim=1)
            return silu(convolve(rows, self.weight)), rows[:, T:] if keep_inputs else None
        step = torch.arange(room, device=x.device)
        rows = x.new_zeros(spacing.num_rows + 1, C).index_copy(0, spacing.place, x.flatten(0, 1))
        if inputs is not None:
            rows = rows.index_copy(0, (spacing.starts[:, None] + step).flatten(), inputs.flatten(0, 1))
        y = silu(convolve(rows[None, :-1], self.weight)[0])
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


def convolve(rows: Float[Tensor, "R S_plus_W_minus_1 C"], weight: Float[Tensor, "C W"]) -> Float[Tensor, "R S C"]:
    """y_s = sum_i weight_i rows_(s + i), for each channel, in the dtype of the rows."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed(rows, weight):  # pyright: ignore[reportPrivateImportUsage]
        return _sum_of_taps(rows, weight)
    return _Convolution.apply(rows, weight.to(rows.dtype))


def _sum_of_taps(rows: Tensor, weight: Tensor) -> Tensor:
    dtype = accumulation_dtype(rows.dtype)
    S = max(rows.shape[1] - weight.shape[1] + 1, 0)
    rows, taps, short = rows.to(dtype), weight.to(dtype).unbind(1), rows.dtype
    y = rows[:, :S] * taps[0]
    for i, tap in enumerate(taps[1:], start=1):
        y = torch.addcmul(y, rows[:, i : i + S], tap)
    return y.to(short)


@without_autocast
def _run(rows: Tensor, weight: Tensor) -> Tensor:
    is_fast = rows.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()
    if rows.device.type != "cpu" or not is_fast or rows.shape[1] < weight.shape[1] or not rows.numel():
        return _sum_of_taps(rows, weight)
    # As an image of one line whose channels lie together: oneDNN's fast form, ten times as fast as conv1d's.
    image = rows.transpose(1, 2)[:, :, None]
    return conv2d(image, weight[:, None, None], groups=len(weight))[:, :, 0].transpose(1, 2)


class _Convolution(torch.autograd.Function):
    """`_run`, whose own gradients in torch take up to fifty times as long."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _run(rows, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        (grad,) = grads
        W, S = weight.shape[1], grad.shape[1]
        drows = dweight = None
        if ctx.needs_input_grad[0]:
            drows = convolve(pad(grad, (0, 0, W - 1, W - 1)), weight.flip(1))
            if not S:
                drows = torch.zeros_like(rows)
        if ctx.needs_input_grad[1]:
            dtype = accumulation_dtype(rows.dtype)
            taps = [(grad * rows[:, i : i + S]).sum((0, 1), dtype=dtype) for i in range(W)]
            dweight = torch.stack(taps, dim=1).to(weight.dtype)
        return drows, dweight
