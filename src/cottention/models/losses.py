"""Losses of both model families; each can be scaled by the number of items of a whole optimiser step.

Averaging every micro-batch and then those averages weighs a token by its neighbours. So with `num_items_in_batch`, the
number of targets of all micro-batches and ranks together, a loss is the sum over its items divided by that number, and
the micro-batches' losses add up to what one big batch would give. transformers.Trainer passes it to these models.

    loss = cross_entropy(logits, labels, num_items_in_batch)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, pad

from cottention.files import IGNORE_INDEX
from cottention.models.packing import text_ends


def cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy over the labels that are not -100, in float32 (float64 for float64 logits).

    Args:
        logits: `[..., V]`.
        labels: `[...]` int64.
        num_items_in_batch: divisor; None: the number of labels here, which gives the mean.

    Returns:
        A scalar; 0 when there is no label at all.
    """
    labels = labels.to(logits.device)
    total = summed_cross_entropy(logits, labels)
    return averaged(total, num_items_in_batch, (labels != IGNORE_INDEX).sum().clamp(min=1))


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labels that are not -100; for the arguments see `cross_entropy`."""
    logits = _at_least_float32(logits).flatten(0, -2)
    return nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of every next token.

    Args:
        logits: `[B, T, V]`.
        labels: `[B, T]`, the tokens themselves; shifted here.
        num_items_in_batch: see `cross_entropy`.
        shift_labels: `[B, T]`, where shift_labels[t] is already the target of position t; used instead of labels.
        cu_seqlens: packed boundaries, through the rows laid end to end; a text's last token has no target in the next.

    Returns:
        A scalar.
    """
    return cross_entropy(logits, next_tokens(labels, shift_labels, cu_seqlens), num_items_in_batch)


def next_tokens(labels: Tensor | None, shift_labels: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The target of each position, `[B, T]`; -100 where there is none. For the arguments see `causal_lm_loss`."""
    if shift_labels is not None:
        return shift_labels
    assert labels is not None
    targets = pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]  # [B, T]
    if cu_seqlens is not None:
        targets = targets.masked_fill(text_ends(cu_seqlens, labels.numel()).reshape(labels.shape), IGNORE_INDEX)
    return targets


def classification_loss(
    logits: Tensor, labels: Tensor, problem_type: str | None, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Loss of a sequence classifier or regressor.

    Args:
        logits: `[B, L]`.
        labels: `[B]` classes; `[B]` or `[B, 1]` numbers when L is 1; `[B, L]` numbers or 0/1 flags.
        problem_type: "regression", "single_label_classification" or "multi_label_classification"; None: regression
            when L is 1, else single-label for integer labels and multi-label for others.
        num_items_in_batch: see `cross_entropy`.

    Returns:
        A scalar.

    Raises:
        ValueError: labels and logits differ in number.
    """
    labels = labels.to(logits.device)
    if problem_type is None:
        kind = "multi" if labels.dtype.is_floating_point else "single"
        problem_type = "regression" if logits.shape[-1] == 1 else f"{kind}_label_classification"
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels.flatten(), num_items_in_batch)
    # Both sides flat: a [B, 1] against a [B] would broadcast to [B, B] and teach the mean of the batch.
    flat, targets = _at_least_float32(logits).flatten(), labels.flatten()
    if flat.shape != targets.shape:
        raise ValueError(f"labels must have shape {list(logits.shape)} for {problem_type}; got {list(labels.shape)}")
    loss = mse_loss if problem_type == "regression" else binary_cross_entropy_with_logits
    total = loss(flat, targets.to(flat.dtype), reduction="sum")
    return averaged(total, num_items_in_batch, flat.shape[0])


def span_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    start_positions: Tensor,
    end_positions: Tensor,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean cross-entropy of where an answer starts and where it ends.

    Args:
        start_logits: `[B, T]`.
        end_logits: `[B, T]`.
        start_positions: `[B]` or `[B, 1]`, the column of each answer's first token; one outside the text is ignored,
            as an answer that was cut off with the end of its text is no target.
        end_positions: the same of its last token.
        num_items_in_batch: see `cross_entropy`.

    Returns:
        A scalar.
    """
    losses = []
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        at = positions.flatten()
        targets = at.masked_fill((at < 0) | (at >= logits.shape[1]), IGNORE_INDEX)
        losses.append(cross_entropy(logits, targets, num_items_in_batch))
    return torch.stack(losses).mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def averaged(total: Tensor, num_items: Tensor | int | None, own: Tensor | int) -> Tensor:
    """A sum of losses over the items of the whole step where their number is given, else over its own."""
    if num_items is None:
        return total / own
    # The Trainer may have counted on another device.
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)
