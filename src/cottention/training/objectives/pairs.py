"""Predict hidden tokens of sentence pairs, and whether the second sentence follows the first (NSP).

objective = Pairs(recipe)
objective.examples(open_pairs(recipe, None)).train[0]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cottention.data.pair_collator import PairCollator
from cottention.training.objectives.base import PreparedText
from cottention.training.objectives.masked import Masked
from cottention.training.pair_text import PairText


class Pairs(Masked):
    """A BERT's objective on sentence pairs."""

    losses = ("loss", "mlm_loss", "nsp_loss")
    reads_pairs = True
    what = "sentence pairs"

    @property
    def leaves_parameters_unused(self) -> bool:
        """Both heads learn."""
        return False

    def random_labels(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Hidden tokens, and an answer for each pair."""
        return {**super().random_labels(input_ids), "next_sentence_label": torch.zeros_like(input_ids[:, 0])}

    def examples(self, opened: PairText) -> PreparedText:  # type: ignore[override]
        """Pairs of one length, or of two."""
        return self._prepared(opened.tokenizer, opened.train, opened.long, opened.held_out)

    def new_collator(self, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Any:
        """Hides tokens of pairs."""
        return PairCollator(
            tokenizer,
            mlm_probability=self.recipe.data.mlm_probability,
            seed=seed,
            whole_words=self.recipe.data.whole_word_masking,
            unpadded=self.recipe.training.unpadded,
        )

    def loss(self, model: Any, batch: Mapping[str, Tensor], num_targets: Tensor | None) -> dict[str, Tensor]:
        """The sum of both losses, and each; that of pairs is divided by the pairs of the whole step."""
        # Every pair has one label, so their number is known; it is that of all processes, like the other. Those that
        # share windows all have the first tokens, and a share each.
        num_pairs = self.recipe.training.global_batch_size * self.recipe.parallelism.sequence
        return self._named(model(**batch, num_items_in_batch=num_targets, num_sequences_in_batch=num_pairs))
