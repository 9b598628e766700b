"""Held-out perplexity of a causal model: every token of the text scored exactly once.

Each document is scored on its own, as the model would read it from a fresh start:

    input     <eos>  d1  d2 ... d(n-1)  dn
    target     d1    d2  d3 ...   dn   <eos>

What a target is predicted from, in a document that is longer than `context`:

- by default at most `context` tokens: windows side by side, state and attention begin anew at each;
- with `stride`, at least `context - stride` tokens of the document (all, where it has no more): windows overlap;
- with `carry_state`, all of the document: a cosine model hands its state from piece to piece, at constant memory.

By position: a target's position is that of the token it is predicted from, 0 being where the model began afresh: the
start of a window or, with a carried state, of the document. Positions beyond those that a model was trained on show
how it extrapolates.

Counted are the n tokens of each document and its end-of-text: n + 1. Bytes are the UTF-8 bytes of the documents, words
what white space separates; end-of-text adds to the nats but to neither of them.

    score = evaluate_perplexity(model, tokenizer, load_corpus("held_out.txt"), context=1024, batch_size=8)
    score.perplexity, score.nats_per_byte, [each.perplexity for each in score.by_position]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.bars import progress
from cottention.data.tokenization import arrow_batches
from cottention.errors import DataError, SettingsError
from cottention.evaluation.inputs import as_tokens
from cottention.evaluation.score import TextScore, TokenScore, exp_of
from cottention.evaluation.windows import IGNORED, batches_of, continued_batches, document_windows
from cottention.models import CottentionGPTForCausalLM
from cottention.models.configuration import check_vocabulary
from cottention.models.versions import cache_of

_FIRST_BUCKET = 64
_NUM_BUCKETS = 50  # 0-63, 64-127, 128-255 and so on, beyond any text
_LOGIT_ROWS = 2048  # logits at a time: 400 MB at 50k tokens, whatever the batch and the context


@dataclass(frozen=True, kw_only=True)
class PositionScore(TokenScore):
    """How well a model predicts the tokens at some positions."""

    first: int
    """First position: that of the token which a target is predicted from."""
    last: int
    """Last position of the bucket, whether a text came so far or not."""

    def to_dict(self) -> dict[str, float | int]:
        """Plain numbers, for JSON."""
        return {
            "first": self.first,
            "last": self.last,
            "num_tokens": self.num_tokens,
            "nats_per_token": self.nats_per_token,
            "perplexity": self.perplexity,
        }


@dataclass(frozen=True, kw_only=True)
class PerplexityResult(TextScore):
    """How well a model predicts a text."""

    num_words: int
    """Words of the text, as white space separates them."""
    num_documents: int
    """Documents, each begun afresh."""
    context: int
    """Tokens that a window holds; with `carry_state` the tokens of one pass, which do not matter to the result."""
    stride: int
    """Tokens that a window moves on."""
    carry_state: bool
    """Whether each token was predicted from all of its document."""
    by_position: tuple[PositionScore, ...]
    """The score by position, 0-63, 64-127, 128-255 and so on to the longest; buckets without a token are left out."""

    @property
    def word_perplexity(self) -> float:
        """Perplexity per word: all nats, those of end-of-text included, over the words."""
        return exp_of(self.nats / max(self.num_words, 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON; `by_position` is a list of such."""
        return {
            **super().to_dict(),
            "word_perplexity": self.word_perplexity,
            "num_words": self.num_words,
            "num_documents": self.num_documents,
            "context": self.context,
            "stride": self.stride,
            "carry_state": self.carry_state,
            "by_position": [bucket.to_dict() for bucket in self.by_position],
        }


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset | Sequence[str],
    *,
    context: int,
    stride: int | None = None,
    carry_state: bool = False,
    batch_size: int = 8,
    show_progress: bool = False,
) -> PerplexityResult:
    """Score held-out text.

    Args:
        model: any causal language model, cosine or softmax; runs where it is, in the type it has.
        tokenizer: its tokenizer, with an end-of-text token.
        documents: a corpus of `load_corpus`, what `tokenize_documents` made of one, or a list of texts.
        context: tokens per window; at most the model's positions unless its attention is cosine.
        stride: tokens that a window moves on; below `context` they overlap, which costs `context / stride` times the
            work. None: `context`.
        carry_state: predict each token from all of its document; cosine models only.
        batch_size: windows per forward pass; decides speed and memory, not the result.
        show_progress: show a bar on stderr.

    Raises:
        SettingsError: the context is too long for the model, model and tokenizer do not belong together, or a number
            makes no sense.
        DataError: there is no text.
    """
    check_context(model, context)
    stride = context if stride is None else stride
    _check(model, context, stride, carry_state, batch_size)
    check_vocabulary(tokenizer, model.config)
    eos_token_id = _end_of_text(tokenizer)
    tokens = as_tokens(documents, tokenizer)
    num_bytes, num_words, num_documents, num_targets = _sizes_of(tokens)
    if not num_bytes:
        raise DataError("there is no text to score")
    body, head = _body_and_head(model)
    if carry_state:
        outputs = _carried(body, continued_batches(tokens, eos_token_id, context, batch_size))
    else:
        outputs = _fresh(body, batches_of(document_windows(tokens, eos_token_id, context, stride), batch_size))
    buckets = _Buckets()
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), progress("Scoring", "token", total=num_targets, on=show_progress) as bar:
            for hidden, targets, first_position in outputs:
                asked = targets != IGNORED
                nats = _nats_of(hidden[asked.to(hidden.device)], targets[asked].to(hidden.device), head)
                positions = (first_position + torch.arange(targets.shape[1])).expand(targets.shape)
                buckets.add(positions[asked], nats)
                bar.update(len(nats))
    finally:
        model.train(was_training)
    by_position = buckets.scores()
    return PerplexityResult(
        nats=sum(bucket.nats for bucket in by_position),
        num_tokens=num_targets,
        num_bytes=num_bytes,
        num_words=num_words,
        num_documents=num_documents,
        context=context,
        stride=stride,
        carry_state=carry_state,
        by_position=by_position,
    )


def check_context(model: PreTrainedModel, context: int) -> None:
    """Refuse a context that the model cannot read.

    Raises:
        SettingsError: it is below 1, or beyond the positions of a model that is not a cosine GPT.
    """
    if context < 1:
        raise SettingsError(f"context must be at least 1; got {context}")
    limit = getattr(model.config, "max_position_embeddings", None)
    if not getattr(model.config, "keeps_states", False) and limit is not None and context > limit:
        raise SettingsError(f"a softmax model reads at most its {limit} positions; got a context of {context}")


def _check(model: PreTrainedModel, context: int, stride: int, carry_state: bool, batch_size: int) -> None:
    if batch_size < 1:
        raise SettingsError(f"batch_size must be at least 1; got {batch_size}")
    if not 1 <= stride <= context:
        raise SettingsError(f"stride must be from 1 to the context of {context}; got {stride}")
    if not carry_state:
        return
    if stride != context:
        raise SettingsError(f"carry_state and stride exclude each other; got a stride of {stride}")
    attention_type = getattr(model.config, "attention_type", "softmax")
    if getattr(model.config, "keeps_states", False) and model.config.keeps_every_key:
        raise SettingsError(
            "carry_state needs layers whose state has one size; got a hybrid with full_attention in layer_types"
        )
    if not getattr(model.config, "keeps_states", False):
        raise SettingsError(f"carry_state needs a cosine model, whose state has one size; got {attention_type}")


def _end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise SettingsError("the tokenizer has no end-of-text token (eos_token), which opens and closes each document")
    return tokenizer.eos_token_id  # pyright: ignore[reportReturnType]


def _sizes_of(tokens: Dataset) -> tuple[int, int, int, int]:
    sizes = np.zeros(4, dtype=np.int64)
    for table in arrow_batches(tokens):
        num_documents = table["ends_document"].to_numpy().sum()
        num_ids = sum(len(chunk.flatten()) for chunk in table["input_ids"].chunks)
        num_bytes, num_words = (table[name].to_numpy().sum() for name in ("num_bytes", "num_words"))
        sizes += [num_bytes, num_words, num_documents, num_ids + num_documents]
    return tuple(sizes.tolist())


def _body_and_head(model: PreTrainedModel) -> tuple[Any, Any]:
    """What computes hidden states, and what makes logits of some of them: those of a long window fit no memory.

    Other models may do more behind their head than we know, so theirs come as they are.
    """
    if isinstance(model, CottentionGPTForCausalLM):
        return model.transformer, model.lm_head
    return model, torch.nn.Identity()


def _fresh(body: Any, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield hidden states, targets, and the position of the first column."""
    # Padding needs no mask: it stands behind a row's last target, where a causal model does not look.
    for inputs, targets in batches:
        yield body(input_ids=inputs.to(body.device), use_cache=False)[0], targets, 0


def _carried(body: Any, batches: Iterator[tuple[Tensor, Tensor, bool]]) -> Iterator[tuple[Tensor, Tensor, int]]:
    cache, num_rows, position = None, 0, 0
    for inputs, targets, begins in batches:
        if begins:
            cache, position = None, 0
        elif len(inputs) < num_rows:
            assert cache is not None
            cache.batch_select_indices(torch.arange(len(inputs), device=body.device))
        # A row is padded in the last piece of its document alone, so no padding is ever carried on.
        output = body(input_ids=inputs.to(body.device), use_cache=True, past_key_values=cache)
        cache, num_rows = cache_of(output), len(inputs)
        yield output[0], targets, position
        position += inputs.shape[1]


class _Buckets:
    """Sums of nats and of tokens, by position."""

    def __init__(self) -> None:
        self._ends = torch.tensor([_FIRST_BUCKET << n for n in range(_NUM_BUCKETS)])
        self._nats = torch.zeros(_NUM_BUCKETS, dtype=torch.float64)
        self._num_tokens = torch.zeros(_NUM_BUCKETS, dtype=torch.int64)

    def add(self, positions: Tensor, nats: Tensor) -> None:
        bucket = torch.bucketize(positions, self._ends, right=True)
        self._nats.index_add_(0, bucket, nats)
        self._num_tokens += torch.bincount(bucket, minlength=_NUM_BUCKETS)

    def scores(self) -> tuple[PositionScore, ...]:
        ends = [0, *self._ends.tolist()]
        sums = zip(ends, ends[1:], self._nats.tolist(), self._num_tokens.tolist(), strict=False)
        return tuple(
            PositionScore(first=first, last=end - 1, nats=nats, num_tokens=num_tokens)
            for first, end, nats, num_tokens in sums
            if num_tokens
        )


def _nats_of(hidden: Tensor, targets: Tensor, head: Any) -> Tensor:
    """Nats of each target, in float64 on the CPU."""
    nats = []
    for rows, row_targets in zip(hidden.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True):
        logits = head(rows)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nats.append(F.cross_entropy(logits, row_targets, reduction="none").double().cpu())
    return torch.cat(nats)
