"""Held-out perplexity of a causal model: every token of the text scored exactly once.

Each document is scored on its own, as the model would read it from a fresh start:

    input     <eos>  d1  d2 ... d(n-1)  dn
    target     d1    d2  d3 ...   dn   <eos>

cut into windows of `context` inputs. State and attention begin anew at each window, so the targets of a window are
predicted from at most `context` tokens. Counted are the n tokens of each document and its end-of-text: n + 1. Bytes are
the UTF-8 bytes of the documents, words what white space separates; end-of-text adds to the nats but to neither of them.

    score = evaluate_perplexity(model, tokenizer, load_corpus("held_out.txt"), context=1024, batch_size=8)
    score.perplexity, score.nats_per_byte
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cottention.data.tokenization import arrow_batches
from cottention.errors import SettingsError
from cottention.evaluation.inputs import as_tokens, check_vocabulary
from cottention.evaluation.score import TextScore, exp_of

IGNORED = -100
_BATCHES_SORTED = 64  # windows of so many batches are sorted by length, so that short documents share their padding
_LOGIT_ROWS = 2048  # logits turned to float32 at a time: 400 MB at 50k tokens, whatever the batch

Windows = Iterable[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class PerplexityResult(TextScore):
    """How well a model predicts a text."""

    num_words: int
    """Words of the text, as white space separates them."""
    num_documents: int
    """Documents, each begun afresh."""
    context: int
    """Tokens that a window holds."""

    @property
    def word_perplexity(self) -> float:
        """Perplexity per word: all nats, those of end-of-text included, over the words."""
        return exp_of(self.nats / max(self.num_words, 1))

    def to_dict(self) -> dict[str, float | int]:
        """Plain numbers, for JSON."""
        return {
            **super().to_dict(),
            "word_perplexity": self.word_perplexity,
            "num_words": self.num_words,
            "num_documents": self.num_documents,
            "context": self.context,
        }


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset | Sequence[str],
    *,
    context: int,
    batch_size: int = 8,
    show_progress: bool = False,
) -> PerplexityResult:
    """Score held-out text.

    Args:
        model: any causal language model, cosine or softmax; runs where it is, in the type it has.
        tokenizer: its tokenizer, with an end-of-text token.
        documents: a corpus of `load_corpus`, what `tokenize_documents` made of one, or a list of texts.
        context: tokens per window; at most the model's positions unless its attention is cosine.
        batch_size: windows per forward pass; decides speed and memory, not the result.
        show_progress: show a bar on stderr.

    Raises:
        SettingsError: the context is too long for the model, or model and tokenizer do not belong together.
        DataError: there is no text.
    """
    check_context(model, context)
    check_vocabulary(model, tokenizer)
    eos_token_id = _end_of_text(tokenizer)
    tokens = as_tokens(documents, tokenizer)
    num_bytes, num_words, num_documents, num_targets = _sizes_of(tokens)
    nats = 0.0
    batches = _batches(document_windows(tokens, eos_token_id, context), batch_size)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), tqdm(total=num_targets, unit="tok", disable=not show_progress) as bar:
            for inputs, targets in batches:
                nats += _nats_of(model, inputs, targets)
                bar.update(int((targets != IGNORED).sum()))
    finally:
        model.train(was_training)
    return PerplexityResult(
        nats=nats,
        num_tokens=num_targets,
        num_bytes=num_bytes,
        num_words=num_words,
        num_documents=num_documents,
        context=context,
    )


def document_windows(tokens: Dataset, eos_token_id: int, context: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (inputs, targets) of at most `context` tokens, document by document; each token is a target once.

    Args:
        tokens: what `tokenize_documents` returns; a document may have several rows.
        eos_token_id: first input and last target of each document.
        context: most inputs per window.
    """
    opening = np.array([eos_token_id], dtype=np.int32)
    waiting = opening  # what of the current document has not been input yet
    for table in arrow_batches(tokens):
        for ids, ends in zip(table["input_ids"], table["ends_document"].to_pylist(), strict=True):
            pieces = [waiting, ids.values.to_numpy(), *([opening] if ends else [])]
            waiting = np.concatenate(pieces)
            while len(waiting) > context:
                yield waiting[:context], waiting[1 : context + 1]
                waiting = waiting[context:]
            if ends:
                yield from _rest(waiting)
                waiting = opening
    yield from _rest(waiting)  # of a document that the rows do not end


def _rest(waiting: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if len(waiting) > 1:  # one token alone was a target already
        yield waiting[:-1], waiting[1:]


def check_context(model: PreTrainedModel, context: int) -> None:
    """Refuse a context that the model cannot read.

    Raises:
        SettingsError: it is below 1, or beyond the positions of a model that is not a cosine GPT.
    """
    if context < 1:
        raise SettingsError(f"context must be at least 1; got {context}")
    limit = getattr(model.config, "max_position_embeddings", None)
    if getattr(model.config, "attention_type", "softmax") != "cosine" and limit is not None and context > limit:
        raise SettingsError(f"a softmax model reads at most its {limit} positions; got a context of {context}")


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


def _batches(windows: Windows, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pad windows of about one length to batches: inputs and targets [B, T], targets -100 where there is none."""
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for window in windows:
        waiting.append(window)
        if len(waiting) == batch_size * _BATCHES_SORTED:
            yield from _sorted_batches(waiting, batch_size)
            waiting = []
    yield from _sorted_batches(waiting, batch_size)


def _sorted_batches(windows: list[tuple[np.ndarray, np.ndarray]], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    windows = sorted(windows, key=lambda window: -len(window[0]))
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        inputs = np.zeros((len(batch), len(batch[0][0])), dtype=np.int64)
        targets = np.full_like(inputs, IGNORED)
        for row, (ids, next_ids) in enumerate(batch):
            inputs[row, : len(ids)] = ids
            targets[row, : len(ids)] = next_ids
        yield torch.from_numpy(inputs), torch.from_numpy(targets)


def _nats_of(model: PreTrainedModel, inputs: Tensor, targets: Tensor) -> float:
    inputs, targets = inputs.to(model.device), targets.to(model.device)
    real = targets != IGNORED
    masked = {} if real.all() else {"attention_mask": real.long()}
    logits = model(input_ids=inputs, use_cache=False, **masked).logits  # [B, T, V]
    nats = 0.0
    for rows, row_targets in zip(
        logits.flatten(0, 1).split(_LOGIT_ROWS), targets.flatten().split(_LOGIT_ROWS), strict=True
    ):
        rows = rows if rows.dtype == torch.float64 else rows.float()
        losses = F.cross_entropy(rows, row_targets, ignore_index=IGNORED, reduction="none")
        nats += losses.double().sum().item()
    return nats
