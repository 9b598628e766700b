"""What a cosine layer with a short convolution remembers of the tokens so far, from which later ones go on.

x, state = attn(x, output_final_state=True); y, state = attn(y, initial_state=state, output_final_state=True)
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from cottention.ops import CosineState


class AttentionState(NamedTuple):
    """What a cosine layer with a short convolution remembers: the operation's state, and what the taps still read.

    Attributes:
        kv: `[N, H, K, V]`, as in `CosineState`.
        seen: `[N]`, likewise.
        inputs: `[N, width - 1, 3 H K]`, projections q, k and v of the last real tokens before the convolution, zeros
            where there were none.
    """

    kv: Float[Tensor, "N H K V"]
    seen: Int[Tensor, " N"]
    inputs: Float[Tensor, "N W_minus_1 C"]

    def detach(self) -> AttentionState:
        """The same state cut off from the graph."""
        return AttentionState(self.kv.detach(), self.seen, self.inputs.detach())

    def index_select(self, index: Int[Tensor, " M"]) -> AttentionState:
        """The states of the sequences in `index`, in that order, repeats allowed (beam search)."""
        return AttentionState(*(part.index_select(0, index) for part in self))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self)


def split_state(
    state: CosineState | AttentionState | None, width: int | None
) -> tuple[CosineState | None, Tensor | None]:
    """The operation's state, and the inputs of a layer whose convolutions are `width` wide (None: there are none).

    Raises:
        TypeError: it is the state of a layer of the other kind.
    """
    if state is None:
        return None, None
    if isinstance(state, AttentionState) != (width is not None):
        expected = "CosineState(kv, seen)" if width is None else "AttentionState(kv, seen, inputs)"
        raise TypeError(
            f"initial_state must be {expected} for a layer with short_conv={width}; got {type(state).__name__}"
        )
    if not isinstance(state, AttentionState):
        return state, None
    return CosineState(state.kv, state.seen), state.inputs
