"""What a BERT says about whole sentences: whether the second of a pair follows the first, and sentences as vectors.

Texts are read in batches of like length and come back in the order given. Texts longer than the model's positions are
cut, which is logged with their number.

    follows = score_next_sentences(model, tokenizer, [("It rained.", "The street was wet.")])     # [0.93]
    vectors = embed_sentences(encoder, tokenizer, ["It rained.", "It poured."], normalize=True)   # [2, D]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize as to_unit_length
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.data.glue_batches import GlueCollator
from cottention.errors import DataError, SettingsError
from cottention.generation.counting import Cuts
from cottention.logging import get_logger
from cottention.models.configuration import check_vocabulary

logger = get_logger(__name__)


def score_next_sentences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 32,
) -> list[float]:
    """Probability that the second sentence of each pair follows the first in its text.

    Args:
        model: a CottentionBertForPreTraining, whose next-sentence head was trained.
        tokenizer: the model's own.
        pairs: first and second sentences.
        batch_size: pairs read together; the result does not depend on it.

    Returns:
        One number per pair, in the order given.

    Raises:
        SettingsError: the tokenizer is not the model's, or batch_size makes no sense.
        DataError: a text is none.
    """
    for number, pair in enumerate(pairs, start=1):
        if isinstance(pair, str) or len(pair) != 2:
            raise DataError(f"pair {number} must have two sentences; got {pair!r}")
    firsts, seconds = [first for first, _ in pairs], [second for _, second in pairs]

    def probability(batch: Mapping[str, Tensor]) -> Tensor:
        return model(**batch).seq_relationship_logits.float().softmax(-1)[:, :1]  # class 0: it follows

    return _in_batches(model, tokenizer, firsts, seconds, batch_size, probability)[:, 0].tolist()


def embed_sentences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    normalize: bool = False,
    batch_size: int = 32,
    max_length: int | None = None,
    cuts: Cuts | None = None,
) -> Tensor:
    """Vectors of sentences: the mean of the last layer over the real tokens, [CLS] and [SEP] included.

    Args:
        model: a BERT, with any head or none.
        tokenizer: the model's own.
        texts: any texts.
        normalize: whether to scale every vector to length 1, so that a dot product is a cosine.
        batch_size: texts read together; the result does not depend on it.
        max_length: tokens of a text at most; None: as many as the model has positions for, with rotary ones all.
        cuts: counts the texts that were longer; None: they are logged.

    Returns:
        `[N, hidden_size]` float32 on the CPU, in the order given.

    Raises:
        SettingsError: the tokenizer is not the model's, or batch_size makes no sense.
        DataError: a text is none.
    """

    def pooled(batch: Mapping[str, Tensor]) -> Tensor:
        return mean_of_tokens(model, batch)

    vectors = _in_batches(model, tokenizer, list(texts), None, batch_size, pooled, max_length, cuts)
    return to_unit_length(vectors, dim=-1) if normalize else vectors


def mean_of_tokens(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean of the last layer over each text's real tokens, `[B, D]` float32.

    Args:
        model: a BERT, with any head or none.
        batch: a padded batch, with its attention_mask.
    """
    hidden = model.base_model(**batch).last_hidden_state.float()  # [B, T, D]
    real = batch["attention_mask"][..., None]
    return (hidden * real).sum(1) / real.sum(1)


@torch.inference_mode()
def _in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    firsts: list[str],
    seconds: list[str] | None,
    batch_size: int,
    compute: Callable[[Mapping[str, Tensor]], Tensor],
    max_length: int | None = None,
    cuts: Cuts | None = None,
) -> Tensor:
    """What `compute` makes of every row, `[N, width]` float32 on the CPU."""
    if batch_size < 1:
        raise SettingsError(f"batch_size must be at least 1; got {batch_size}")
    check_vocabulary(tokenizer, model.config)
    if not firsts:
        return torch.zeros(0, model.config.hidden_size if seconds is None else 1)
    limit = model.config.longest_text if max_length is None else max_length
    if cuts is None:
        cuts = Cuts()
        rows = _encoded(tokenizer, firsts, seconds, limit, cuts)
        if cuts.count:
            logger.warning("%d of %d texts are longer than %d tokens and were cut", cuts.count, len(firsts), limit)
    else:
        rows = _encoded(tokenizer, firsts, seconds, limit, cuts)
    collator = GlueCollator(
        pad_token_id=tokenizer.pad_token_id or 0,  # pyright: ignore[reportArgumentType]
        packed=False,
        num_token_types=model.config.type_vocab_size,
    )
    # Texts of like length together waste the least on padding.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    results: dict[int, Tensor] = {}
    for chosen in _portions(order, batch_size):
        batch = {name: x.to(model.device) for name, x in collator([rows[index] for index in chosen]).items()}
        results.update(zip(chosen, compute(batch).float().cpu(), strict=True))
    return torch.stack([results[index] for index in range(len(rows))])


def _encoded(
    tokenizer: PreTrainedTokenizerBase, firsts: list[str], seconds: list[str] | None, limit: int | None, cuts: Cuts
) -> list[dict[str, Any]]:
    for texts in (firsts, seconds or []):
        for number, text in enumerate(texts, start=1):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(f"text {number} is not valid Unicode text (character {error.start})") from error
    how: dict[str, Any] = (
        {"truncation": False} if limit is None else {"truncation": "longest_first", "max_length": limit}
    )
    found: Any = tokenizer(firsts, seconds, verbose=False, **how)
    cuts.count += sum(bool(encoding.overflowing) for encoding in found.encodings)
    return [
        {"input_ids": ids, "num_first": encoding.type_ids.count(0)}
        for ids, encoding in zip(found["input_ids"], found.encodings, strict=True)
    ]


def _portions(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
