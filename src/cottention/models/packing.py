"""Packed texts, under every name that tells of them: a forward gets them as the boundaries of its rows laid end to end.

Texts that stand one behind the other in a row must not see each other. Who packs says where they begin by one of
    cu_seqlens                          `[N+1]` boundaries, B == 1
    cu_seq_lens_q, cu_seq_lens_k        the same as collators for flash-attention give them, through all rows end to end
    max_length_q, max_length_k          beside these: the longest text's tokens, which nothing here needs
    seq_idx                             `[B, T]`, the text that each token belongs to
    position_ids                        `[B, T]`, where they start again within a row (DataCollatorWithFlattening)
What is told twice must agree, and what cannot be read is refused: texts are never mixed.

When positions start again:
    - at every step other than 1, as for transformers' causal models, in a GPT without a cache or an attention_mask;
    - otherwise where they fall or come back to the row's first position, so that gaps and clipped positions of padded
      or cached texts, which transformers reads as one text, stay one text here.

    @reads_packed_texts
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, ..., cu_seqlens=None): ...
    model(input_ids, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=9, max_length_k=9)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

from cottention.models.versions import CACHE_NAMES

PACKING_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_BOUNDARIES = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")


def reads_packed_texts(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a model's forward take packed texts under all their names; it gets them as `cu_seqlens`, or None.

    `cu_seqlens` then counts through all B rows laid end to end, and an attention_mask that hides nothing is gone.
    """
    signature = inspect.signature(forward)
    own_names = [name for name, each in signature.parameters.items() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    # torch's TorchScript exporter hands over by position whatever the signature below shows
    names = [*own_names[1:], *PACKING_NAMES]

    @wraps(forward)
    def packed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(given) < len(args) + len(kwargs) or len(args) > len(names):
            return forward(self, *args, **kwargs)  # Python's own words for an argument that is given twice
        told = {name: given.pop(name, None) for name in PACKING_NAMES}
        if self.process_group is not None:
            _check_slice(given, told)
        else:
            given["cu_seqlens"] = text_boundaries(self, given, told)
        return forward(self, **given)

    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in PACKING_NAMES]
    own = list(signature.parameters.values())
    end = len(own) - (own[-1].kind is inspect.Parameter.VAR_KEYWORD)
    # transformers asks the signature which columns of a data set a model takes.
    packed_forward.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own[:end], *keywords, *own[end:]]
    )
    return packed_forward


def one_row(x: Tensor) -> Tensor:
    """`[B, T, ...]` laid end to end: `[1, B * T, ...]`."""
    return x.reshape(1, -1, *x.shape[2:])


def text_ends(cu_seqlens: Int[Tensor, " N_plus_1"], num_tokens: int) -> Bool[Tensor, " T"]:
    """Which tokens are the last of their text."""
    return _marks(cu_seqlens, num_tokens)[1:]


def check_no_empty_text(cu_seqlens: Tensor | None, what: str) -> None:
    """Refuse texts without a token where every text's `what` is read.

    Raises:
        ValueError: a text is empty.
    """
    if cu_seqlens is not None and not is_tracing(cu_seqlens) and not bool((cu_seqlens.diff() > 0).all()):
        raise ValueError(f"every packed text must hold a token, whose {what} is read; got an empty one")


def check_no_spans(cu_seqlens: Tensor | None) -> None:
    """Refuse answers in packed texts: a span is one per row, counted from the row's first column.

    Raises:
        ValueError: the texts are packed.
    """
    if cu_seqlens is not None:
        raise ValueError("start_positions and packed texts exclude each other: an answer is one per row; got both")


def text_boundaries(model: Any, given: dict[str, Any], told: dict[str, Any]) -> Tensor | None:
    """The boundaries of packed texts in these arguments of a forward; None where each row is one text.

    Args:
        model: whose forward it is.
        given: arguments by name; an attention_mask that hides nothing is taken out.
        told: those of `PACKING_NAMES`, all of them, None where not given.

    Raises:
        ValueError: what is told twice does not agree.
        TypeError: something is of another kind.
    """
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    if tokens is None or tokens.dim() < 2:
        return given.get("cu_seqlens")
    B, T = tokens.shape[:2]
    position_ids, mask = given.get("position_ids"), given.get("attention_mask")
    if position_ids is not None and tuple(position_ids.shape) not in ((B, T), (1, T)):
        raise ValueError(f"position_ids must have shape [B, T] = {[B, T]} or {[1, T]}; got {list(position_ids.shape)}")
    cu_seqlens = _told(given.get("cu_seqlens"), told, B, T)
    if cu_seqlens is None:
        return _by_positions(model, given, B, T)
    if mask is not None:
        raise ValueError("attention_mask and cu_seqlens exclude each other: packed texts hold no padding; got both")
    if position_ids is not None and T > 1:
        falls = pad(position_ids.expand(B, T).diff() < 0, (1, 0)).flatten()
        inside = (falls & ~_marks(cu_seqlens, B * T)[:-1]).any()
        _require(~inside, "position_ids must not start again within a text of cu_seqlens or seq_idx; they do")
    return cu_seqlens


def _check_slice(given: dict[str, Any], told: dict[str, Any]) -> None:
    """Check the arguments of a model that is given slices: what cannot be seen in a slice must be told.

    `cu_seq_lens_q` may stand for `cu_seqlens`, as a model's head hands it on.
    """
    if told["cu_seq_lens_q"] is not None and given.get("cu_seqlens") is None:
        given["cu_seqlens"] = told.pop("cu_seq_lens_q")
    others = [name for name, value in told.items() if value is not None]
    if others:
        raise ValueError(f"a slice of packed texts needs cu_seqlens, the boundaries of the whole row; got {others[0]}")
    if given.get("position_ids") is None:
        raise ValueError("a slice needs its position_ids: cottention.distributed.slice_batch gives them; got None")
    has_labels = any(given.get(name) is not None for name in ("labels", "shift_labels"))
    if has_labels and given.get("num_items_in_batch") is None:
        raise ValueError(
            "a slice with labels needs num_items_in_batch, the targets of the whole batch, so that the losses of all "
            "ranks add up: cottention.distributed.slice_batch gives it; got None"
        )


def _told(cu_seqlens: Tensor | None, told: dict[str, Any], B: int, T: int) -> Tensor | None:
    """The boundaries that the arguments say outright, which must agree."""
    named = {"cu_seqlens": cu_seqlens, **told}
    found = [(name, _as_boundaries(name, named[name], B, T)) for name in _BOUNDARIES if named[name] is not None]
    if told["seq_idx"] is not None:
        found.append(("seq_idx", _from_starts(_changes(told["seq_idx"], B, T))))
    if not found:
        lengths = [name for name in ("max_length_q", "max_length_k") if told[name] is not None]
        if lengths:
            raise ValueError(f"{lengths[0]} needs cu_seq_lens_q, the boundaries of the texts; got none")
        return None
    first, boundaries = found[0]
    for name, others in found[1:]:
        same = (_marks(boundaries, B * T) == _marks(others, B * T)).all()
        _require(same, f"{name} must tell the same texts as {first}: a text asks its own keys; they differ")
    for name in ("max_length_q", "max_length_k"):
        if told[name] is not None and len(boundaries) > 1:
            longest = boundaries.diff().max()
            _require(longest <= told[name], f"{name} must be at least the longest text's tokens; got {told[name]}")
    return boundaries


def _as_boundaries(name: str, cu_seqlens: Any, B: int, T: int) -> Tensor:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64; got {str(cu_seqlens.dtype).removeprefix('torch.')}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{name} must have shape [N+1]; got {list(cu_seqlens.shape)}")
    if name == "cu_seqlens" and B != 1:
        raise ValueError(f"cu_seqlens needs a batch of one packed row, B=1; got B={B}")
    if not is_tracing(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != B * T or values != sorted(values):
            raise ValueError(
                f"{name} must run from 0 to the number of tokens, {B * T}, without going back; it does not"
            )
    return cu_seqlens


def _changes(seq_idx: Any, B: int, T: int) -> Bool[Tensor, "B T"]:
    """Where a row goes over to another text."""
    if not isinstance(seq_idx, Tensor):
        raise TypeError(f"seq_idx must be a tensor; got {type(seq_idx).__name__}")
    if tuple(seq_idx.shape) != (B, T):
        raise ValueError(f"seq_idx must have shape [B, T] = {[B, T]}; got {list(seq_idx.shape)}")
    _require((seq_idx >= 0).all(), "seq_idx must be at least 0: packed texts hold no padding; got a negative one")
    return pad(seq_idx.diff() != 0, (1, 0), value=True)


def _by_positions(model: Any, given: dict[str, Any], B: int, T: int) -> Tensor | None:
    position_ids, mask = given.get("position_ids"), given.get("attention_mask")
    if position_ids is None or T < 2:
        return None
    if mask is not None and not (
        isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == B and mask.shape[1] >= T
    ):
        return None  # not a mask that a forward takes: it says so
    position_ids = position_ids.expand(B, T)
    caches = [given[name] for name in CACHE_NAMES if isinstance(given.get(name), Cache)]
    # Layers of transformers' linear attention know no length; a model makes them its own while they are empty.
    filled = any(not all(cache.is_linear) and cache.get_seq_length() > 0 for cache in caches)
    if mask is not None:
        real = mask[:, -T:] != 0
        again = _falls_between_real(position_ids, real)
        why = "position_ids must not start again within a row beside an attention_mask with padding; they do"
        if filled or is_tracing(position_ids) or not bool(real.all()):
            return _refuse(again, why)
    if filled:
        why = "position_ids that start again within a row need cu_seqlens beside a filled past_key_values; got none"
        return _refuse(_restarts(position_ids), why)
    wants_cache = bool(caches) or _wants_cache(model, given)
    gaps_count = model.gaps_begin_texts and mask is None and not wants_cache
    starts = _gaps(position_ids) if gaps_count else _restarts(position_ids)
    if is_tracing(position_ids) and (wants_cache or model.gives_a_row_per_text):
        why = "position_ids must not start again within a row where a compiled model caches or gives a row per text"
        return _refuse(starts, f"{why}; they do")
    if not is_tracing(position_ids) and not bool(starts.any()):
        return None
    given["attention_mask"] = None
    return _from_starts(starts | (torch.arange(T, device=starts.device) == 0))


def _wants_cache(model: Any, given: dict[str, Any]) -> bool:
    if given.get("use_cache") is not None:
        return given["use_cache"]
    has_labels = given.get("labels") is not None or given.get("shift_labels") is not None
    return bool(getattr(model.config, "use_cache", False)) and not model.training and not has_labels


def _gaps(position_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Where positions go on by anything but 1."""
    return pad(position_ids.diff() != 1, (1, 0))


def _restarts(position_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Where positions fall, or are the row's first again."""
    is_first = position_ids == position_ids.amin(-1, keepdim=True)
    return pad((position_ids.diff() < 0) | is_first[:, 1:], (1, 0))


def _falls_between_real(position_ids: Int[Tensor, "B T"], real: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """`_restarts` from real token to real token, whatever stands between them."""
    lowest = torch.iinfo(position_ids.dtype).min
    reached = pad(position_ids.masked_fill(~real, lowest).cummax(-1).values[:, :-1], (1, 0), value=lowest)
    first = position_ids.masked_fill(~real, torch.iinfo(position_ids.dtype).max).amin(-1, keepdim=True)
    return real & (reached > lowest) & ((position_ids < reached) | (position_ids == first))


def _refuse(starts: Tensor, why: str) -> None:
    _require(~starts.any(), why)


def _require(holds: Tensor, message: str) -> None:
    """Raise unless it holds; a traced graph cannot ask now and asserts when it runs."""
    if is_tracing(holds):
        torch.ops.aten._assert_async.msg(holds, message)
    elif not bool(holds):
        raise ValueError(message)


def _from_starts(starts: Bool[Tensor, "B T"]) -> Int[Tensor, " N_plus_1"]:
    """Boundaries of the texts that begin at these tokens.

    A traced graph cannot have as many as there are texts, so it has one for each token: the texts, then empty ones.
    """
    starts = starts.flatten()
    token = torch.arange(starts.shape[0] + 1, device=starts.device)
    end = token[-1:]
    if is_tracing(starts):
        at = torch.where(starts, token[:-1], end).sort().values
    else:
        (at,) = starts.nonzero(as_tuple=True)
    return torch.cat([at, end]).to(torch.int32)


def _marks(cu_seqlens: Int[Tensor, " N_plus_1"], num_tokens: int) -> Bool[Tensor, " T_plus_1"]:
    """Which of the places 0 .. num_tokens are boundaries."""
    marks = torch.zeros(num_tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
    return marks.index_fill(0, cu_seqlens.to(torch.int64), 1)  # not True, which torch.jit.trace has no form of
