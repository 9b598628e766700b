"""Which tokens a masked language model has to predict, and what stands in their place.

15 % of the tokens are targets; of these 80 % become [MASK], 10 % a random token, 10 % stay. Special tokens are never
targets, and a random token is never special. With `whole_words` the pieces of a word ("##" continues one) are targets
together. At least one token of every sequence is a target, so that every batch has a loss.

All sequences of a batch lie end to end and are masked at once; the random numbers are the caller's, who draws them for
each sequence by itself.

    masking = TokenMasking(tokenizer, mlm_probability=0.15)
    masked, labels = masking.apply(ids, starts, draws)      # ids: [T]; starts: [N]; draws: [3, T] in [0, 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from cottention.errors import SettingsError
from cottention.files import IGNORE_INDEX as IGNORED

_BECOMES_MASK = 0.8
_BECOMES_RANDOM = 0.9
_CONTINUES = "##"  # WordPiece's mark of a piece that continues a word


def shares_of(examples: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """`[N]`: the shares of targets that examples bring with them as "mlm_probability"; None where they bring none."""
    if not examples or "mlm_probability" not in examples[0]:
        return None
    return np.array([one["mlm_probability"] for one in examples])


class TokenMasking:
    """The rule, for one tokenizer.

    Args:
        tokenizer: tells the special tokens and the vocabulary.
        mlm_probability: share of the tokens that are targets.
        whole_words: choose words instead of tokens.

    Raises:
        SettingsError: the tokenizer has no mask token or, for whole words, no pieces that continue one; or the
            probability is not in (0, 1).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, mlm_probability: float = 0.15, whole_words: bool = False
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise SettingsError("the tokenizer has no mask token; masked-language modelling needs BERT's tokens")
        if not 0 < mlm_probability < 1:
            raise SettingsError(f"mlm_probability must be between 0 and 1; got {mlm_probability}")
        self.mask_token_id: int = tokenizer.mask_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self.mlm_probability = mlm_probability
        self.whole_words = whole_words
        vocabulary = tokenizer.get_vocab()
        ids = np.array(sorted(vocabulary.values()))  # may have gaps: a vocabulary that lists a token twice
        self.is_special = np.zeros(ids[-1] + 1, dtype=bool)
        self.is_special[tokenizer.all_special_ids] = True
        self.ordinary_ids = ids[~self.is_special[ids]]
        self.continues_word = np.zeros(ids[-1] + 1, dtype=bool)
        self.continues_word[[number for token, number in vocabulary.items() if token.startswith(_CONTINUES)]] = True
        if whole_words and not self.continues_word.any():
            raise SettingsError("whole words need a WordPiece tokenizer; this one has no token that begins with ##")

    def apply(
        self, ids: np.ndarray, starts: np.ndarray, draws: np.ndarray, shares: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask sequences that lie end to end.

        Args:
            ids: `[T]` tokens.
            starts: `[N]` where sequences begin; none is empty.
            draws: `[3, T]` uniform numbers: whether a token is a target, what becomes of it, which random token.
            shares: `[N]` each sequence's own share of targets; None: `mlm_probability` for all.

        Returns:
            Input tokens and labels, `[T]` int64 each.
        """
        choice, action, token = draws
        maskable = ~self.is_special[ids]
        if self.whole_words:
            choice = choice[self._word_starts(ids, maskable)]  # one number for all pieces of a word
        choice = np.where(maskable, choice, np.inf)
        lengths = np.diff(np.append(starts, len(ids)))
        least = np.repeat(np.minimum.reduceat(choice, starts), lengths)
        share = self.mlm_probability if shares is None else np.repeat(shares, lengths)
        is_target = maskable & (choice <= np.maximum(share, least))
        labels = np.where(is_target, ids, IGNORED)
        random_ids = self.ordinary_ids[(token * len(self.ordinary_ids)).astype(np.int64)]
        masked = np.where(is_target & (action < _BECOMES_MASK), self.mask_token_id, ids)
        masked = np.where(is_target & (action >= _BECOMES_RANDOM), random_ids, masked)
        return masked.astype(np.int64), labels.astype(np.int64)

    def _word_starts(self, ids: np.ndarray, maskable: np.ndarray) -> np.ndarray:
        """`[T]`: position of the first piece of each token's word. Special tokens, and with them texts, end words."""
        begins = ~self.continues_word[ids] | ~maskable
        begins[0] = True
        begins[1:] |= ~maskable[:-1]
        return np.maximum.accumulate(np.where(begins, np.arange(len(ids)), 0))
