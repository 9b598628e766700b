"""CosineCache: the states of a cosine or hybrid GPT's layers as the cache that `generate` passes around.

Of a cosine layer it holds one K x V matrix per head and row and a count per row, so decoding memory does not grow with
the text; of a softmax layer in a hybrid the keys and values, all or those of its window, and which of them are real. It
also remembers where each row's positions stand, so that a text may be continued by any mix of `forward` and `generate`.

    out = model(input_ids)                                        # out.past_key_values is a CosineCache
    out = model(more_ids, past_key_values=out.past_key_values)    # any number of tokens at a time
    save_file(cache.to_tensors(), path); CosineCache.from_tensors(load_file(path))

PyTorch knows it as a tree of tensors, so that torch.export and torch.onnx.export take it and give it back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin

from cottention.layers import AttentionState, KeyValueState, WindowState
from cottention.layers.rotary import packed_positions, sequence_of_each_token
from cottention.ops import CosineState

LayerState = CosineState | AttentionState | KeyValueState | WindowState
# By transformers' names, as in a config's layer_types.
STATES: dict[str, type[LayerState]] = {
    "linear_attention": CosineState,
    "full_attention": KeyValueState,
    "sliding_attention": WindowState,
}
_KINDS: tuple[type[LayerState], ...] = (*STATES.values(), AttentionState)


class CosineCacheLayer(CacheLayerMixin):
    """One layer's state and the number of columns, padding included, that went into it."""

    is_compileable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: LayerState | None = None
        self.num_tokens = 0

    @property
    def is_sliding(self) -> bool:
        """Whether it holds the keys of a window."""
        return isinstance(self.state, WindowState)

    def advance(self, state: LayerState, num_tokens: int) -> None:
        """Take over the state after `num_tokens` more columns. A cache keeps no gradient."""
        self.state = _each(state, torch.Tensor.detach)
        self.num_tokens += num_tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first state comes from the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse keys and values: only a state can be stored."""
        raise TypeError("a CosineCache stores recurrent states; keys and values cannot be appended to it")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the whole text after `query_length` more columns, and offset 0."""
        return self.num_tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Columns seen so far, padding included."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """-1: there is no longest text."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1, under the name that older transformers use."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.num_tokens, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.state is not None:
            rows = beam_idx.to(self.state[0].device)
            self.state = _each(self.state, lambda part: part.index_select(0, rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place."""
        if self.state is not None:
            self.state = _each(self.state, lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget tokens: they cannot be taken out of a sum again.

        Raises:
            ValueError: anything but 0 tokens are to be removed.
        """
        if tokens_to_remove != 0:
            raise ValueError(f"a CosineCache cannot forget single tokens; got crop({tokens_to_remove})")

    def offload(self) -> None:
        """Move to the CPU; `prefetch` moves back."""
        if self.state is not None:
            self._device = self.state[0].device
            self.state = _each(self.state, lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Undo `offload`."""
        if self.state is not None:
            device = getattr(self, "_device", self.state[0].device)
            self.state = _each(self.state, lambda part: part.to(device, non_blocking=True))


def _each(state: LayerState, change: Callable[[Tensor], Tensor]) -> LayerState:
    """A state of the same kind, of its tensors changed."""
    return type(state)(**{name: change(part) for name, part in _parts(state).items()})


def _parts(state: LayerState) -> dict[str, Tensor]:
    """The tensors of a state by name, without `inputs` where no short convolution keeps them."""
    return {name: part for name, part in state._asdict().items() if part is not None}


def _kind_with(names: set[str]) -> type[LayerState]:
    """The kind of state that has tensors of these names."""
    for kind in _KINDS:
        if set(kind._fields) - set(kind._field_defaults) <= names <= set(kind._fields):
            return kind
    raise ValueError(f"a layer's state must have the tensors of {', '.join(k.__name__ for k in _KINDS)}; got {names}")


class CosineCache(Cache):
    """States of all layers.

    Args:
        num_layers: layers of the model.

    Attributes:
        next_position: `[B]` int64, the position of each row's next token; None before the first.
    """

    layers: list[CosineCacheLayer]

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[CosineCacheLayer() for _ in range(num_layers)])
        self.next_position: Int[Tensor, " B"] | None = None

    @classmethod
    def adopt(cls, cache: Cache | None, layer_types: Sequence[str]) -> None:
        """Make an empty `DynamicCache(config=model.config)` a CosineCache, in place, as its owner holds on to it.

        Others are left as they are: what has been filled by another model cannot be read.

        Args:
            cache: what the model was given.
            layer_types: of the model. Of layers of one kind their number is not asked, which a model checks itself.
        """
        if type(cache) is not DynamicCache or not cache.layers:
            return
        kept: list[Any] = cache.layers
        kinds = [_kind_of(layer) for layer in kept]
        if (kinds != list(layer_types) and {*kinds} != {"linear_attention"}) or any(map(_is_filled, kept)):
            return
        empty: Any = cache
        empty.__class__ = cls
        empty.__init__(len(kept))

    @property
    def states(self) -> tuple[LayerState | None, ...]:
        """Each layer's state, a `CosineState` or `AttentionState` of a cosine layer; None before the first token."""
        return tuple(layer.state for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes held; whatever the length of the text, unless a layer keeps every key."""
        return sum(part.nbytes for state in self.states if state is not None for part in _parts(state).values())

    def restart_columns(self) -> None:
        """Count columns from 0 again; states and positions stay.

        `generate` then takes its input for all there is, and neither keeps nor masks the tokens of a text that was read
        before, which may be a million.
        """
        for layer in self.layers:
            layer.num_tokens = 0

    def positions(
        self, num_tokens: int, device: torch.device, cu_seqlens: Int[Tensor, " N_plus_1"] | None = None
    ) -> Int[Tensor, "B T"]:
        """Positions of the next `num_tokens` columns when the caller names none: on from where each row stands.

        Args:
            num_tokens: columns.
            device: where the positions go.
            cu_seqlens: boundaries of packed texts, each a row of the cache.
        """
        if cu_seqlens is None:
            positions = torch.arange(num_tokens, device=device)[None]
        else:
            positions = packed_positions(cu_seqlens, num_tokens)
        if self.next_position is None:
            return positions
        start = self.next_position.to(device)
        return positions + (
            start[:, None] if cu_seqlens is None else start[sequence_of_each_token(cu_seqlens, num_tokens)]
        )

    def advance_positions(
        self, num_tokens: int, position_ids: Tensor | None, attention_mask: Tensor | None, like: Tensor
    ) -> None:
        """Note where each row stands after `num_tokens` more columns.

        Args:
            num_tokens: T, number of columns.
            position_ids: what the caller asked for; the next position then follows the row's last real token. None:
                positions ran on, through padding too.
            attention_mask: `[B, T]`, which of the columns are real; None: all.
            like: any tensor of B rows on the right device.
        """
        start = self.next_position
        if start is None:
            start = torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)
        if position_ids is None or num_tokens == 0:
            self.next_position = start + num_tokens
            return
        following = position_ids.to(torch.int64).expand(like.shape[0], -1) + 1  # [B, T]
        if attention_mask is not None:
            following = following.masked_fill(attention_mask == 0, 0)
        self.next_position = torch.maximum(following.amax(dim=1), start)

    def advance_packed_positions(self, cu_seqlens: Int[Tensor, " N_plus_1"], position_ids: Tensor | None) -> None:
        """Note where each packed text stands at its end.

        Args:
            cu_seqlens: the texts' boundaries.
            position_ids: `[1, T]`, what the caller asked for; None: positions ran on.
        """
        lengths = cu_seqlens.diff().to(torch.int64)
        start = torch.zeros_like(lengths) if self.next_position is None else self.next_position
        if position_ids is None:
            self.next_position = start + lengths
            return
        last = (cu_seqlens[1:].to(torch.int64) - 1).clamp(min=0)
        self.next_position = torch.where(lengths > 0, position_ids[0, last] + 1, start)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors, to save with safetensors and to restore with `from_tensors`.

        Raises:
            ValueError: nothing was cached yet.
        """
        tensors = {}
        for i, state in enumerate(self.states):
            if state is None:
                raise ValueError("a CosineCache can be saved once tokens have gone through the model; got an empty one")
            tensors |= {f"layers.{i}.{name}": part.contiguous() for name, part in _parts(state).items()}
        tensors["num_tokens"] = torch.tensor(self.get_seq_length())
        if self.next_position is not None:
            tensors["next_position"] = self.next_position
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> CosineCache:
        """The cache that `to_tensors` described."""
        fields: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("layers."):
                _, i, field = name.split(".")
                fields.setdefault(int(i), {})[field] = tensor
        cache = cls(len(fields))
        for i, layer in enumerate(cache.layers):
            layer.advance(_kind_with(set(fields[i]))(**fields[i]), int(tensors["num_tokens"]))
        cache.next_position = tensors.get("next_position")
        return cache

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.next_position = None

    def reorder_cache(self, beam_idx: Any) -> None:
        """Keep these rows of every layer, in this order."""
        super().reorder_cache(beam_idx)
        if self.next_position is not None:
            self.next_position = self.next_position.index_select(0, beam_idx.to(self.next_position.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times in place."""
        super().batch_repeat_interleave(repeats)
        if self.next_position is not None:
            self.next_position = self.next_position.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        if self.next_position is not None:
            self.next_position = self.next_position[indices]


def _kind_of(layer: Any) -> str:
    """transformers' name of the attention that a layer of its DynamicCache is for."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return "linear_attention"
    return "sliding_attention" if getattr(layer, "is_sliding", False) else "full_attention"


def _is_filled(layer: Any) -> bool:
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        made: Any = layer
        return any((*made.is_conv_states_initialized.values(), *made.is_recurrent_states_initialized.values()))
    return layer.is_initialized


class _Structure:
    """What of a cache is no tensor. Exported programs take caches of any number of columns, so those are all equal."""

    def __init__(self, cache: CosineCache | None, num_layers: int, kinds: tuple[str | None, ...] = ()) -> None:
        self.cache = (lambda: None) if cache is None else weakref.ref(cache)
        self.num_layers = num_layers
        # Of the layers' states; empty where all are a `CosineState`.
        self.kinds = kinds
        # An exported program cannot count: what it returns starts anew, as after `restart_columns`.
        self.num_tokens = 0 if cache is None or torch.compiler.is_exporting() else cache.get_seq_length()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Structure) and other.num_layers == self.num_layers and other.kinds == self.kinds

    def __hash__(self) -> int:
        return hash(self.num_layers)


def _flatten(cache: CosineCache) -> tuple[list[list[Tensor]], _Structure]:
    """States' matrices, counts and the next positions (each empty before the first token).

    Of softmax layers the keys, values and which of them are real follow, of short convolutions their inputs; the counts
    of windows stand among the others.
    """
    kinds = tuple(None if state is None else _named(state) for state in cache.states)
    hybrid = any(kind not in (None, CosineState.__name__) for kind in kinds)
    found: dict[str, list[Tensor]] = {key: [] for key in (*_KEYS, *(_HYBRID_KEYS if hybrid else ()))}
    for state in cache.states:
        for name, part in ({} if state is None else _parts(state)).items():
            found[name].append(part)
    if cache.next_position is not None:
        found["next_position"].append(cache.next_position)
    return list(found.values()), _Structure(cache, len(cache.layers), kinds if hybrid else ())


def _flatten_with_keys(cache: CosineCache) -> tuple[list[tuple[Any, list[Tensor]]], _Structure]:
    tensors, structure = _flatten(cache)
    keys = (*_KEYS, *_HYBRID_KEYS)[: len(tensors)]
    return [(pytree.GetAttrKey(key), x) for key, x in zip(keys, tensors, strict=True)], structure


def _unflatten(tensors: Any, structure: _Structure) -> CosineCache:
    tensors = [list(each) for each in tensors]
    same = structure.cache()
    if same is not None and all(
        x is y for new, old in zip(tensors, _flatten(same)[0], strict=True) for x, y in zip(new, old, strict=True)
    ):
        return same  # who only looks through a tree (FSDP) hands on the cache itself, which a model writes to
    cache = CosineCache(structure.num_layers)
    parts = {key: iter(each) for key, each in zip((*_KEYS, *_HYBRID_KEYS), tensors, strict=False)}
    kinds = structure.kinds or (CosineState.__name__,) * len(tensors[0])
    for layer, name in zip(cache.layers, kinds, strict=False):
        if name is not None:
            kind = next(each for each in _KINDS if each.__name__ == name.removesuffix(_CONVOLVED))
            optional = kind._field_defaults if name == kind.__name__ else ()
            fields = [field for field in kind._fields if field not in optional]
            layer.advance(kind(**{field: next(parts[field]) for field in fields}), structure.num_tokens)
    cache.next_position = next(parts["next_position"], None)
    return cache


def _named(state: LayerState) -> str:
    """The name of a state's kind, and whether it has what it may lack."""
    has_all = len(_parts(state)) == len(state._fields)
    return type(state).__name__ + (_CONVOLVED if state._field_defaults and has_all else "")


def _dumped(structure: _Structure) -> Any:
    return [structure.num_layers, list(structure.kinds)] if structure.kinds else structure.num_layers


def _undumped(dumped: Any) -> _Structure:
    num_layers, kinds = dumped if isinstance(dumped, list) else (dumped, ())
    return _Structure(None, num_layers, tuple(kinds))


_KEYS = ("kv", "seen", "next_position")
_HYBRID_KEYS = ("k", "v", "real", "inputs")
_CONVOLVED = "+inputs"
pytree.register_pytree_node(
    CosineCache,
    _flatten,
    _unflatten,
    serialized_type_name="cottention.models.cache.CosineCache",
    to_dumpable_context=_dumped,
    from_dumpable_context=_undumped,
    flatten_with_keys_fn=_flatten_with_keys,
)
# A saved program holds its example inputs, which are read back with weights_only=True.
torch.serialization.add_safe_globals([CosineCache, CosineCacheLayer, *_KINDS])
