"""Turns tokens into text while they are generated, and stops at stop strings.

A token may end in the middle of a UTF-8 character, and a piece of text may be the beginning of a stop string: both are
held back until they are settled, so that the pieces, put together, are exactly the text that is returned. How a token
reads may depend on the one before it (many tokenizers write a space only between two), so the prompt's end is decoded
with the new tokens and taken off again.

    watcher = TextWatcher(tokenizer, tails=[[5, 6]], end_ids={0}, on_text=print)
    watcher.begin_call(num_columns=2)
    model.generate(..., stopping_criteria=StoppingCriteriaList([watcher]))
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

LONGEST_CHARACTER = 4
"""Bytes of UTF-8, each of which may be a token."""
_MOST_PIECES = 1024  # before they are put together: a text of a million pieces would take fifty times its size


class TextWatcher(StoppingCriteria):
    """Follows every row of a batch; `generate` calls it after each token.

    A StoppingCriteria and no streamer, because a streamer takes one row only and cannot end it.

    Args:
        tokenizer: decodes the tokens.
        tails: each prompt's last tokens, as many as a character may have.
        end_ids: tokens that end a row.
        stop_strings: texts that end a row; they and what follows are cut off.
        on_text: called with (row, piece of text) as soon as a piece is settled.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tails: Sequence[Sequence[int]],
        end_ids: set[int],
        stop_strings: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
    ) -> None:
        self._rows = [RowText(tokenizer, after=ids, end_ids=end_ids, stop_strings=stop_strings) for ids in tails]
        self._num_seen = 0
        self._on_text = on_text

    @property
    def all_finished(self) -> bool:
        """Every row came to its end."""
        return all(row.finished for row in self._rows)

    def begin_call(self, num_columns: int) -> None:
        """Say how many columns the next call of `generate` begins with, which are none of its tokens."""
        self._num_seen = num_columns

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> torch.BoolTensor:
        """Take the newest token of every row; True for the rows that are finished."""
        new_tokens = input_ids[:, self._num_seen :].tolist()
        self._num_seen = input_ids.shape[1]
        for row, tokens in enumerate(new_tokens):
            for token in tokens:
                self._tell(row, self._rows[row].add(token))
        return torch.tensor([row.finished for row in self._rows], device=input_ids.device)  # pyright: ignore[reportReturnType]

    def finish(self) -> list[RowText]:
        """Settle what was held back, and return the rows."""
        for row, text in enumerate(self._rows):
            self._tell(row, text.finish())
        return self._rows

    def _tell(self, row: int, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(row, piece)


class RowText:
    """The text of one row, growing token by token.

    Args:
        tokenizer: decodes the tokens.
        end_ids: tokens that end the row.
        stop_strings: texts that end the row; they and what follows are cut off.
        after: tokens of the prompt, whose end decides how the first new token reads.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_ids: set[int],
        stop_strings: Sequence[str] = (),
        after: Sequence[int] = (),
    ) -> None:
        self.token_ids = array("i")
        """Generated tokens, without an end token."""
        self.reason = "length"
        """Why the row ended: "end" (an end token), "stop" (a stop string), or "length" (nothing ended it)."""
        self._backend: Tokenizer = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        self._before = _readable_end(self._backend, after)
        self._decoder = DecodeStream(ids=self._before, skip_special_tokens=True)
        self._end_ids = end_ids
        self._stop_strings = [stop for stop in stop_strings if stop]
        self._held_back = ""
        self._pieces: list[str] = []
        self._num_unsettled = 0  # tokens since the decoder's last piece

    @property
    def text(self) -> str:
        """Settled text; all of it after `finish`."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    @property
    def finished(self) -> bool:
        """An end token or a stop string came."""
        return self.reason != "length"

    def add(self, token: int) -> str:
        """Take one token; return the text that is settled by it, which may be none."""
        if self.finished:
            return ""
        if token in self._end_ids:
            self.reason = "end"
            return ""
        self.token_ids.append(token)
        piece = self._decoder.step(self._backend, token)
        if not piece:
            self._num_unsettled += 1
            return ""
        self._num_unsettled = 0
        return self._settle(piece)

    def finish(self) -> str:
        """Say that no token follows; return the text that was held back."""
        if self.reason == "stop":
            return ""
        # A character that was never completed is not in the decoder's pieces; decoded at the end it shows as U+FFFD.
        num_settled = len(self.token_ids) - self._num_unsettled
        last = self.token_ids[max(num_settled - LONGEST_CHARACTER, 0) : num_settled]
        before = _readable_end(self._backend, [*self._before, *last])
        end = self._backend.decode([*before, *self.token_ids[num_settled:]], skip_special_tokens=True)
        settled = self._settle(end[len(self._backend.decode(before, skip_special_tokens=True)) :])
        rest, self._held_back = self._held_back, ""
        self._keep(rest)
        return settled + rest

    def _settle(self, piece: str) -> str:
        pending = self._held_back + piece
        stops = [start for stop in self._stop_strings if (start := pending.find(stop)) >= 0]
        if stops:
            self.reason, self._held_back = "stop", ""
            settled = pending[: min(stops)]
        else:
            keep = self._length_of_begun_stop(pending)
            settled, self._held_back = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self._keep(settled)
        return settled

    def _keep(self, settled: str) -> None:
        self._pieces.append(settled)
        if len(self._pieces) > _MOST_PIECES:
            self._pieces = ["".join(self._pieces)]

    def _length_of_begun_stop(self, pending: str) -> int:
        """Length of the longest end of `pending` with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stop_strings), default=0)
        for length in range(min(longest, len(pending)), 0, -1):
            if any(stop.startswith(pending[-length:]) for stop in self._stop_strings):
                return length
        return 0


def _readable_end(backend: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The fewest last tokens that are text by themselves, no character being cut; none where there is no such end."""
    for length in range(1, min(LONGEST_CHARACTER, len(ids)) + 1):
        end = list(ids[-length:])
        text = backend.decode(end, skip_special_tokens=True)
        if text and "\ufffd" not in text:
            return end
    return []
