"""Language modelling as a task of the study: windows of a stream to train on, whole ones to score.

batch of a step     fresh: windows in a random order, every one once before any comes again
                    carried: as many places in the stream, each read on and on
scores              nats of a token, of a byte, perplexity; by position in the window; and the same tokens once more,
                    read at longer contexts, in one pass or in pieces with the state carried from one to the next

task = make(cell, TaskFiles(texts=Path("../shared/data/lm"), work=Path("runs/quality")))
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cottention.benchmarks.quality.cells import Cell
from cottention.benchmarks.quality.models import reads_longer
from cottention.benchmarks.quality.tasks import Batch, Task, TaskFiles
from cottention.benchmarks.quality.texts import Text, open_text
from cottention.errors import DataError
from cottention.models import CottentionGPTForCausalLM
from cottention.models.versions import CACHE_NAME, cache_of

_CONTEXTS = (1, 2, 4, 8, 16)  # times the training window
_LONG_TOKENS = 16384  # read at each of them
_PASS_TOKENS = 8192  # scored at once
_LOGIT_ROWS = 2048


def make(cell: Cell, files: TaskFiles) -> Task:
    """Language modelling on the study's text."""
    settings = cell.plan.settings
    text = open_text(files.texts, vocab_size=settings.get("vocab_size", 4096), work=files.work)
    return TextTask(
        text,
        length=cell.plan.length,
        batch_size=cell.plan.batch_size,
        seed=cell.seed,
        carried=settings.get("carried", False),
        num_scored=settings.get("num_scored", 32768),
    )


class TextTask:
    """Windows of a text.

    Args:
        text: the streams.
        length: T of a window.
        batch_size: windows of a step.
        seed: of their order.
        carried: whether each row of a step goes on where it was at the step before.
        num_scored: tokens of each kind of text that are scored, in whole rows of 16 windows; a quarter chooses.

    Raises:
        DataError: there is less text than that.
    """

    def __init__(
        self, text: Text, *, length: int, batch_size: int, seed: int, carried: bool = False, num_scored: int = 32768
    ) -> None:
        self.vocab_size = text.vocab_size
        self._text, self._length, self._batch_size, self._seed = text, length, batch_size, seed
        self._carried, self._num_scored = carried, num_scored
        self._stream = text.train
        self._num_windows = (len(self._stream) - 1) // length
        if self._num_windows < batch_size:
            raise DataError(f"a step takes {batch_size} windows of {length} tokens; the text has {self._num_windows}")

    def data(self) -> str:
        """Digest of the text."""
        return self._text.digest

    def batch(self, step: int) -> Batch:
        """The windows of a step."""
        windows, goes_on = self._following(step) if self._carried else (self._at_random(step), None)
        starts = windows * self._length
        ids = np.stack([self._stream[start : start + self._length + 1] for start in starts]).astype(np.int64)
        return Batch(torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:]), goes_on)

    def _at_random(self, step: int) -> np.ndarray:
        per_epoch = self._num_windows // self._batch_size
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(self._num_windows)
        return order[place * self._batch_size : (place + 1) * self._batch_size]

    def _following(self, step: int) -> tuple[np.ndarray, bool]:
        """The next window of each lane; the lanes begin at equal distances, shifted by the seed."""
        per_lane = self._num_windows // self._batch_size
        lap, place = divmod(step, per_lane)
        shift = int(np.random.default_rng([self._seed, lap]).integers(self._num_windows))
        lanes = np.arange(self._batch_size) * per_lane
        windows = (shift + lanes + place) % self._num_windows
        return windows, place > 0

    def scores(self, model: CottentionGPTForCausalLM, split: str) -> dict[str, Any]:
        """Of the beginning of each kind of text; to choose by, the loss alone."""
        nats, num_tokens, num_bytes, by_kind = 0.0, 0, 0, {}
        by_position = np.zeros(self._length)
        streams = self._text.held_out(split)
        count = self._num_scored // 4 if split == "choose" else self._num_scored
        for kind, stream in streams.items():
            scored = self._scored(stream, count)
            losses = window_losses(model, scored, self._length)
            by_kind[kind] = _summary(float(losses.sum()), losses.size, self._text.num_bytes(scored[1:]))
            by_position += losses.mean(axis=0) / len(streams)
            nats, num_tokens = nats + float(losses.sum()), num_tokens + losses.size
            num_bytes += self._text.num_bytes(scored[1:])
        result = {**_summary(nats, num_tokens, num_bytes), "num_tokens": num_tokens}
        if split == "choose":
            return result
        longest = max(streams.values(), key=self._text.document_length)
        return {
            **result,
            "kinds": by_kind,
            "by_position": _buckets(by_position),
            "by_context": self._by_context(model, self._scored(longest, min(count, _LONG_TOKENS))),
        }

    def _scored(self, stream: np.ndarray, count: int) -> np.ndarray:
        """The beginning, in whole rows of the longest context."""
        longest = self._length * _CONTEXTS[-1]
        count = min(count, len(stream) - 1) // longest * longest
        if not count:
            raise DataError(f"text that is scored must have more than {longest} tokens of a kind; got {len(stream)}")
        return np.asarray(stream[: count + 1])

    def _by_context(self, model: CottentionGPTForCausalLM, scored: np.ndarray) -> dict[str, float]:
        """Mean loss of the same tokens in windows of each length, and in pieces of the longest with carried state."""
        longest = self._length * _CONTEXTS[-1]
        read = {str(n * self._length): window_losses(model, scored, n * self._length) for n in _CONTEXTS}
        read["carried"] = window_losses(model, scored, longest, piece=self._length)
        return {name: float(losses.mean()) for name, losses in read.items()}


@torch.no_grad()
def window_losses(
    model: CottentionGPTForCausalLM, stream: np.ndarray, context: int, piece: int | None = None
) -> np.ndarray:
    """`[N / context, context]` nats of a stream's tokens but the first, in windows side by side.

    Args:
        model: reads from a fresh start at each window.
        stream: N + 1 tokens.
        context: tokens of a window.
        piece: tokens that are read at a time, the state carried from piece to piece; None: the window at once.
    """
    model = reads_longer(model, context).eval()
    ids = torch.from_numpy(np.asarray(stream, dtype=np.int64))
    inputs, targets = ids[:-1].reshape(-1, context), ids[1:].reshape(-1, context)
    rows = max(1, _PASS_TOKENS // context)
    losses = [
        _losses(model, part.to(model.device), wanted.to(model.device), piece or context, carries=piece is not None)
        for part, wanted in zip(inputs.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(losses).double().numpy()


def _losses(model: CottentionGPTForCausalLM, inputs: Tensor, targets: Tensor, piece: int, *, carries: bool) -> Tensor:
    cache, losses = None, []
    for part, wanted in zip(inputs.split(piece, dim=1), targets.split(piece, dim=1), strict=True):
        output = model.transformer(part, use_cache=carries, **({CACHE_NAME: cache} if cache is not None else {}))
        cache = cache_of(output) if carries else None
        flat, asked = output.last_hidden_state.flatten(0, 1), wanted.flatten()
        nats = [
            F.cross_entropy(model.lm_head(rows).float(), wants, reduction="none")
            for rows, wants in zip(flat.split(_LOGIT_ROWS), asked.split(_LOGIT_ROWS), strict=True)
        ]
        losses.append(torch.cat(nats).view(wanted.shape).cpu())
    return torch.cat(losses, dim=1)


def _summary(nats: float, num_tokens: int, num_bytes: int) -> dict[str, float]:
    loss = nats / num_tokens
    return {"loss": loss, "perplexity": math.exp(loss), "nats_per_byte": nats / num_bytes}


def _buckets(by_position: np.ndarray) -> dict[str, float]:
    """Mean loss at positions 0-15, 16-31, 32-63 and so on."""
    buckets, begin, end = {}, 0, 16
    while begin < len(by_position):
        buckets[f"{begin}-{min(end, len(by_position)) - 1}"] = float(by_position[begin:end].mean())
        begin, end = end, 2 * end
    return buckets
