"""Sequence parallelism by hand: a model whose layers share sequences, batches cut into slices, gradients added up.

    shard_sequence(model, group)                                # every rank with the same weights
    for batch in batches:                                       # every rank with the same whole batch
        loss = model(**slice_batch(model, batch)).loss          # this rank's share: the sum over ranks is the loss
        loss.backward()
        sum_gradients(model, group)                             # or DDP or FSDP2: see docs/distributed.md
        optimizer.step()

A loss is a share because it is divided by the targets of the whole batch. All ranks go forward and backward together.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cottention.files import IGNORE_INDEX
from cottention.layers.options import WithOptions
from cottention.models import (
    CottentionBertForMaskedLM,
    CottentionBertForPreTraining,
    CottentionBertModel,
    CottentionGPTForCausalLM,
    CottentionGPTModel,
)
from cottention.models.bert.layers_bert import CottentionBertPooler
from cottention.models.losses import next_tokens
from cottention.models.packing import PACKING_NAMES, one_row, text_boundaries
from cottention.models.pretrained import CottentionPreTrainedModel, default_positions
from cottention.ops.sharded import as_group

Model = TypeVar("Model", bound=nn.Module)

# Models whose outputs and losses are per token, or of the first one.
_SHARED = (
    CottentionBertForMaskedLM,
    CottentionBertForPreTraining,
    CottentionBertModel,
    CottentionGPTForCausalLM,
    CottentionGPTModel,
)
_PER_TOKEN = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
    "labels",
    "shift_labels",
)


def shard_sequence(model: Model, process_group: Any) -> Model:
    """Let the attention layers of a model share each sequence with the other ranks of a group.

    Args:
        model: one of ours, or any module with our attention layers, whose inputs then are slices too.
        process_group: a ProcessGroup, or a DeviceMesh of one dimension (`mesh["sequence"]`); None: no longer.

    Returns:
        The model itself. `slice_batch` makes the arguments of its forward.

    Raises:
        TypeError: it is a model of ours with a head that reads whole texts, or the group is none.
        ValueError: there is no attention layer of ours in it.
    """
    if isinstance(model, CottentionPreTrainedModel) and not isinstance(model, _SHARED):
        known = ", ".join(each.__name__ for each in _SHARED)
        raise TypeError(f"a sequence can be shared by {known}; got {type(model).__name__}, which reads whole texts")
    group = None if process_group is None else as_group(process_group)
    found = [each for each in model.modules() if isinstance(each, WithOptions)]
    if not found:
        raise ValueError(f"model must have attention layers of cottention; got a {type(model).__name__} without")
    for module in model.modules():
        if isinstance(module, WithOptions | CottentionPreTrainedModel | CottentionBertPooler):
            module.process_group = group
    return model


def slice_batch(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """This rank's slice of a batch, as arguments of the model's forward. No rank is asked.

    Args:
        model: of `shard_sequence`, also within DistributedDataParallel or FSDP2.
        batch: the whole batch, the same on all ranks of the group: arguments of the model's forward by name. Packed
            texts under any of the names of `cottention.models.packing`; the rows are then laid end to end.

    Returns:
        Slices of what is given for each token, as equal in length as can be; labels already shifted over the borders
        of slices (`shift_labels`, causal models); position_ids; `num_items_in_batch`, the targets of the whole batch,
        unless it is given (for several batches in one step); everything else as it is.

    Raises:
        ValueError: the model shares no sequence, or the batch holds no tokens.
    """
    bare: Any = getattr(model, "module", model)
    group = getattr(bare, "process_group", None)
    if group is None:
        raise ValueError("model must be one of shard_sequence(model, process_group); it shares no sequence")
    given = {name: value for name, value in batch.items() if value is not None}
    told = {name: given.pop(name, None) for name in PACKING_NAMES}
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if tokens is None:
        raise ValueError(f"batch must hold input_ids or inputs_embeds; got {', '.join(batch) or 'nothing'}")
    B, T = tokens.shape[:2]
    given.setdefault("attention_mask", None)
    cu_seqlens = text_boundaries(bare, given, told)
    given["cu_seqlens"] = cu_seqlens
    if given.get("position_ids") is None:
        num_tokens = T if cu_seqlens is None else B * T
        given["position_ids"] = default_positions(num_tokens, cu_seqlens, tokens.device).reshape(-1, T)
    given["position_ids"] = given["position_ids"].expand(B, T)
    _add_targets(bare, given, cu_seqlens, B * group.size())
    for name in _PER_TOKEN:
        if given.get(name) is not None:
            x = given[name] if cu_seqlens is None else one_row(given[name])
            given[name] = x.tensor_split(group.size(), 1)[group.rank()]
    return given


def _add_targets(model: Any, given: dict[str, Any], cu_seqlens: Tensor | None, num_sequences: int) -> None:
    """What the losses of a slice need to know of the whole batch."""
    if isinstance(model, CottentionGPTForCausalLM) and ("labels" in given or "shift_labels" in given):
        given["shift_labels"] = next_tokens(given.pop("labels", None), given.get("shift_labels"), cu_seqlens)
    labels = given.get("shift_labels", given.get("labels"))
    if labels is not None:
        given.setdefault("num_items_in_batch", (labels != IGNORE_INDEX).sum().clamp(min=1))
    if "next_sentence_label" in given:
        # every rank has the first tokens, and its loss is one of as many shares as there are ranks
        given["num_sequences_in_batch"] = given.get("num_sequences_in_batch", num_sequences)


def sum_gradients(model: nn.Module, process_group: Any) -> None:
    """Add up the gradients of all ranks, each of which has those of its tokens; for loops without DDP or FSDP2.

    Args:
        model: with gradients; a parameter without one counts as zero on this rank.
        process_group: as in `shard_sequence`.
    """
    group = as_group(process_group)
    works = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            works.append(dist.all_reduce(parameter.grad, group=group, async_op=True))
    for work in works:
        if work is not None:
            work.wait()
